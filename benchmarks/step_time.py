"""Time of one whole update: AdaMod beside Optax's optimizers and PyTorch's.

Each optimizer takes turns with ``optax.adam``, and with a copy of as many floats as
there are parameters, so that what else the machine does falls on all of them. Ratios
are those of neighbours in time; their median and quartiles are printed. Each result is
written when it is there.

    pip install -e '.[examples]' --group bench && python -m benchmarks.step_time
"""

import dataclasses
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Processes, and PyTorch, share a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import tyro
from tqdm import tqdm

from benchmarks.common import optimizers, report, torch_optimizers, trees
from benchmarks.common.optimizers import (
    ADAM,
    ADAM_FLOAT8,
    ADAMOD,
    ADAMOD_7_BYTES,
    ADAMOD_FLOAT8,
    DONATED,
    FLASH,
    OPTIMIZERS,
    step,
    updates_of,
    weights_dtype,
)
from benchmarks.common.timing import (
    Copy,
    Update,
    a_process,
    calibrated,
    quartiles,
    seconds,
    this_process,
)

Trees = dict[str, Callable[..., trees.Tree]]
CASES = ("leaves", "models", "sizes", "tracing", "large")
EVERYONE = (*OPTIMIZERS, *FLASH, *torch_optimizers.NAMES)
# What is float32 without groups of 128.
IN_GROUPS = (ADAMOD_FLOAT8, ADAMOD_7_BYTES, ADAM_FLOAT8)


@dataclasses.dataclass(frozen=True)
class Options:
    """Times whole updates of several optimizers, taking turns."""

    rounds: int = 25
    """Samples of each optimizer."""
    cases: tuple[str, ...] = CASES[:-1]
    """What to vary: the number of leaves, the model, the size of one leaf; and the
    time to trace and to compile. For a GPU 'large': GPT-2 small, a billion parameters
    in 4 matrices, and Llama 3.2 1B."""
    parameters: int = 25_000_000
    """Parameters where the number of leaves is varied."""
    leaves: tuple[int, ...] = (1, 16, 160, 1600)
    """Numbers of leaves; tracing is timed for those from 16."""
    largest: float = 1e8
    """The largest leaf, in parameters."""
    optimizers: tuple[str, ...] = EVERYONE
    """Which optimizers; Adam is always timed."""
    apart: bool = False
    """Give each optimizer a process of its own, for the device's peak, whose trees
    must be in the order of their size."""
    small: bool = False
    """Make the large trees small."""
    name: str = "step_time"
    """Name of the files of results."""
    output: Path = report.RESULTS
    """Folder for the tables."""

    def __post_init__(self) -> None:
        if unknown := set(self.optimizers) - {*EVERYONE}:
            raise ValueError(
                f"--optimizers: {sorted(unknown)} unknown; there are {[*EVERYONE]}."
            )
        if unknown := set(self.cases) - {*CASES}:
            raise ValueError(f"--cases: {sorted(unknown)} unknown.")
        for option in ("rounds", "parameters", "largest"):
            if getattr(self, option) < 1:
                raise ValueError(
                    f"--{option} must be at least 1, got {getattr(self, option)}."
                )


def bytes_per_step(optimizer: str, tree: trees.Tree) -> int:
    """Returns what an update must read and write: gradients, parameters and state."""
    if optimizer in torch_optimizers.NAMES:
        optimizer = ADAMOD if ADAMOD in optimizer else ADAM
    state = jax.eval_shape(updates_of(optimizer).init, tree)
    held, weights = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
        for x in (state, tree)
    )
    return 3 * weights + 2 * held


def has_groups(tree: trees.Tree) -> bool:
    """Returns whether any leaf has averages in 8 bits, if they are asked for."""
    return any(leaf.shape[-1] % 128 == 0 for leaf in tree.values())


