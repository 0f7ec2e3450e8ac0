"""Trains a language model on bytes of text, by any optimizer, and keeps its losses."""

import csv
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from examples.common.transformer import next_token_losses

FINAL = 20  # the final loss is the mean over this many last steps


def batches(
    text: np.ndarray, seed: int, context: int, batch: int
) -> Iterator[np.ndarray]:
    """Yields random windows of the text: int32[batch, context + 1]."""
    rng = np.random.default_rng(seed)
    windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)
    while True:
        yield windows[rng.integers(len(windows), size=batch)].astype(np.int32)


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, windows: jax.typing.ArrayLike
) -> jax.Array:
    """Updates model and optimizer in place; returns the loss in nats per byte."""
    windows = jnp.asarray(windows)

    def loss_fn(model: nnx.Module) -> jax.Array:
        return next_token_losses(model, windows).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def train_model(
    title: str,
    model: nnx.Module,
    tx: optax.GradientTransformation,
    windows: Iterator[np.ndarray],
    steps: int,
    after_step: Callable[[Any], None] = lambda opt_state: None,  # noqa: ARG005
) -> list[float]:
    """Trains the model in place, under a progress bar.

    Args:
      title: What the progress bar calls it.
      model: The model, which maps tokens to logits.
      tx: The optimizer.
      windows: The batch of every step.
      steps: Training steps.
      after_step: Called with the optimizer's state after every step.

    Returns:
      The loss of every step.
    """
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses: list[float] = []
    numbered = zip(range(steps), windows, strict=False)
    step = nnx.cached_partial(train_step, model, optimizer)  # walks the model once
    with tqdm(numbered, title, steps, unit="step") as progress:
        for _, batch in progress:
            losses.append(float(step(batch)))
            after_step(optimizer.opt_state)
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def final_loss(losses: list[float]) -> float:
    return statistics.fmean(losses[-FINAL:])


def save_losses(runs: dict[str, list[list[float]]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "seed", "step", "loss"])
        for name, seeds in runs.items():
            for seed, losses in enumerate(seeds):
                for step, loss in enumerate(losses, start=1):
                    writer.writerow([name, seed, step, loss])
