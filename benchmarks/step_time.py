"""Time of one whole update: AdaMod beside Optax's optimizers and PyTorch's.

Each optimizer takes turns with ``optax.adam``, and with a copy of as many floats as
there are parameters, so that what else the machine does falls on all of them. Ratios
are those of neighbours in time; their median and quartiles are printed.

    pip install -e '.[examples]' --group bench && python -m benchmarks.step_time
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from benchmarks import report, torch_optimizers, trees
from benchmarks.optimizers import (
    ADAM,
    ADAM_FLOAT8,
    ADAMOD,
    ADAMOD_7_BYTES,
    ADAMOD_FLOAT8,
    DONATED,
    OPTIMIZERS,
    step,
    weights_dtype,
)
from benchmarks.timing import (
    Copy,
    Timed,
    Update,
    calibrated,
    gradients,
    quartiles,
    seconds,
)

Trees = dict[str, Callable[..., trees.Tree]]
# What is float32 without groups of 128.
IN_GROUPS = (ADAMOD_FLOAT8, ADAMOD_7_BYTES, ADAM_FLOAT8)


@dataclasses.dataclass(frozen=True)
class Options:
    """Times whole updates of several optimizers, taking turns."""

    rounds: int = 25
    """Samples of each optimizer."""
    cases: tuple[str, ...] = ("leaves", "models", "sizes", "tracing")
    """What to vary: the number of leaves, the model, the size of one leaf; and the
    time to trace and to compile."""
    parameters: int = 25_000_000
    """Parameters where the number of leaves is varied."""
    leaves: tuple[int, ...] = (1, 16, 160, 1600)
    """Numbers of leaves; tracing is timed for those from 16."""
    largest: float = 1e8
    """The largest leaf, in parameters."""
    optimizers: tuple[str, ...] = (*OPTIMIZERS, *torch_optimizers.NAMES)
    """Which optimizers; Adam is always timed."""
    name: str = "step_time"
    """Name of the files of results."""
    output: Path = report.RESULTS
    """Folder for the tables."""

    def __post_init__(self) -> None:
        known = {*OPTIMIZERS, *torch_optimizers.NAMES}
        if unknown := set(self.optimizers) - known:
            raise ValueError(
                f"--optimizers: {sorted(unknown)} unknown; there are {sorted(known)}."
            )
        if unknown := set(self.cases) - {"leaves", "models", "sizes", "tracing"}:
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
    state = jax.eval_shape(OPTIMIZERS[optimizer]().init, tree)
    held, weights = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
        for x in (state, tree)
    )
    return 3 * weights + 2 * held


def has_groups(tree: trees.Tree) -> bool:
    """Returns whether any leaf has averages in 8 bits, if they are asked for."""
    return any(leaf.shape[-1] % 128 == 0 for leaf in tree.values())


def compare(
    adam: Update, optimizer: str, tree: trees.Tree, rounds: int
) -> dict[str, Any]:
    """Times Adam, the optimizer and a copy in turns; returns a row of the table."""
    if optimizer in OPTIMIZERS:
        timed: Timed = Update(OPTIMIZERS[optimizer](), tree)
    else:
        timed = torch_optimizers.Update(optimizer, gradients(tree))
    turns = [(x, calibrated(x)) for x in (adam, timed, Copy(tree))]
    samples: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for (x, times), sample in zip(turns, samples, strict=True):
            sample.append(seconds(x, times))
    ratios = [other / own for own, other in zip(*samples[:2], strict=True)]
    moved, copied = bytes_per_step(optimizer, tree), 2 * 4 * trees.size(tree)
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
    }


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
            found[f"{options.parameters:,} parameters in {leaves} leaves"] = (
                functools.partial(trees.equal_leaves, options.parameters, leaves)
            )
    if "models" in options.cases:
        found["ResNet-50"] = trees.resnet50
        found["GPT-2 small"] = trees.gpt2_small
    if "sizes" in options.cases:
        for exponent in range(3, 1 + round(math.log10(options.largest))):
            found[f"{10**exponent:,} parameters in one leaf"] = functools.partial(
                trees.equal_leaves, 10**exponent, 1
            )
    return found


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table for each tree."""
    wanted = [ADAM, *(x for x in options.optimizers if x != ADAM)]
    missing = torch_optimizers.missing() & set(wanted)
    wanted = [x for x in wanted if x not in missing]
    tables = {}
    for title, tree in timed_trees(options).items():
        adam = Update(OPTIMIZERS[ADAM](), tree())
        tables[title] = [
            compare(
                adam, optimizer, tree(dtype=weights_dtype(optimizer)), options.rounds
            )
            for optimizer in tqdm(wanted, title)
            if optimizer not in IN_GROUPS or has_groups(tree())
        ]
    if "tracing" in options.cases:
        for leaves in (x for x in options.leaves if x >= 16):
            tree = functools.partial(trees.equal_leaves, options.parameters, leaves)
            tables[f"Tracing and compiling {leaves} leaves"] = [
                compiling(optimizer, tree(dtype=weights_dtype(optimizer)))
                for optimizer in tqdm(wanted, f"tracing {leaves} leaves")
                if optimizer in OPTIMIZERS
            ]
    notes = [
        f"Medians of {options.rounds} samples, each beside one of Adam; "
        "GB/s counts what an update must read and write."
    ]
    if missing:
        notes.append(f"Not installed, so left out: {', '.join(sorted(missing))}.")
    packages = (*report.PACKAGES, *torch_optimizers.PACKAGES)
    print(report.save(options.name, tables, options.output, packages, tuple(notes)))
    return tables


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
