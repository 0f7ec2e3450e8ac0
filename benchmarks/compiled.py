"""What the compilers of GPUs and TPU pods make of one update, without the hardware.

Kernels, temporaries, collectives, bytes and compile time, for Adam and AdaMod. It needs
x86-64 Linux and the group ``compiled``: libtpu, and JAX's CUDA plugin without CUDA. It
proves nothing about numerics or speed.

    pip install -e '.[examples]' --group compiled
    python -m benchmarks.compiled
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks import report, trees
from benchmarks.optimizers import (
    ADAM,
    ADAMOD,
    ADAMOD_BFLOAT16,
    ADAMOD_FLOAT8,
    DONATED,
    OPTIMIZERS,
    step,
)
from optax_adamod import Float8Array

AXES = ("slice", "fsdp")
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast",
    "collective-permute", "reduce-scatter", "send", "recv",
)  # fmt: skip
# Instructions for which nothing runs.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
# A TPU's transfers into its fast memory, which run while kernels do.
PREFETCHES = ("copy-start", "slice-start")
PREFETCHED = ("copy-done", "slice-done")
H100 = Path(__file__).parent / "h100.txtpb"
TARGETS = {
    "H100": dict(platform="cuda", topology_name="h100", topology="1x1x1"),
    "v5e 16x16": dict(platform="tpu", topology_name="v5e:16x16"),
    "v5p 8x8x8": dict(platform="tpu", topology_name="v5p:8x8x8"),
    "2 slices of v5e 16x16": dict(
        platform="tpu", topology_name="v5e:16x16", num_slices=2
    ),
}
FLATTENED = "AdaMod in optax.flatten"
COMPARED = {x: OPTIMIZERS[x] for x in (ADAM, ADAMOD, ADAMOD_BFLOAT16, ADAMOD_FLOAT8)}
COMPARED[FLATTENED] = lambda: optax.flatten(OPTIMIZERS[ADAMOD]())
TREES = {
    "mixed": trees.mixed_leaves,
    "matrix": trees.matrix,
    "160 leaves": functools.partial(trees.equal_leaves, 160 * 2**17, 160),
    "160 leaves, stacked": trees.stacked_leaves,
    "16 equal leaves": functools.partial(trees.equal_leaves, 16 * 2**20, 16),
    "Llama 3 8B": functools.partial(trees.llama3, "8B"),
    "Llama 3 70B": functools.partial(trees.llama3, "70B"),
}
PODS_ALONE = ("Llama 3 8B", "Llama 3 70B")
GPU_ALONE = ("160 leaves", "160 leaves, stacked")  # what a kernel's launch costs there


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles one update for accelerators that need not be there."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Which of the accelerators."""
    trees: tuple[str, ...] = tuple(TREES)
    """Which of the trees of parameters; Llama's on pods alone, 160 leaves on GPU."""
    output: Path = report.RESULTS
    """Folder for the tables."""

    def __post_init__(self) -> None:
        for name, known in (("targets", TARGETS), ("trees", TREES)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"--{name}: {unknown} unknown; there are {[*known]}.")


def without_hardware() -> None:
    """Keeps JAX on CPU, and libtpu from looking for TPUs or being the only one."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-256",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def mesh(target: str) -> Mesh:
    """Returns the target's devices, in as many slices as have 256 at most."""
    options: dict[str, Any] = dict(TARGETS[target])
    if options["platform"] == "cuda":
        options["target_config"] = H100.read_text()
    devices = np.asarray(topologies.get_topology_desc(**options).devices)
    groups = math.ceil(devices.size / 256)
    explicit = (AxisType.Explicit,) * len(AXES)  # as jax.make_mesh has them
    return Mesh(devices.reshape(groups, -1), AXES, axis_types=explicit)


def fully_sharded(tree: Any, mesh: Mesh) -> Any:
    """Splits each leaf over all devices, along its longest dimension that divides.

    Where none does, a matrix is split along the longest for each axis. The last
    dimension is split by 128 alone, so that no group of averages in 8 bits is, and
    their exponents are split as their codes.
    """

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


def computations(hlo: str) -> dict[str, str]:
    """Returns the computations of the program, by name."""
    return {
        match["name"]: match["body"]
        for match in re.finditer(
            r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$\n(?P<body>(?:  .*\n)*)",
            hlo,
            re.MULTILINE,
        )
    }


