"""The tasks of the comparison that do not change on the way: text, words, digits."""

import dataclasses
from collections.abc import Callable

import optax

from experiments.common.comparison import GRID, Compared, Spans
from experiments.common.contestants import Schedule
from experiments.common.training import Task
from experiments.tasks import images, text, translation
from experiments.tasks.words import words

BATCH = 8
B2 = text.B2
B2_OTHERS = 0.999  # the usual one elsewhere
UNITS = 8  # of the budget; a unit is 100 steps, 1 / (1 - b3) of b3 0.99
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

    @property
    def steps(self) -> int:
        return UNITS * self.unit

    @property
    def last(self) -> Spans:
        """The last unit, which counts unless a task says otherwise."""
        return ((self.steps - self.unit, self.steps),)


def transformer(
    size: Size,
    depth: int,
    rates: tuple[float, ...] = GRID,
    *,
    pre: bool = False,
    flax: bool = False,
) -> Compared:
    """Returns a Transformer on bytes, with scaled residuals unless ``flax``."""
    model = text.model_of(depth, size.width, pre=pre, variance=1.0 if flax else None)
    task = text.task_of(model, size.steps, size.row, BATCH)
    return Compared(task, Schedule(B2), size.last, rates=rates)


def rarely_evaluated(task: Task, size: Size) -> Task:
    """Returns the task with rows as often as those of others, evaluated at its end."""
    return dataclasses.replace(task, row_every=size.row, evaluate_every=task.steps)


def common_words(size: Size) -> Compared:
    """Returns a Transformer of 2 blocks on 2,048 words, most of which are rare."""
    task = words(size.steps, size.width, batch=4, vocabulary=2048)
    return Compared(
        rarely_evaluated(task, size), Schedule(B2), size.last, "validation loss"
    )


def digits(size: Size, model: images.Creates) -> Compared:
    """Returns a classifier of scikit-learn's digits; its learning rate falls twice."""
    task = images.task_of(images.digits(), model, size.steps, batch=16)
    falls = {int(x * size.steps): 0.1 for x in images.DECAY_AT}
    schedule = Schedule(
        B2_OTHERS, optax.piecewise_constant_schedule(1.0, falls),
        weight_decay=images.WEIGHT_DECAY,
    )  # fmt: skip
    return Compared(
        rarely_evaluated(task, size), schedule, size.last, "test accuracy",
        higher_is_better=True, rates=WIDER,
    )  # fmt: skip


def translated(size: Size) -> Compared:
    """Returns a small translator of Babel's phrases, judged by its validation loss."""
    laptop = translation.SIZES["laptop"]
    small = dataclasses.replace(
        laptop, depth=2, width=size.width, hidden=2 * size.width, steps=size.steps,
        tokens=laptop.tokens // 4,
    )  # fmt: skip
    return Compared(
        rarely_evaluated(translation.task_of(small, with_bleu=False), size),
        Schedule(B2, weight_decay=translation.WEIGHT_DECAY),
        size.last,
        "validation loss",
    )


TASKS: dict[str, Callable[[Size], Compared]] = {
    "post_ln_6": lambda size: transformer(size, 6),
    "post_ln_12": lambda size: transformer(size, 12, LOWER),
    "post_ln_6_flax": lambda size: transformer(size, 6, LOWER, flax=True),
    "post_ln_12_flax": lambda size: transformer(size, 12, LOWEST, flax=True),
    "pre_ln_6": lambda size: transformer(size, 6, pre=True),
    "pre_ln_12": lambda size: transformer(size, 12, LOWER, pre=True),
    "words": common_words,
    "resnet": lambda size: digits(size, images.resnet((1, 1, 1), 8)),
    "densenet": lambda size: digits(size, images.densenet((2, 2, 2), 8)),
    "translation": translated,
}
