"""Language models of bytes: of Python's standard library, and of C's headers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer, next_token_losses
from experiments.common.training import Batch, Batches, Task
from experiments.data.text import batches
from experiments.models.pre_ln import PreTransformer

B2 = 0.98  # the usual one of Transformers
HEADS = 4
CONTEXT = 16
HEADERS = Path(np.get_include())  # in C; they come with NumPy, and so with JAX


def loss(model: nnx.Module, batch: Batch) -> jax.Array:
    return next_token_losses(model, jnp.asarray(batch["tokens"])).mean()


def python_text(batch: int) -> np.ndarray:
    return load_text(FOLDER, at_least=batch * CONTEXT)


def c_text(batch: int) -> np.ndarray:
    return load_text(HEADERS, batch * CONTEXT, "**/*.h")


def model_of(
    depth: int, width: int, *, pre: bool = False, **options: Any
) -> Callable[[nnx.Rngs], Transformer]:
    """Returns what makes a Transformer, Post-LN unless ``pre``."""
    kind = PreTransformer if pre else Transformer
    return lambda rngs: kind(depth, width, HEADS, CONTEXT, rngs=rngs, **options)


def task_of(
    create_model: Callable[[nnx.Rngs], nnx.Module],
    steps: int,
    row_every: int,
    batch: int,
    text: np.ndarray | None = None,
    loss: Callable[[nnx.Module, Batch], jax.Array] = loss,
    change: Callable[[Batches, int], Batches] = lambda batches, seed: batches,  # noqa: ARG005
) -> Task:
    """Returns a task on windows of a text, Python's unless given, and changed."""
    text = python_text(batch) if text is None else text
    return Task(
        create_model,
        loss,
        lambda seed: change(batches(text, CONTEXT, seed, batch), seed),
        steps,
        row_every,
    )
