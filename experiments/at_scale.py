"""AdaMod beside Adam and its warm-ups at a scale that counts, for one GPU.

A Post-LN Transformer of 38 million parameters on the source of the Python packages that
are installed, with matrices multiplied in bfloat16:

    python -m experiments.at_scale

Runs are rows of one file. A command that was stopped goes on, in the middle of a run
too, and trains what is missing.
"""

import csv
import dataclasses
import datetime
import math
import shutil
import statistics
import sysconfig
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from examples.common.options import check_counts, check_heads, check_rates
from examples.common.results import machine, table, versions
from examples.common.stdlib_text import load_text
from examples.common.transformer import Transformer, next_token_losses
from experiments.common import contestants
from experiments.common.command import command
from experiments.common.contestants import (
    B1,
    B3,
    EPS,
    TUNED,
    Contestant,
    Schedule,
    at_rate,
    create,
)
from experiments.common.report import PACKAGES, spread
from experiments.common.training import (
    Run,
    Task,
    check_settings,
    in_bfloat16,
    path_of,
    train,
)
from experiments.data.text import batches
from experiments.tasks.text import loss
from optax_adamod import round_updates_stochastically, scale_by_adamod

HEADS = 4  # so that heads have 128 features, which averages in 8 bits need
B2 = 0.98  # the usual one of Transformers
PACKAGES_FOLDER = Path(sysconfig.get_path("purelib"))
BLOCK = 2**14  # bytes in a row, all of them to train or all to validate
HELD_OUT = 20  # of so many blocks, one
VALIDATIONS = 8  # batches
ROWS = 10  # of a run's history


