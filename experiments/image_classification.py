"""What the experiments on images share: options, optimizers, loss and accuracy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
from flax import nnx

from examples.common.options import check_counts
from experiments.data.images import Images
from experiments.report import report
from experiments.training import Batch, Run, Task, train_all
from optax_adamod import adamodw

# What the authors' release trains with, by any optimizer.
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
DECAY_AT = (1 / 2, 3 / 4)  # of the budget, where the learning rate falls to a tenth
ROWS = 20  # of a run's history
EVALUATED = 1000  # images at once

SIZES = {
    "laptop": {"epochs": 40, "batch": 64, "b3": 0.99},
    "full": {"epochs": 300, "batch": 128, "b3": 0.999},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the experiments on images."""

    size: Literal["laptop", "full"] = "laptop"
    """Laptop: scikit-learn's digits, minutes on two cores. Full: the paper's size, on
    CIFAR, days on a GPU."""
    epochs: int | None = None
    """Training epochs of each run; by default 40 or, at full size, 300."""
    b3: float | None = None
    """AdaMod's b3; by default 0.99 or, at full size, 0.999."""
    seeds: int = 3
    """How often to repeat everything."""
    data: str | None = None
    """At full size: folder or hub name of CIFAR's Parquet files."""
    output: Path = Path("outputs")
    """Folder for checkpoints, tables and figures; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        for name, value in SIZES[self.size].items():
            if getattr(self, name, 0) is None:
                object.__setattr__(self, name, value)
        check_counts(self, "epochs", "seeds")
        if self.b3 is None or not 0 <= self.b3 < 1:
            raise ValueError(f"--b3 must be in [0, 1), got {self.b3}.")
        if self.data is not None and self.size == "laptop":
            raise ValueError("--data needs --size full; the digits are not loaded.")


def compare(
    name: str,
    images: Images,
    create_model: Callable[[nnx.Rngs], nnx.Module],
    learning_rates: Mapping[str, Sequence[float]],
    options: Options,
) -> None:
    """Trains by every optimizer at each of its learning rates, and reports.

    Args:
      name: Name of the experiment.
      images: What is classified.
      create_model: Makes the classifier.
      learning_rates: By optimizer: SGD, AdamW or AdaMod.
      options: The options.
    """
    assert options.epochs is not None
    assert options.b3 is not None
    batch = SIZES[options.size]["batch"]
    steps = options.epochs * len(images.train_images) // batch
    task = Task(
        create_model=create_model,
        loss=loss,
        batches=lambda seed: images.batches(seed, batch),
        steps=steps,
        row_every=max(1, steps // ROWS),
        evaluate=lambda model: {"test accuracy": accuracy(model, images)},
    )
    runs = [
        Run(
            optimizer if optimizer != "AdaMod" else f"AdaMod, b3 {options.b3:g}",
            transformation, rate, seed, options.b3 if optimizer == "AdaMod" else None,
        )
        for optimizer, rates in learning_rates.items()
        for rate in rates
        for transformation in [optimizers(rate, steps, options.b3)[optimizer]]
        for seed in range(options.seeds)
    ]  # fmt: skip
    output = options.output / f"{name}_{options.size}"
    settings = {"epochs": options.epochs, "batch": batch, "data": options.data}
    history = train_all(task, runs, output / "runs", settings)
    report(name, history, "test accuracy", output)


def optimizers(
    learning_rate: float, steps: int, b3: float
) -> dict[str, optax.GradientTransformation]:
    """Returns the authors' optimizers: decoupled decay for all but SGD."""
    schedule = optax.piecewise_constant_schedule(
        learning_rate, {max(1, int(part * steps)): 0.1 for part in DECAY_AT}
    )
    return {
        "SGD": optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.sgd(schedule, momentum=MOMENTUM),
        ),
        "AdamW": optax.adamw(schedule, weight_decay=WEIGHT_DECAY),
        "AdaMod": adamodw(schedule, b3=b3, weight_decay=WEIGHT_DECAY),
    }


def loss(model: nnx.Module, batch: Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        model(batch["image"]), batch["label"]
    ).mean()


@nnx.jit
def predict(model: nnx.Module, images: jax.typing.ArrayLike) -> jax.Array:
    return model(images).argmax(axis=-1)


def accuracy(model: nnx.Module, images: Images) -> float:
    """Returns the share of the test images that the model classifies right."""
    model.eval()
    parts = range(0, len(images.test_images), EVALUATED)
    predicted = [predict(model, images.test_images[i : i + EVALUATED]) for i in parts]
    return float(np.mean(np.concatenate(predicted) == images.test_labels))
