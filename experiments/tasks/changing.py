"""The tasks of the comparison that change on the way, where only a bound can help."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.common.comparison import Compared, Spans
from experiments.common.contestants import Schedule
from experiments.common.training import Batch, Task
from experiments.data.changes import Switching, Weighted, easy_batches, within
from experiments.data.text import batches
from experiments.tasks import text
from experiments.tasks.steady import B2, BATCH, UNITS, Size

DEPTH = 4
LOWEST = 0.01  # of the learning rate, to which it decays before it jumps
EASY = ((3, 4), (6, 11))  # units: stretches of 100 and of 500 steps
SMALL = ((3, 5),)  # units in which the gradients are small
WEIGHT = 1e-3  # of the gradients there


def in_steps(size: Size, units: Spans) -> Spans:
    return tuple((start * size.unit, end * size.unit) for start, end in units)


def task_of(size: Size, units: int = UNITS, **changes: Any) -> Task:
    """Returns the Post-LN Transformer of 4 blocks, with changes of batches or loss."""
    model = text.model_of(DEPTH, size.width)
    return text.task_of(model, units * size.unit, size.row, BATCH, **changes)


def switched(size: Size) -> Compared:
    """Returns Python, then C, then Python again; all after the first switch counts."""
    c = text.c_text(BATCH)
    (other,) = in_steps(size, ((3, 6),))
    task = task_of(
        size,
        9,
        change=lambda python, seed: Switching(
            python, batches(c, text.CONTEXT, seed, BATCH), (other,)
        ),
    )
    return Compared(task, Schedule(B2), ((other[0], task.steps),))


def easy(size: Size, b2: float) -> Compared:
    """Returns Python with stretches of spaces; what is hard after the first counts."""
    spans = in_steps(size, EASY)
    spaces = easy_batches(text.CONTEXT, BATCH)
    task = task_of(size, 14, change=lambda hard, _: Switching(hard, spaces, spans))
    counted = ((spans[0][1], task.steps),)
    return Compared(task, Schedule(b2), counted, left_out=spans)


def weighted_loss(model: nnx.Module, batch: Batch) -> jax.Array:
    """Returns the loss, whose gradient has the weight of the batch."""
    loss = text.loss(model, batch)
    weight = jnp.asarray(batch["weight"])
    return weight * loss + jax.lax.stop_gradient((1 - weight) * loss)


def small_gradients(size: Size) -> Compared:
    """Returns gradients that are a thousandth for a while; all from then on counts."""
    spans = in_steps(size, SMALL)
    task = task_of(
        size,
        loss=weighted_loss,
        change=lambda usual, _: Weighted(
            usual, lambda step: WEIGHT if within(spans, step) else 1.0
        ),
    )
    return Compared(task, Schedule(B2), ((spans[0][0], task.steps),))


def cosine(done: Any) -> Any:
    """Falls from 1 to ``LOWEST`` as ``done`` goes from 0 to 1."""
    return LOWEST + (1 - LOWEST) * (1 + jnp.cos(jnp.pi * done)) / 2


def restarts(size: Size) -> Compared:
    """Returns cosine decay that starts again every two units."""
    period = 2 * size.unit
    schedule = Schedule(
        B2,
        shape=lambda count: cosine(count % period / period),
        since_jump=lambda count: count % period,
    )
    return Compared(task_of(size), schedule, size.last)


def rewarmed(size: Size) -> Compared:
    """Returns decay over half of the budget, then the full rate; that half counts."""
    half = size.steps // 2
    schedule = Schedule(
        B2,
        shape=lambda count: jnp.where(count < half, cosine(count / half), 1.0),
        since_jump=lambda count: jnp.where(count < half, count, count - half),
    )
    return Compared(task_of(size), schedule, ((half, size.steps),))


def resumed(size: Size) -> Compared:
    """Returns a run that is resumed half-way without its optimizer's state.

    The count is part of it, so warm-ups of the schedule begin again too. The second
    half counts.
    """
    half = size.steps // 2
    return Compared(task_of(size), Schedule(B2, forgets_at=half), ((half, size.steps),))


TASKS: dict[str, Callable[[Size], Compared]] = {
    "switched": switched,
    "small_gradients": small_gradients,
    "easy_0.98": lambda size: easy(size, 0.98),
    "restarts": restarts,
    "rewarmed": rewarmed,
    "easy_0.999": lambda size: easy(size, 0.999),
    "easy_0.95": lambda size: easy(size, 0.95),
    "resumed": resumed,
}