@dataclasses.dataclass(frozen=True)
class Size:
    """What makes it smaller, for a trial or a test."""

    steps: int = 1000
    """Training steps of a run."""
    depth: int = 12
    """Transformer blocks."""
    width: int = 512
    """Features, a multiple of 4; averages in 8 bits need one of 512."""
    context: int = 512
    """Bytes that the model sees."""
    batch: int = 64
    """Windows of text in a batch."""
    text: int = 2**27
    """Bytes of text, at most."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares AdaMod with Adam and its warm-ups at 38 million parameters."""

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates of every optimizer."""
    seeds: int = 1
    """How often to repeat everything."""
    optimizers: tuple[str, ...] = ()
    """Which optimizers, by default all."""
    minutes: float = math.inf
    """After so long no more run begins; the report is of what is finished."""
    size: Size = dataclasses.field(default_factory=Size)
    text: Path = PACKAGES_FOLDER
    """Folder whose .py files, and those of its folders, are the text."""
    output: Path = Path("experiments/results/at_scale")
    """Folder for runs, checkpoints of one that was stopped, and the table."""

    def __post_init__(self) -> None:
        check_rates(self)
        check_counts(self, "seeds")
        check_counts(self.size, "steps", "depth", "width", "context", "batch", "text")
        check_heads(self.size, HEADS)
        if unknown := set(self.optimizers) - set(OPTIMIZERS):
            raise ValueError(
                f"--optimizers: {sorted(unknown)} unknown; there are {[*OPTIMIZERS]}."
            )


class Key(NamedTuple):
    """Which run: a row of the file without what came out."""

    optimizer: str
    learning_rate: float
    seed: int


Losses = dict[Key, float]


def adamod(**dtypes: Any) -> Contestant:
    return Contestant(
        lambda b2, learning_rate: scale_by_adamod(
            B1, b2, B3, EPS, bound_learning_rate=learning_rate, **dtypes
        ),
        b3=B3,
    )


FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}
SEVEN_BYTES = "AdaMod, 7 bytes"
# The most telling first, for they are trained in this order.
OPTIMIZERS = {
    "AdaMod": adamod(),
    "Adam, exponential warm-up": Contestant(
        contestants.adam, contestants.exponential(B3)
    ),
    "Adam, linear warm-up over 2/(1-b2)": Contestant(
        contestants.adam, contestants.untuned_linear
    ),
    "AdaMod, 8 bits": adamod(**FLOAT8),
    SEVEN_BYTES: adamod(**FLOAT8),
    "Adam": Contestant(contestants.adam),
    "RAdam": Contestant(contestants.radam),
    **{
        f"Adam, linear warm-up over {steps}": Contestant(
            contestants.adam, contestants.linear(steps), tuned=True
        )
        for steps in TUNED
    },
}


def split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text to train on and that to validate on, blocks of one text."""
    block = min(BLOCK, max(1, len(text) // HELD_OUT))
    held_out = np.arange(len(text)) // block % HELD_OUT == HELD_OUT - 1
    return text[~held_out], text[held_out]


@nnx.jit
def mean_loss(model: nnx.Module, windows: Any) -> Any:
    return next_token_losses(model, windows).mean()


def create_task(size: Size, text: np.ndarray) -> Task:
    """Returns the task: the same model, batches and evaluation for all optimizers."""
    training, validation = split(text)
    count = VALIDATIONS * size.batch
    starts = np.linspace(0, len(validation) - size.context - 1, count, dtype=int)
    windows = validation[starts[:, None] + np.arange(size.context + 1)]
    held_out = np.split(windows.astype(np.int32), VALIDATIONS)

    def evaluate(model: nnx.Module) -> dict[str, float]:
        losses = [float(mean_loss(model, jnp.asarray(x))) for x in held_out]
        return {"validation loss": statistics.fmean(losses)}

    return Task(
        create_model=lambda rngs: Transformer(
            size.depth, size.width, HEADS, size.context, dtype=jnp.bfloat16, rngs=rngs
        ),
        loss=loss,
        batches=lambda seed: batches(training, size.context, seed, size.batch),
        steps=size.steps,
        row_every=max(1, size.steps // ROWS),
        evaluate=evaluate,
        evaluate_every=size.steps,
    )


def read(path: Path) -> Losses:
    """Returns the validation loss of every run in the file, NaN of what diverged."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            Key(x["optimizer"], float(x["learning_rate"]), int(x["seed"])):
            float(x["validation loss"])
            for x in csv.DictReader(file)
        }  # fmt: skip


def add(path: Path, key: Key, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow([*Key._fields, "validation loss", "loss", "seconds"])
        found = (row.get("validation loss", math.nan), row["loss"], row["seconds"])
        writer.writerow([*key, *(f"{x:.5g}" for x in found)])


def missing(options: Options, losses: Losses) -> list[Key]:
    """Returns the runs that no row has, seed by seed."""
    keys = [
        Key(optimizer, rate, seed)
        for seed in range(options.seeds)
        for optimizer in options.optimizers or OPTIMIZERS
        for rate in options.rates
    ]
    return [key for key in keys if key not in losses]


def main(options: Options) -> Losses:
    options.output.mkdir(parents=True, exist_ok=True)
    size = options.size
    least = HELD_OUT * (size.context + 2)
    text = load_text(options.text, least, "**/*.py")[: size.text]
    settings = dataclasses.asdict(size) | {
        "text": len(text),
        "crc": zlib.crc32(text.tobytes()),
    }
    check_settings(options.output / "settings.json", settings)
    path, runs = options.output / "at_scale.csv", options.output / "runs"
    task = create_task(size, text)
    narrow = in_bfloat16(task)
    creates = {name: create(x, Schedule(B2)) for name, x in OPTIMIZERS.items()}
    creates[SEVEN_BYTES] = rounded(creates[SEVEN_BYTES])
    wanted = missing(options, read(path))
    with tqdm(total=len(wanted) * size.steps, unit="step", mininterval=5) as progress:
        for key in wanted:
            if progress.format_dict["elapsed"] > 60 * options.minutes:
                break
            tx = at_rate(creates[key.optimizer], key.learning_rate)
            run = Run(key.optimizer, tx, key.learning_rate, key.seed)
            of = narrow if key.optimizer == SEVEN_BYTES else task
            rows = train(of, run, runs, progress)
            add(path, key, rows[-1])
            shutil.rmtree(path_of(run, runs))  # gigabytes, if all were kept
    losses = read(path)
    report(losses, text, options)
    return losses


def rounded(creates: contestants.Creates) -> contestants.Creates:
    return lambda learning_rate: optax.chain(
        creates(learning_rate), round_updates_stochastically()
    )


def report(losses: Losses, text: np.ndarray, options: Options) -> None:
    """Writes and prints the validation losses of all optimizers and rates."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    used = ", ".join(f"{key} {value}" for key, value in versions(PACKAGES).items())
    rates = sorted({key.learning_rate for key in losses})
    rows, tuned = [], []
    for optimizer, contestant in OPTIMIZERS.items():
        by_rate = {
            rate: [x for key, x in losses.items() if key[:2] == (optimizer, rate)]
            for rate in rates
        }
        if not any(by_rate.values()):
            continue
        finite = [x for x in map(mean, by_rate.values()) if x == x]
        best = min(finite, default=math.nan)
        tuned += [best] if contestant.tuned and finite else []
        shown = {f"lr {r:g}": spread(x) if x else "" for r, x in by_rate.items()}
        rows.append({"optimizer": optimizer, "best": f"{best:.3f}", **shown})
    if not rows:
        return
    parts = [
        "# at_scale",
        f"`python -m experiments.at_scale`, {today}; {machine()}; {used}.",
        f"Validation loss in nats per byte after {options.size.steps:,} steps, on "
        f"{len(text):,} bytes of text. Best: the mean at the best learning rate.",
        table(rows),
    ]
    if tuned:
        parts.append(f"Adam under the tuned linear warm-up: {min(tuned):.3f}.")
    page = "\n\n".join(parts) + "\n"
    (options.output / "at_scale.md").write_text(page)
    print(f"\n{page}")


def mean(values: list[float]) -> float:
    """Returns the mean, NaN if there is none or one diverged."""
    return statistics.fmean(values) if values else math.nan


if __name__ == "__main__":
    command(main, Options, __doc__)
