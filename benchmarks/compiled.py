"""What the compilers of GPUs and TPU pods make of one update, without the hardware.

Kernels, temporaries, collectives, bytes and compile time, for Adam and AdaMod. It needs
x86-64 Linux and the group ``compiled``: libtpu, and JAX's CUDA plugin without CUDA. It
proves nothing about numerics or speed.

    pip install -e '.[examples]' --group compiled
    python -m benchmarks.compiled
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks.common import hlo, report, trees
from benchmarks.common.optimizers import (
    ADAM,
    ADAM_BFLOAT16,
    ADAM_FLOAT8,
    ADAMOD,
    ADAMOD_7_BYTES,
    ADAMOD_BFLOAT16,
    ADAMOD_FLOAT8,
    DONATED,
    OPTIMIZERS,
    step,
    step_in_place,
    weights_dtype,
)
from benchmarks.common.targets import (
    AXES,
    TARGETS,
    lowered_for,
    mesh,
    on_one,
    without_hardware,
)
from optax_adamod import Float8Array

COMPARED = (
    ADAM, ADAMOD, ADAMOD_BFLOAT16, ADAMOD_FLOAT8, ADAMOD_7_BYTES, ADAM_FLOAT8,
    ADAM_BFLOAT16,
)  # fmt: skip
# One leaf each. What a compiler makes of one of them need not hold for another.
SHAPES = (
    (8192, 8192), (128256, 2048), (32000, 4096), (50257, 768), (16, 2048, 8192),
)  # fmt: skip
TREES = {
    "mixed": trees.mixed_leaves,
    "16 equal leaves": functools.partial(trees.equal_leaves, 16 * 2**20, 16),
    **{
        " x ".join(map(str, shape)): functools.partial(trees.one_leaf, *shape)
        for shape in SHAPES
    },
    "Llama 3.2 1B": functools.partial(trees.llama3, "1B"),
    "Llama 3 8B": functools.partial(trees.llama3, "8B"),
    "Llama 3 70B": functools.partial(trees.llama3, "70B"),
}
PODS_ALONE = ("Llama 3 8B", "Llama 3 70B")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles one update for accelerators that need not be there."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Which of the accelerators."""
    trees: tuple[str, ...] = tuple(TREES)
    """Which of the trees of parameters; Llama 3's of 8B and more on pods alone."""
    optimizers: tuple[str, ...] = COMPARED
    """Which of the optimizers."""
    axes: tuple[Literal["explicit", "auto"], ...] = ("explicit", "auto")
    """Types of a pod's mesh axes; automatic ones for AdaMod in 8 bits alone."""
    output: Path = report.RESULTS
    """Folder for the tables."""

    def __post_init__(self) -> None:
        for name, known in (
            ("targets", TARGETS), ("trees", TREES), ("optimizers", COMPARED)
        ):  # fmt: skip
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"--{name}: {unknown} unknown; there are {[*known]}.")


def fully_sharded(tree: Any, mesh: Mesh) -> Any:
    """Splits each leaf over all devices, along its longest dimension that divides.

    Where none does, a matrix is split along the longest for each axis. The last
    dimension is split by 128 alone, so that no group of averages in 8 bits is, and
    their exponents are split as their codes.
    """
    if mesh.size == 1:
        return on_one(tree, mesh)

    def sharded(leaf: Any) -> Any:
        if isinstance(leaf, Float8Array):
            codes = sharded(leaf.codes)
            exponents = leaf.exponents.update(sharding=codes.sharding)
            return Float8Array(codes, exponents)
        units = [*leaf.shape[:-1], *(x / 128 for x in leaf.shape[-1:])]
        split: list[tuple[str, ...]] = [() for _ in units]
        for axes in (AXES, AXES[1:], AXES[:1]) if len(units) > 1 else (AXES,):
            if set(axes) & {axis for taken in split for axis in taken}:
                continue
            devices = math.prod(mesh.shape[axis] for axis in axes)
            fitting = [d for d, length in enumerate(units) if not length % devices]
            if fitting:
                longest = max(fitting, key=lambda d: leaf.shape[d])
                split[longest] += axes
                units[longest] //= devices
        return leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*split)))

    return jax.tree.map(sharded, tree, is_leaf=lambda x: isinstance(x, Float8Array))


