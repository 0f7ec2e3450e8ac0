"""Predicts time and memory of the update on 1 to 8,960 chips.

From compiled programs (``compiled.py``, whose results it reads): the bytes that an
update moves and that a chip holds for it, each a parameter. From the chips' makers:
bandwidth, memory and speed. Computed: all the rest.

    python -m benchmarks.scaling
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from benchmarks.common import report, trees
from benchmarks.common.optimizers import ADAM, ADAMOD, ADAMOD_BFLOAT16, ADAMOD_FLOAT8

COUNTS = (1, 8, 64, 256, 1024, 4096, 8960)
TOKENS = 2**22  # in a batch
EFFICIENCY = 0.4  # of the chip's speed that training reaches


class Chip(NamedTuple):
    """What its maker says of a chip, and which compiled program stands for it."""

    bandwidth: float  # bytes per second
    memory: float  # bytes
    speed: float  # bfloat16 operations per second
    largest: int  # chips in a pod, or in the largest cluster that is computed
    target: str
    chips: int


# https://cloud.google.com/tpu/docs/v5e and v5p; NVIDIA's data sheet of the H100 SXM.
CHIPS = {
    "v5e": Chip(819e9, 16e9, 197e12, 256, "v5e 16x16 (", 256),
    "v5p": Chip(2765e9, 95e9, 459e12, 8960, "v5p 8x8x8 (", 512),
    "H100": Chip(3352e9, 80e9, 989e12, 8960, "H100 (", 1),
}


def compiled_bytes(chip: Chip) -> dict[str, tuple[float, float]]:
    """Returns bytes moved and bytes held, each a parameter, by optimizer."""
    tables = json.loads((report.RESULTS / "compiled.json").read_text())["tables"]
    parameters = trees.size(trees.one_leaf(8192, 8192))
    (rows,) = (
        rows
        for title, rows in tables.items()
        if title.startswith(chip.target) and f": {parameters:,} parameters" in title
    )
    held = 1e6 * chip.chips / parameters

    def between(row: dict[str, Any]) -> float:
        """Returns what a kernel of 8 bits writes, or leaves, for XLA to read."""
        if row["optimizer"] != ADAMOD_FLOAT8:
            return 0
        # The new codes on a GPU, and the update in float32 on a TPU.
        return row["state"] if chip.chips == 1 else 2 * 4

    return {
        row["optimizer"]: (
            row["in"] + row["out"] + between(row),
            held * row["held, MB"],
        )
        for row in rows
        if row.get("axes") != "auto"
    }


def table(chip: Chip, parameters: int) -> list[dict[str, Any]]:
    """Returns a row for each number of chips whose memory is enough."""
    rows = []
    for chips in COUNTS:
        row: dict[str, Any] = {"chips": chips}
        training = 6 * parameters * TOKENS / (EFFICIENCY * chip.speed * chips)
        for optimizer in (ADAM, ADAMOD, ADAMOD_BFLOAT16, ADAMOD_FLOAT8):
            moved, held = compiled_bytes(chip)[optimizer]
            seconds = moved * parameters / chips / chip.bandwidth
            fits = held * parameters / chips < chip.memory
            row[f"{optimizer}: GB a chip"] = held * parameters / chips / 1e9
            row[f"{optimizer}: ms"] = 1e3 * seconds if fits else None
            share = 100 * seconds / (seconds + training)
            row[f"{optimizer}: % of a step"] = share if fits else None
        if chips <= chip.largest and row[f"{ADAMOD_FLOAT8}: ms"] is not None:
            rows.append(row)
    return rows


def main(output: Path = report.RESULTS) -> None:
    """Writes a table for each chip and model.

    Args:
      output: Folder of the results.
    """
    tables = {}
    for name, chip in CHIPS.items():
        for model in ("8B", "70B", "405B"):
            parameters = trees.size(trees.llama3(model))
            if rows := table(chip, parameters):
                tables[f"{name}, Llama 3 {model}"] = rows
    notes = (
        "Bytes a parameter come from compiled programs (`compiled.md`, 8192 x 8192). "
        "Computed from them: GB a chip (float32 parameters, gradients and state, split "
        "evenly over all chips), ms (bytes moved over the published bandwidth, which "
        "no program quite reaches) and the share of a step that trains on "
        f"{TOKENS:,} tokens in 6 operations a parameter and token at "
        f"{EFFICIENCY:.0%} of the published speed. Nothing in these tables was timed. "
        "An empty cell does not fit in the chip's memory, activations not counted.",
    )
    print(report.save("scaling", tables, output, notes=notes))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
