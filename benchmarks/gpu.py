"""All that a GPU is asked, in one command of nine minutes, without a network.

The suite, whole updates of large models, training steps of GPT-2 small and, with the
time that is left, the experiment at scale: each in a process of its own, which is
stopped at its limit, and writes its results as it goes.

    pip install -e '.[test,experiments]' --group bench && python -m benchmarks.gpu
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import report
from benchmarks.common.optimizers import (
    ADAMOD,
    ADAMOD_7_BYTES,
    ADAMOD_FLOAT8,
    FLASH,
    OPTIMIZERS,
)
from benchmarks.common.torch_optimizers import NAMES

ROOT = Path(__file__).parents[1]
STORAGES = [
    x for x in OPTIMIZERS if x.startswith(("Adam", ADAMOD))
]  # of Adam and AdaMod
LINES = 20  # of what a part that fails has said


@dataclasses.dataclass(frozen=True)
class Options:
    """Tests and measures on the device at hand, part by part."""

    minutes: float = 9
    """What all parts take together, at most."""
    output: Path = report.RESULTS / "gpu"
    """Folder for the results, and for what each part prints."""
    small: bool = False
    """Make all parts small, for a trial on a CPU."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"--minutes must be positive, got {self.minutes}.")


@dataclasses.dataclass(frozen=True)
class Part:
    """A command: a module and its arguments, and its share of the budget at most."""

    name: str
    command: tuple[str, ...]
    share: float = 1.0


def parts(options: Options) -> list[Part]:
    """Returns the parts in their order; the last has the time that is left."""
    output = ("--output", str(options.output))
    scale = (
        "--minutes",
        f"{options.minutes:g}",
        "--output",
        f"{options.output}/at_scale",
    )
    if options.small:
        size = {"steps": 2, "depth": 1, "width": 8, "context": 8, "batch": 2}
        sizes = [x for k, v in size.items() for x in (f"--size.{k}", str(v))]
        tests = ("tests/test_conversions.py", "-n", "0")
        updates = ("--small", "--rounds", "2", "--optimizers", ADAMOD)
        steps = ("--models", "GPT-2 tiny", "--rounds", "2", "--batch", "2")
        steps += ("--optimizers", ADAMOD)
        scale += (
            "--optimizers", "AdaMod", "--rates", "1e-3", *sizes,
            "--size.text", "100000", "--text", str(ROOT / "experiments"),
        )  # fmt: skip
    else:
        tests = ("tests",)
        updates = ("--rounds", "15", "--optimizers", *STORAGES, *FLASH, *NAMES)
        steps = ("--models", "GPT-2 small", "Transformer", "--batch", "8")
        steps += ("--optimizers", ADAMOD, ADAMOD_FLOAT8, ADAMOD_7_BYTES)
    large = ("--cases", "large", "--apart", "--name", "updates")
    return [
        Part("tests", ("pytest", "-q", *tests), 0.3),
        Part("updates", ("benchmarks.step_time", *large, *updates, *output), 0.6),
        Part("steps", ("benchmarks.train_step", *steps, *output), 0.3),
        Part("at_scale", ("experiments.at_scale", *scale)),
    ]


def run(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Runs a part, for so many seconds at most; returns a row of the table."""
    environment = os.environ | {
        # Several processes share the GPU, and PyTorch in one of them.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    start = time.monotonic()
    with (folder / f"{part.name}.txt").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command], cwd=ROOT, env=environment,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            result = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            result = "stopped at its limit"
        finally:  # with all processes that it has started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    return {"part": part.name, "result": result, "seconds": seconds, "limit, s": limit}


def tail(part: str, folder: Path) -> str:
    """Returns the last lines that a part has printed, without its progress bars."""
    printed = (folder / f"{part}.txt").read_text(errors="replace")
    lines = [x.rpartition("\r")[2] for x in printed.split("\n")]
    return "\n".join(lines[-LINES:]).strip()


def main(options: Options) -> list[dict[str, Any]]:
    """Returns a row for each part."""
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options = dataclasses.replace(options, output=folder)
    end = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    text = ""
    for part in parts(options):
        left = end - time.monotonic()
        if left <= 0:
            row = {"part": part.name, "result": "no time left"}
            row |= {"seconds": 0.0, "limit, s": 0.0}
        else:
            print(f"{part.name}: {' '.join(part.command)}", flush=True)
            row = run(part, min(left, 60 * options.minutes * part.share), folder)
        rows.append(row)
        notes = tuple(
            f"What {x['part']} printed last:\n\n```\n{tail(x['part'], folder)}\n```"
            for x in rows
            if x["result"].startswith("failed")
        )
        text = report.save("gpu", {"Parts": rows}, folder, notes=notes)
        print(f"{row['part']}: {row['result']}, {row['seconds']:.0f} s", flush=True)
    print(text)
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