def create(
    optimizer: str, tree: trees.Tree, given: Any | None = None
) -> Update | torch_optimizers.Update:
    """Returns the optimizer's updates, of the gradients that are given."""
    if optimizer in torch_optimizers.NAMES:
        return torch_optimizers.Update(optimizer, tree)
    return Update(updates_of(optimizer), tree, given)


_adam: dict[Callable[..., trees.Tree], Update] = {}


def adam_of(tree: Callable[..., trees.Tree]) -> Update:
    """Returns Adam's updates, which optimizers share; those of one tree are kept."""
    if tree not in _adam:
        _adam.clear()
        _adam[tree] = Update(updates_of(ADAM), tree())
    return _adam[tree]


def facts(optimizer: str, tree: Callable[..., trees.Tree]) -> dict[str, Any]:
    """Returns what compiling takes, and the device's peak, which never falls again."""
    timed = create(optimizer, tree(dtype=weights_dtype(optimizer)))
    timed.run(2)
    peak = timed.peak()
    return {
        "compile, s": timed.compile_seconds,
        "device's peak, GB": peak and peak / 1e9,
    }


COLUMNS = (
    "optimizer", "ms, median", "of Adam's time", "quartiles", "GB/s", "of a copy's",
    "a copy's GB/s", "compile, s", "device's peak, GB", "failed",
)  # fmt: skip


def compare(
    optimizer: str, tree: Callable[..., trees.Tree], rounds: int
) -> dict[str, Any]:
    """Times Adam, the optimizer and a copy in turns; returns a row of the table."""
    shapes, adam = tree(dtype=weights_dtype(optimizer)), adam_of(tree)
    timed = create(optimizer, shapes, adam.gradients)
    turns = [(x, calibrated(x)) for x in (adam, timed, Copy(shapes))]
    samples: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for (x, times), sample in zip(turns, samples, strict=True):
            sample.append(seconds(x, times))
    ratios = [other / own for own, other in zip(*samples[:2], strict=True)]
    moved, copied = bytes_per_step(optimizer, shapes), 2 * 4 * trees.size(shapes)
    return {
        "optimizer": optimizer,
        "ms, median": 1e3 * statistics.median(samples[1]),
        "of Adam's time": statistics.median(ratios),
        "quartiles": quartiles(ratios),
        "GB/s": moved / statistics.median(samples[1]) / 1e9,
        "of a copy's": statistics.median(
            (moved / own) / (copied / copy)
            for own, copy in zip(*samples[1:], strict=True)
        ),
        "a copy's GB/s": copied / statistics.median(samples[2]) / 1e9,
        "compile, s": timed.compile_seconds,
        "device's peak, GB": None,
        "failed": None,
    }


def use_cache(folder: str) -> None:
    """Lets a process compile what it times once, and Adam not again."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def measured(
    optimizer: str, wanted: Trees, options: Options
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a row for each tree, of what fails one that says so."""
    rows: dict[str, dict[str, Any]] = {title: {} for title in wanted}
    process = a_process if options.apart else this_process
    with tempfile.TemporaryDirectory() as cache, process() as run:
        # Peaks come first, in the order of the trees: timing needs more memory.
        steps: list[tuple[Any, ...]] = [(compare, options.rounds)]
        if options.apart:
            run(use_cache, cache)
            steps.insert(0, (facts,))
        for function, *arguments in steps:
            for title, tree in wanted.items():
                try:
                    row = run(function, optimizer, tree, *arguments)
                except Exception as error:  # as of memory, or of the process
                    why = f"{type(error).__name__}: {str(error)[:100]}"
                    row = dict.fromkeys(COLUMNS) | {"failed": why}
                rows[title] = row | {k: v for k, v in rows[title].items() if v}
                if function is compare:
                    yield title, rows[title] | {"optimizer": optimizer}


