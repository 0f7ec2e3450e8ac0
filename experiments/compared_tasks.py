"""The tasks of the comparison that do not change on the way: text, words, digits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.common.resnet import ResNet
from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer
from experiments import image_classification, low_precision_tasks, translation
from experiments.comparison import GRID, Compared
from experiments.contestants import Schedule
from experiments.data.changes import Spans
from experiments.data.images import Images, digits
from experiments.data.text import batches
from experiments.data.translation import held_out_batches, laptop_pairs
from experiments.language_modelling import loss
from experiments.models.densenet import DenseNet
from experiments.models.pre_ln import PreTransformer
from experiments.training import Task

HEADS = 4
CONTEXT = 16
BATCH = 8
B2 = 0.98  # the usual one of Transformers
B2_OTHERS = 0.999  # the usual one elsewhere
UNITS = 8  # of the budget; a unit is 100 steps, 1 / (1 - b3) of b3 0.99
IMAGE_BATCH = 16
VOCABULARY = 2048
WORD_BATCH = 4
LOWER = (5e-4, *GRID)
LOWEST = (2.5e-4, 5e-4, *GRID[:-2])
WIDER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Size:
    """What makes all tasks smaller, for a trial or a test."""

    unit: int = 100
    """Steps of a unit, in which budgets, stretches and periods are counted."""
    width: int = 32
    """Features, a multiple of 4."""

    @property
    def row(self) -> int:
        """Steps from one row of a history to the next."""
        return max(1, self.unit // 4)

    def last(self, units: int) -> Spans:
        """Returns the last unit, which counts unless a task says otherwise."""
        return (((units - 1) * self.unit, units * self.unit),)


def byte_model(
    size: Size, depth: int, *, pre: bool = False, flax: bool = False
) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns what makes a language model, with scaled residuals unless ``flax``."""
    kind = PreTransformer if pre else Transformer
    variance = 1.0 if flax else None
    return lambda rngs: kind(depth, size.width, HEADS, CONTEXT, variance, rngs=rngs)


def transformer(
    size: Size, depth: int, rates: tuple[float, ...] = GRID, **kind: bool
) -> Compared:
    """Returns a Transformer on the bytes of Python's standard library."""
    text = load_text(FOLDER, at_least=BATCH * CONTEXT)
    task = Task(
        create_model=byte_model(size, depth, **kind),
        loss=loss,
        batches=lambda seed: batches(text, CONTEXT, seed, BATCH),
        steps=UNITS * size.unit,
        row_every=size.row,
    )
    return Compared(task, Schedule(B2), size.last(UNITS), rates=rates)


def rarely_evaluated(task: Task, size: Size) -> Task:
    """Returns the task with rows as often as those of others, evaluated at its end."""
    return dataclasses.replace(task, row_every=size.row, evaluate_every=task.steps)


def words(size: Size) -> Compared:
    """Returns a Transformer of 2 blocks on 2,048 words, most of which are rare."""
    steps = UNITS * size.unit
    task = low_precision_tasks.words(
        FOLDER, steps, size.width, WORD_BATCH, VOCABULARY
    ).task
    return Compared(
        rarely_evaluated(task, size), Schedule(B2), size.last(UNITS), "validation loss"
    )


def divided_twice(steps: int) -> Callable[[Any], Any]:
    """Returns the schedule of the experiments on images."""
    falls = {int(x * steps): 0.1 for x in image_classification.DECAY_AT}
    return optax.piecewise_constant_schedule(1.0, falls)


def images(size: Size, model: Callable[[Images, nnx.Rngs], nnx.Module]) -> Compared:
    """Returns a classifier of scikit-learn's digits; its learning rate falls twice."""
    steps = UNITS * size.unit
    found = digits()
    task = Task(
        create_model=lambda rngs: model(found, rngs),
        loss=image_classification.loss,
        batches=lambda seed: found.batches(seed, IMAGE_BATCH),
        steps=steps,
        row_every=size.row,
        evaluate=lambda model: {
            "test accuracy": image_classification.accuracy(model, found)
        },
        evaluate_every=steps,
    )
    schedule = Schedule(
        B2_OTHERS, divided_twice(steps), weight_decay=image_classification.WEIGHT_DECAY
    )
    return Compared(
        task, schedule, size.last(UNITS), "test accuracy", higher_is_better=True,
        rates=WIDER,
    )  # fmt: skip


def resnet(size: Size) -> Compared:
    return images(
        size,
        lambda found, rngs: ResNet(
            (1, 1, 1), 8, found.channels, found.classes, rngs=rngs
        ),
    )


def densenet(size: Size) -> Compared:
    return images(
        size,
        lambda found, rngs: DenseNet(
            (2, 2, 2), 8, found.channels, found.classes, rngs=rngs
        ),
    )


def translated(size: Size) -> Compared:
    """Returns a small translator of Babel's phrases, judged by its validation loss."""
    laptop = translation.SIZES["laptop"]
    laptop = dataclasses.replace(
        laptop,
        depth=2,
        width=size.width,
        hidden=2 * size.width,
        tokens=laptop.tokens // 4,
    )
    corpus = translation.tokenize(laptop_pairs(), laptop.vocabulary, laptop.lengths[-1])
    held_out = held_out_batches(corpus.validation, laptop.lengths, laptop.tokens)

    def evaluate(model: Any) -> dict[str, float]:
        model.eval()  # without dropout
        losses, tokens = np.transpose(
            [translation.held_out_loss(model, x) for x in held_out]
        )
        return {"validation loss": float(jnp.average(losses, weights=tokens))}

    steps = UNITS * size.unit
    task = translation.create_task(laptop, steps, corpus)
    task = dataclasses.replace(task, evaluate=evaluate)
    return Compared(
        rarely_evaluated(task, size),
        Schedule(B2, weight_decay=translation.WEIGHT_DECAY),
        size.last(UNITS),
        "validation loss",
    )


TASKS: dict[str, Callable[[Size], Compared]] = {
    "post_ln_6": lambda size: transformer(size, 6),
    "post_ln_12": lambda size: transformer(size, 12, LOWER),
    "post_ln_6_flax": lambda size: transformer(size, 6, LOWER, flax=True),
    "post_ln_12_flax": lambda size: transformer(size, 12, LOWEST, flax=True),
    "pre_ln_6": lambda size: transformer(size, 6, pre=True),
    "pre_ln_12": lambda size: transformer(size, 12, LOWER, pre=True),
    "words": words,
    "resnet": resnet,
    "densenet": densenet,
    "translation": translated,
}
