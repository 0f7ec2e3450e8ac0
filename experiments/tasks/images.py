"""Classifiers of images: the task, and the experiments that compare on it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from examples.common.options import check_counts
from examples.common.resnet import ResNet
from experiments.common.report import report
from experiments.common.training import Batch, Run, Task, train_all
from experiments.data.images import Images, cifar, digits
from experiments.models.densenet import DenseNet
from optax_adamod import adamodw

# What the authors' release trains with, by any optimizer.
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
DECAY_AT = (1 / 2, 3 / 4)  # of the budget, where the learning rate falls to a tenth
ROWS = 20  # of a run's history
EVALUATED = 1000  # images at once

Creates = Callable[[Images, nnx.Rngs], nnx.Module]


class Size(NamedTuple):
    """What differs between a laptop and the paper."""

    epochs: int
    batch: int
    b3: float


SIZES = {"laptop": Size(40, 64, 0.99), "full": Size(300, 128, 0.999)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the experiments on images."""

    size: Literal["laptop", "full"] = "laptop"
    """Laptop: scikit-learn's digits, minutes on two cores. Full: the paper's size, on
    CIFAR, days on a GPU."""
    seeds: int = 3
    """How often to repeat everything."""
    data: str | None = None
    """At full size: folder or hub name of CIFAR's Parquet files."""
    output: Path = Path("outputs")
    """Folder for checkpoints and tables; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds")
        if self.data is not None and self.size == "laptop":
            raise ValueError("--data needs --size full; the digits are not loaded.")

    def images(self, classes: int) -> Images:
        return cifar(classes, self.data) if self.size == "full" else digits()


def resnet(blocks: Sequence[int], width: int) -> Creates:
    return lambda images, rngs: ResNet(
        blocks, width, images.channels, images.classes, rngs=rngs
    )


def densenet(blocks: Sequence[int], growth: int) -> Creates:
    return lambda images, rngs: DenseNet(
        blocks, growth, images.channels, images.classes, rngs=rngs
    )


def task_of(images: Images, model: Creates, steps: int, batch: int) -> Task:
    return Task(
        create_model=lambda rngs: model(images, rngs),
        loss=loss,
        batches=lambda seed: images.batches(seed, batch),
        steps=steps,
        row_every=max(1, steps // ROWS),
        evaluate=lambda model: {"test accuracy": accuracy(model, images)},
    )


def compare(
    name: str,
    images: Images,
    model: Creates,
    learning_rates: Mapping[str, Sequence[float]],
    options: Options,
) -> None:
    """Trains by SGD, AdamW or AdaMod at each of its learning rates, and reports."""
    epochs, batch, b3 = SIZES[options.size]
    task = task_of(images, model, epochs * len(images.train_images) // batch, batch)
    runs = [
        Run(
            optimizer if optimizer != "AdaMod" else f"AdaMod, b3 {b3:g}",
            transformation, rate, seed, b3 if optimizer == "AdaMod" else None,
        )
        for optimizer, rates in learning_rates.items()
        for rate in rates
        for transformation in [optimizers(rate, task.steps, b3)[optimizer]]
        for seed in range(options.seeds)
    ]  # fmt: skip
    output = options.output / f"{name}_{options.size}"
    settings = {"epochs": epochs, "batch": batch, "data": options.data}
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
