"""Do ReLU units that sleep go on training, and how far do they move when they wake?

The ResNet of ``robustness`` on digits, in batches so small that at a large learning
rate most units are off in most steps, by Adam, AdaMod, and variants of AdaMod that
treat sleeping coordinates differently (:mod:`experiments.lazy_bounds`):

    python -m experiments.sleeping_units
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.options import check_counts, check_decays, check_rates
from examples.common.resnet import ResNet
from experiments import waking
from experiments.command import command
from experiments.data.images import digits
from experiments.image_classification import accuracy, loss
from experiments.report import final_table, report
from experiments.sleeping import runs_of
from experiments.training import History, Task, train_all

ROWS = 5  # of a run's history
BLOCKS, WIDTH = (1, 1, 1), 8
ASLEEP = "share of coordinates asleep"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares what AdaMod may do with sleeping units."""

    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    """Learning rates, constant."""
    seeds: int = 3
    """How often to repeat everything, from other weights and on other batches."""
    steps: int = 4000
    """Training steps of each run: 40 horizons of b3 0.99, 22 epochs of batches of 8."""
    warmup: int = 300
    """Steps of Adam's linear warm-up."""
    b2: float = 0.999
    """Decay rate of the second moment, of all optimizers."""
    b3: float = 0.99
    """AdaMod's b3; its bound opens over about 1 / (1 - b3) steps."""
    batch: int = 8
    """Images in a batch."""
    output: Path = Path("outputs/sleeping_units")
    """Folder for checkpoints, tables and figures; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "steps", "warmup", "batch")
        check_rates(self)
        check_decays(self, "b2", "b3")


def everything(tree: Any) -> jax.Array:
    """Returns all coordinates of a tree, one after the other."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def main(options: Options) -> History:
    images = digits()

    def create_model(rngs: nnx.Rngs) -> ResNet:
        return ResNet(BLOCKS, WIDTH, images.channels, images.classes, rngs=rngs)

    size = everything(nnx.state(create_model(nnx.Rngs(0)), nnx.Param)).size
    task = Task(
        create_model=create_model,
        loss=loss,
        batches=lambda seed: images.batches(seed, options.batch),
        steps=options.steps,
        row_every=max(1, options.steps // ROWS),
        evaluate=lambda model: {"test accuracy": accuracy(model, images)},
        record=waking.recorded,
    )
    runs = runs_of(options, everything, size)
    settings = dataclasses.asdict(options)
    for name in ("rates", "seeds", "output"):
        del settings[name]
    history = train_all(task, runs, options.output / "runs", settings)
    history = {
        run: [row | {ASLEEP: waking.asleep(row, size)} for row in rows]
        for run, rows in history.items()
    }
    tables = [final_table(history, ASLEEP, 1), waking.updates_table(history)]
    report(
        "sleeping_units", history, "test accuracy", options.output,
        extra=tables if options.steps >= waking.FIRST else [],
    )  # fmt: skip
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
