"""Reads what a compiled program consists of, from its text in XLA's language."""

import itertools
import math
import re
from typing import NamedTuple

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast",
    "collective-permute", "reduce-scatter", "send", "recv",
)  # fmt: skip
# Instructions for which nothing runs.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
# A TPU's transfers into its fast memory, which run while kernels do.
PREFETCHES = ("copy-start", "slice-start")
PREFETCHED = ("copy-done", "slice-done")
LINE = re.compile(
    r" +(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<op>[a-z][\w-]*)"
    r"\((?P<inputs>.*?)\)(?:, |$)"
)
FREE_CALLS = re.compile("ConcatBitcast|AllocateBuffer")  # of a TPU


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


def parsed(line: str) -> re.Match[str]:
    """Returns a line's root, name, result's shape, operation and inputs."""
    match = LINE.match(line)
    if match is None:
        raise ValueError(f"not an instruction of HLO: {line}")
    return match


def entry(hlo: str) -> str:
    """Returns the name of the computation that the program starts with."""
    (name,) = re.findall(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE)
    return name


class Instruction(NamedTuple):
    """Something that the program runs."""

    shape: str  # of the result
    operation: str
    line: str
    of_leaves: bool  # whether it reads arrays that were passed, or what came of them


def instructions(hlo: str) -> list[Instruction]:
    """Returns all that the program runs."""
    bodies = computations(hlo)

    def run(name: str, passed: list[bool] | None) -> tuple[list[Instruction], bool]:
        found: list[Instruction] = []
        reads: dict[str, bool] = {}
        of_leaves = False
        for line in bodies[name].splitlines():
            match = parsed(line)
            shape, operation, inputs = match["shape"], match["op"], match["inputs"]
            used = [reads[x] for x in re.findall(r"%([\w.-]+)", inputs)]
            of_leaves = any(used)
            if operation == "parameter":
                array = re.search(r"\[\d", shape) is not None
                of_leaves = array if passed is None else passed[int(inputs)]
            elif operation == "call":
                (callee,) = re.findall(r"to_apply=%?([\w.-]+)", line)
                inner, of_leaves = run(callee, used)
                found += inner
            elif operation not in FREE and not FREE_CALLS.search(line):
                found.append(Instruction(shape, operation, line, of_leaves))
            reads[match["name"]] = of_leaves
        return found, of_leaves  # of the root, which comes last

    return run(entry(hlo), None)[0]


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
    lines = computations(hlo)[entry(hlo)].splitlines()
    sizes: list[int] = []  # of each buffer
    spans: list[tuple[int, int]] = []  # from when to when it is live
    named: dict[str, list[int]] = {}
    results: list[int] = []
    for now, line in enumerate(lines):
        root, name, shape, op, inputs = parsed(line).groups()
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
            # What a kernel writes in an operand's place has no buffer of its own.
            aliases = line.partition("output_to_operand_aliasing={")[2]
            for output, operand in re.findall(r"\{(\d*)\}: \((\d+), ", aliases):
                sizes[named[name][int(output or 0)]] = 0
                for buffer in used[int(operand)]:
                    named[name][int(output or 0)] = buffer
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