def instructions(hlo: str) -> list[tuple[str, str, str]]:
    """Returns result type, operation and line of all that the program runs."""
    bodies = computations(hlo)
    (entry,) = re.findall(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE)

    def run(name: str) -> list[tuple[str, str, str]]:
        found = []
        for line in bodies[name].splitlines():
            match = re.match(r" +(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
            if match is None:
                raise ValueError(f"not an instruction of HLO: {line}")
            if match[2] == "call":
                (callee,) = re.findall(r"to_apply=%?([\w.-]+)", line)
                found += run(callee)
            elif match[2] not in FREE and "ConcatBitcast" not in line:
                found.append((match[1], match[2], line))
        return found

    return run(entry)


def bytes_of(shape: str) -> int:
    """Returns what an array takes in a device's main memory, padded to its tiles."""
    match = re.match(r"([a-z]+)(\d+)?\w*\[([\d,]*)\](?:\{([\d,]*)(.*)\})?$", shape)
    if match is None or "S(" in shape:  # a token, or in a TPU's other memories
        return 0
    bits = int(match[2] or 8)
    lengths = [int(x) for x in match[3].split(",") if x]
    # From the dimension that varies fastest on.
    order = [int(x) for x in (match[4] or "").split(",") if x]
    padded = [lengths[d] for d in order or reversed(range(len(lengths)))]
    tile = re.search(r"T\(([\d,]+)\)", match[5] or "")
    for d, unit in enumerate(reversed(tile[1].split(",") if tile else [])):
        if d < len(padded):
            padded[d] = -(-padded[d] // int(unit)) * int(unit)
    return math.prod(padded) * bits // 8


def live_bytes(hlo: str) -> int:
    """Returns the most that is live at once beside arguments and results.

    Read from the schedule. XLA's own figure counts gaps between buffers too, and for
    TPUs more than that: megabytes where the program has no buffer in main memory.
    """
    (entry,) = re.findall(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE)
    lines = computations(hlo)[entry].splitlines()
    sizes: list[int] = []  # of each buffer
    spans: list[tuple[int, int]] = []  # from when to when it is live
    named: dict[str, list[int]] = {}
    results: list[int] = []
    for now, line in enumerate(lines):
        match = re.match(
            r" +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, |$)", line
        )
        if match is None:
            raise ValueError(f"not an instruction of HLO: {line}")
        root, name, shape, op, inputs = match.groups()
        used = [named[x] for x in re.findall(r"%([\w.-]+)", inputs)]
        for i in itertools.chain(*used):
            spans[i] = (spans[i][0], now)
        if op in ("bitcast", "tuple"):
            named[name] = [*itertools.chain(*used)]
        elif op == "get-tuple-element":
            (index,) = re.findall(r"index=(\d+)", line)
            named[name] = used[0][int(index) :][:1]
        elif op in ("parameter", "constant", *PREFETCHES):
            named[name] = []
        else:
            arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)
            named[name] = [*range(len(sizes), len(sizes) + len(arrays))]
            sizes += map(bytes_of, arrays)
            spans += [(now, now)] * len(arrays)
        if root:
            results = named[name]
    changes = [0] * (len(lines) + 1)
    for i in set(range(len(sizes))) - set(results):
        start, end = spans[i]
        changes[start] += sizes[i]
        changes[end + 1] -= sizes[i]
    return max(itertools.accumulate(changes))


def kinds(hlo: str, kernels: list[str]) -> int:
    """Returns how many of the kernels differ: what is alike is compiled once."""
    bodies = computations(hlo)

    def anonymous(text: str) -> str:
        names: dict[str, str] = {}
        # Where an operand lies is no matter of the kernel, nor where it comes from.
        text = re.sub(r", (metadata|backend_config)=\{.*|:?S\(\d\)", "", text)
        text = re.sub(r"calls=%?([\w.-]+)", lambda m: anonymous(bodies[m[1]]), text)
        return re.sub(
            r"%[\w.-]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), text
        )

    return len({anonymous(kernel) for kernel in kernels})


def facts(optimizer: str, tree: trees.Tree, mesh: Mesh) -> dict[str, Any]:
    """Compiles the update; returns what the program consists of, for one chip."""
    params = fully_sharded(tree, mesh)
    tx = COMPARED[optimizer]()
    with jax.set_mesh(mesh):
        state = fully_sharded(jax.eval_shape(tx.init, params), mesh)
        lowered = jax.jit(step(tx), donate_argnums=DONATED).lower(params, state, params)
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None
    assert memory is not None
    program = instructions(hlo)
    run = [x for x in program if x[1] not in PREFETCHES + PREFETCHED]
    kernels = [line for shape, _, line in run if re.search(r"\[\d", shape)]
    parameters = trees.size(tree) / mesh.size
    live = live_bytes(hlo)
    return {
        "optimizer": optimizer,
        "leaves": len(tree),
        "kernels": len(kernels),
        "kinds": kinds(hlo, kernels),
        "of scalars": len(run) - len(kernels),
        "prefetches": sum(op in PREFETCHES for _, op, _ in program),
        "collectives": sum(op.startswith(COLLECTIVES) for _, op, _ in program),
        "temporaries, bytes": memory.temp_size_in_bytes,
        "live, bytes": live,
        "state": sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        ) / trees.size(tree),
        "in": memory.argument_size_in_bytes / parameters,
        "out": memory.output_size_in_bytes / parameters,
        "in + out, MB": (memory.argument_size_in_bytes + memory.output_size_in_bytes)
        / 1e6,
        "held, MB": (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + live
        )
        / 1e6,
        "compile, s of CPU": seconds,
    }  # fmt: skip


def jobs(options: Options) -> list[tuple[str, str]]:
    """Returns targets and trees that belong together."""
    found = [
        (target, name)
        for name in options.trees
        for target in options.targets
        if name
        not in (GPU_ALONE if TARGETS[target]["platform"] == "tpu" else PODS_ALONE)
    ]
    if not found:
        raise ValueError(
            f"--trees {list(options.trees)} and --targets {list(options.targets)} do "
            f"not go together: {list(PODS_ALONE)} are for pods, {list(GPU_ALONE)} for "
            "a GPU."
        )
    return found


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table for each target and tree."""
    without_hardware()
    notes = (
        "State, in and out: bytes a parameter. The rest for one chip. Temporaries are "
        "XLA's figure; live is the most that is in main memory at once beside "
        "arguments and results, by the schedule. Held is what the chip keeps while it "
        "updates: that, the arguments and the results. Kernels of one kind are "
        "compiled once. A TPU computes scalars beside its kernels, a GPU in "
        "kernels of their own.",
    )
    tables = {}
    wanted = jobs(options)
    meshes = {target: mesh(target) for target in options.targets}
    text = ""
    for target, name in tqdm(wanted):
        where, tree = meshes[target], TREES[name]()
        title = f"{target} ({where.size} chips), {name}: {trees.size(tree):,}"
        tables[f"{title} parameters"] = [
            facts(optimizer, tree, where)
            for optimizer in COMPARED
            if optimizer != FLATTENED or name == "160 leaves"
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