def compiling(optimizer: str, tree: trees.Tree, repeats: int = 5) -> dict[str, Any]:
    """Times tracing, which starts from nothing each time, lowering and compiling."""
    tx = OPTIMIZERS[optimizer]()
    state = jax.eval_shape(tx.init, tree)

    def trace():
        jax.clear_caches()
        start = time.perf_counter()
        traced = jax.jit(step(tx), donate_argnums=DONATED).trace(tree, state, tree)
        return traced, time.perf_counter() - start

    traces = [trace()[1] for _ in range(repeats)]
    traced, _ = trace()
    start = time.perf_counter()
    lowered = traced.lower()
    middle = time.perf_counter()
    lowered.compile()
    return {
        "optimizer": optimizer,
        "leaves": len(tree),
        "trace, ms": 1e3 * statistics.median(traces),
        "a leaf, ms": 1e3 * statistics.median(traces) / len(tree),
        "lower, ms": 1e3 * (middle - start),
        "compile, ms": 1e3 * (time.perf_counter() - middle),
    }


def timed_trees(options: Options) -> Trees:
    """Returns the trees of the cases asked for, by the titles of their tables."""
    found: Trees = {}
    if "leaves" in options.cases:
        for leaves in options.leaves:
            tree = functools.partial(trees.equal_matrices, options.parameters, leaves)
            found[f"{trees.size(tree()):,} parameters in {leaves} leaves"] = tree
    if "models" in options.cases:
        found["ResNet-50"] = trees.resnet50
        found["GPT-2 small"] = trees.gpt2_small
    if "sizes" in options.cases:
        for exponent in range(3, 1 + round(math.log10(options.largest))):
            tree = functools.partial(trees.equal_matrices, 10**exponent, 1)
            found[f"{trees.size(tree()):,} parameters in one leaf"] = tree
    if "large" in options.cases:
        small = [functools.partial(trees.equal_matrices, 2**16, x) for x in (1, 2, 4)]
        large = [
            trees.gpt2_small,
            functools.partial(trees.equal_matrices, 2**30, 4),
            functools.partial(trees.llama3, "1B"),
        ]
        names = ("GPT-2 small", "4 matrices", "Llama 3.2 1B")
        for name, tree in zip(names, small if options.small else large, strict=True):
            found[f"{name}, {trees.size(tree()):,} parameters"] = tree
    return found


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table for each tree."""
    wanted = [ADAM, *(x for x in options.optimizers if x != ADAM)]
    missing = (torch_optimizers.missing() | optimizers.missing()) & set(wanted)
    wanted = [x for x in wanted if x not in missing]
    notes = [
        f"Medians of {options.rounds} samples, each beside one of Adam; "
        "GB/s counts what an update must read and write."
    ]
    if missing:
        notes.append(f"Not installed, so left out: {', '.join(sorted(missing))}.")
    packages = (*report.PACKAGES, *torch_optimizers.PACKAGES, "flashoptim-jax")
    tables: dict[str, list[dict[str, Any]]] = {}

    def save() -> str:
        return report.save(options.name, tables, options.output, packages, tuple(notes))

    found = timed_trees(options)
    # A process has all trees, or else a tree all optimizers, which share Adam.
    jobs = [found] if options.apart else [{title: found[title]} for title in found]
    for job, optimizer in tqdm([*itertools.product(jobs, wanted)]):
        fitting = {
            title: tree
            for title, tree in job.items()
            if optimizer not in IN_GROUPS or has_groups(tree())
        }
        for title, row in measured(optimizer, fitting, options):
            tables.setdefault(title, []).append(row)
            save()
    if "tracing" in options.cases:
        for leaves in (x for x in options.leaves if x >= 16):
            tree = functools.partial(trees.equal_matrices, options.parameters, leaves)
            tables[f"Tracing and compiling {leaves} leaves"] = [
                compiling(optimizer, tree(dtype=weights_dtype(optimizer)))
                for optimizer in tqdm(wanted, f"tracing {leaves} leaves")
                if optimizer in OPTIMIZERS
            ]
    print(save())
    return tables


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
