"""A Transformer on the most common words of Python's standard library."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.common.stdlib_text import FOLDER
from examples.common.transformer import Transformer, next_token_losses
from experiments.common.training import Task
from experiments.data.text import batches
from experiments.data.words import Words, load_words
from experiments.tasks.text import loss

HEADS = 1  # so that a head has the width, of which 8 bits need a multiple of 128
CONTEXT = 32
VALIDATED = 64  # windows at once
VALIDATIONS = 24  # so many times, spread over the text


def words(steps: int, width: int, batch: int, vocabulary: int) -> Task:
    """Returns two blocks on the most common words, and one word for all others.

    Most embeddings have no gradient in most steps.
    """
    found = load_words(FOLDER, CONTEXT + 1, vocabulary)
    return Task(
        create_model=lambda rngs: Transformer(
            2, width, HEADS, CONTEXT, vocabulary=vocabulary, rngs=rngs
        ),
        loss=loss,
        batches=lambda seed: batches(found.train, CONTEXT, seed, batch),
        steps=steps,
        row_every=max(1, steps // 2),
        evaluate=lambda model: {"validation loss": validate(model, found, CONTEXT)},
    )


@nnx.jit
def losses_of(model: nnx.Module, windows: jax.Array) -> jax.Array:
    return next_token_losses(model, windows)


def validate(model: nnx.Module, words: Words, context: int) -> float:
    """Returns the mean loss of windows that are spread over the validation text."""
    starts = np.linspace(
        0, len(words.validation) - context - 1, VALIDATED * VALIDATIONS, dtype=int
    )
    windows = words.validation[starts[:, None] + np.arange(context + 1)]
    parts = [losses_of(model, jnp.asarray(x)) for x in np.split(windows, VALIDATIONS)]
    return float(np.mean(np.concatenate(parts)))
