"""What is trained with averages in few bits: most dimensions are multiples of 128."""

import dataclasses
from collections.abc import Callable

from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer
from experiments.common.training import Task
from experiments.data.text import batches
from experiments.tasks import images, translation
from experiments.tasks.text import loss
from experiments.tasks.words import CONTEXT, HEADS, words

BATCH = 16
WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Trained:
    """A task, and how it is reported.

    Attributes:
      create: Makes the task, of so many steps.
      steps: Of each run, by default.
      metric: The column that counts.
      rows: The last rows of which a final value is the mean.
    """

    create: Callable[[int], Task]
    steps: int
    metric: str
    rows: int = 1


def text(steps: int) -> Task:
    """Returns the bytes of Python's standard library, and a Post-LN Transformer."""
    tokens = load_text(FOLDER, at_least=BATCH * CONTEXT)
    return Task(
        create_model=lambda rngs: Transformer(2, WIDTH, HEADS, CONTEXT, rngs=rngs),
        loss=loss,
        batches=lambda seed: batches(tokens, CONTEXT, seed, BATCH),
        steps=steps,
        row_every=min(20, steps),
    )


def digits(steps: int) -> Task:
    """Returns scikit-learn's digits, and a ResNet of one stage."""
    task = images.task_of(images.digits(), images.resnet((1,), WIDTH), steps, BATCH)
    return dataclasses.replace(task, row_every=max(1, steps // 2))


def translated(steps: int) -> Task:
    """Returns Babel's phrases, from German to English."""
    size = dataclasses.replace(
        translation.SIZES["laptop"], depth=2, width=WIDTH, hidden=2 * WIDTH,
        heads=HEADS, vocabulary=1024, steps=steps, row_every=steps,
    )  # fmt: skip
    return translation.task_of(size, with_bleu=False)


TASKS = {
    "text": Trained(text, 3000, "loss", rows=5),
    "words": Trained(
        lambda steps: words(steps, WIDTH, BATCH, 4096), 600, "validation loss"
    ),
    "digits": Trained(digits, 600, "test accuracy"),
    "translation": Trained(translated, 600, "validation loss"),
}
