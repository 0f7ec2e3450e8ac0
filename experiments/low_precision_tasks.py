"""What is trained with averages in few bits: most dimensions are multiples of 128."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from examples.common.resnet import ResNet
from examples.common.stdlib_text import load_text
from examples.common.transformer import Transformer
from experiments import image_classification, translation
from experiments.data.images import digits
from experiments.data.text import batches
from experiments.data.translation import held_out_batches, laptop_pairs
from experiments.data.words import Words, load_words
from experiments.language_modelling import loss
from experiments.models.translator import Translator
from experiments.sleeping_words import validate
from experiments.training import Task

CONTEXT = 32
BATCH = 16
VOCABULARY = 4096
HEADS = 1  # so that a head has the width, a multiple of 128


@dataclasses.dataclass(frozen=True)
class Trained:
    """A task, and how it is reported.

    Attributes:
      task: The task.
      metric: The column that counts.
      rows: The last rows of which a final value is the mean.
    """

    task: Task
    metric: str
    rows: int = 1


def text(folder: Path, steps: int, width: int) -> Trained:
    """Returns the bytes of Python's standard library, and a Post-LN Transformer."""
    tokens = load_text(folder, at_least=BATCH * CONTEXT)
    task = Task(
        create_model=lambda rngs: Transformer(2, width, HEADS, CONTEXT, rngs=rngs),
        loss=loss,
        batches=lambda seed: batches(tokens, CONTEXT, seed, BATCH),
        steps=steps,
        row_every=min(20, steps),
    )
    return Trained(task, "loss", rows=5)


def words(
    folder: Path,
    steps: int,
    width: int,
    batch: int = BATCH,
    vocabulary: int = VOCABULARY,
) -> Trained:
    """Returns the most common words, and one for all others, to a Transformer.

    Most embeddings sleep in most steps.
    """
    found = load_words(folder, at_least=CONTEXT + 1)
    found = Words(
        found.vocabulary[:vocabulary],
        np.minimum(found.train, vocabulary - 1),
        np.minimum(found.validation, vocabulary - 1),
    )
    task = Task(
        create_model=lambda rngs: Transformer(
            2, width, HEADS, CONTEXT, vocabulary=vocabulary, rngs=rngs
        ),
        loss=loss,
        batches=lambda seed: batches(found.train, CONTEXT, seed, batch),
        steps=steps,
        row_every=max(1, steps // 2),
        evaluate=lambda model: {
            "validation loss": validate(model, found, CONTEXT, batch)["validation loss"]
        },
    )
    return Trained(task, "validation loss")


def images(folder: Path, steps: int, width: int) -> Trained:
    """Returns scikit-learn's digits, and a ResNet of one stage."""
    del folder
    found = digits()
    task = Task(
        create_model=lambda rngs: ResNet(
            (1,), width, found.channels, found.classes, rngs=rngs
        ),
        loss=image_classification.loss,
        batches=lambda seed: found.batches(seed, BATCH),
        steps=steps,
        row_every=max(1, steps // 2),
        evaluate=lambda model: {
            "test accuracy": image_classification.accuracy(model, found)
        },
    )
    return Trained(task, "test accuracy")


def translated(folder: Path, steps: int, width: int) -> Trained:
    """Returns Babel's phrases, from German to English."""
    del folder
    size = dataclasses.replace(
        translation.SIZES["laptop"],
        depth=2,
        width=width,
        hidden=2 * width,
        heads=HEADS,
        vocabulary=1024,
        row_every=steps,
    )
    corpus = translation.tokenize(laptop_pairs(), size.vocabulary, size.lengths[-1])
    held_out = held_out_batches(corpus.validation, size.lengths, size.tokens)

    def evaluate(model: nnx.Module) -> dict[str, float]:
        assert isinstance(model, Translator)
        model.eval()  # without dropout
        parts = [translation.held_out_loss(model, batch) for batch in held_out]
        losses, tokens = np.transpose(parts)
        return {"validation loss": float(np.average(losses, weights=tokens))}

    task = translation.create_task(size, steps, corpus)
    # Without BLEU, whose beam search takes longer than the training.
    return Trained(dataclasses.replace(task, evaluate=evaluate), "validation loss")


TASKS: dict[str, tuple[Callable[[Path, int, int], Trained], int]] = {
    "text": (text, 3000),
    "words": (words, 600),
    "digits": (images, 600),
    "translation": (translated, 600),
}  # each with its steps