def in_shards(tree: Any) -> int:
    """Returns the bytes of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def facts(optimizer: str, tree: trees.Tree, mesh: Mesh) -> dict[str, Any]:
    """Compiles the update; returns what the program consists of, for one chip."""
    params = fully_sharded(tree, mesh)
    tx = OPTIMIZERS[optimizer]()
    pod = mesh.size > 1
    jax.clear_caches()
    with lowered_for(mesh):
        state = fully_sharded(jax.eval_shape(tx.init, params), mesh)
        jitted = (
            jax.jit(step_in_place(tx), donate_argnums=(0, 1, 2))
            if pod
            else jax.jit(step(tx), donate_argnums=DONATED)
        )
        start = time.process_time()
        lowered = jitted.lower(params, state, params)
    middle = time.process_time()
    compiled = lowered.compile()
    end = time.process_time()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    program = hlo.instructions(text)
    run = [x for x in program if x.operation not in hlo.PREFETCHES + hlo.PREFETCHED]
    kernels = [x.line for x in run if x.of_leaves]
    (itemsize,) = {leaf.dtype.itemsize for leaf in tree.values()}
    own = in_shards(params) / itemsize  # parameters of one chip
    # An update that is returned is no result of training.
    written = memory.output_size_in_bytes - pod * in_shards(params)
    live = hlo.live_bytes(text)
    kept = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + live
    )
    return {
        "optimizer": optimizer,
        "axes": {AxisType.Explicit: "explicit", AxisType.Auto: "auto"}[
            mesh.axis_types[0]
        ] if pod else "none",
        "leaves": len(tree),
        "kernels": len(kernels),
        "a leaf": len(kernels) / len(tree),
        "kinds": hlo.kinds(text, kernels),
        "of scalars and indices": len(run) - len(kernels),
        "prefetches": sum(x.operation in hlo.PREFETCHES for x in program),
        "collectives": sum(x.operation.startswith(hlo.COLLECTIVES) for x in program),
        "temporaries": memory.temp_size_in_bytes / own,
        "live": live / own,
        "state": sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        ) / trees.size(tree),
        "in": memory.argument_size_in_bytes / own,
        "out": written / own,
        "held, MB": kept / 1e6,
        "lower, s of CPU": middle - start,
        "compile, s of CPU": end - middle,
        "both, s of CPU": end - start,
    }  # fmt: skip


def jobs(options: Options) -> list[tuple[str, str]]:
    """Returns targets and trees that belong together."""
    found = [
        (target, name)
        for name in options.trees
        for target in options.targets
        if TARGETS[target]["platform"] == "tpu" or name not in PODS_ALONE
    ]
    if not found:
        raise ValueError(
            f"--trees {list(options.trees)} and --targets {list(options.targets)} do "
            f"not go together: {list(PODS_ALONE)} are for pods."
        )
    return found


def rows(target: str, options: Options) -> list[tuple[str, str]]:
    """Returns optimizers and types of axes of a target's tables, row by row."""
    pod = TARGETS[target]["platform"] == "tpu"
    return [
        (optimizer, axes)
        for optimizer in options.optimizers
        for axes in (options.axes if pod else ("explicit",))
        if axes == "explicit" or optimizer == ADAMOD_FLOAT8
    ]


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table for each target and tree."""
    without_hardware()
    notes = (
        "Temporaries, live, state, in and out: bytes a parameter of one chip; the rest "
        "for one chip too. Temporaries are XLA's figure; live is the most that is in "
        "main memory at once beside arguments and results, by the schedule. Held is "
        "what the chip keeps while it updates: that, the arguments and the results. "
        "Kernels of one kind are compiled once. Kernels that read no leaf are counted "
        "apart; a TPU computes scalars beside its kernels. To lower is to trace too.",
        "On pods the update takes the gradient's place, as in training, where "
        "gradients are no arguments: otherwise kernels that write it there would copy "
        "the gradient first. It is not counted in out.",
    )
    tables = {}
    text = ""
    wanted = jobs(options)
    for target in options.targets:  # the first program of a process takes longer
        for optimizer, axes in rows(target, options):
            facts(optimizer, trees.one_leaf(8192, 128), mesh(target, axes))
    for target, name in tqdm(wanted):
        chips, parameters = mesh(target, "explicit").size, trees.size(TREES[name]())
        tables[f"{target} ({chips} chips), {name}: {parameters:,} parameters"] = [
            facts(optimizer, TREES[name](dtype=dtype), mesh(target, axes))
            for optimizer, axes in rows(target, options)
            for dtype in [weights_dtype(optimizer)]
        ]
        # After each, since the large ones take long.
        text = report.save("compiled", tables, options.output, notes=notes)
    print(text)
    return tables


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
