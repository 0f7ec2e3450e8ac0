"""The tasks of the comparison that change on the way, where only a bound can help."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.stdlib_text import FOLDER, load_text
from experiments import language_modelling
from experiments.compared_tasks import (
    B2,
    BATCH,
    CONTEXT,
    UNITS,
    Size,
    byte_model,
)
from experiments.comparison import Compared
from experiments.contestants import Schedule
from experiments.data.changes import (
    HEADERS,
    Spans,
    Switching,
    Weighted,
    easy_batches,
    within,
)
from experiments.data.text import batches
from experiments.training import Batch, Batches, Task

DEPTH = 4
LOWEST = 0.01  # of the learning rate, to which it decays before it jumps
EASY = ((3, 4), (6, 11))  # units: stretches of 100 and of 500 steps
EASY_UNITS = 14
SMALL = ((3, 5),)  # units in which the gradients are small
WEIGHT = 1e-3  # of the gradients there


def in_steps(size: Size, units: Spans) -> Spans:
    return tuple((start * size.unit, end * size.unit) for start, end in units)


def byte_task(
    size: Size, units: int, batches: Callable[[int], Batches], loss: Any
) -> Task:
    """Returns the Post-LN Transformer of 4 blocks on other batches."""
    return Task(
        create_model=byte_model(size, DEPTH),
        loss=loss,
        batches=batches,
        steps=units * size.unit,
        row_every=size.row,
    )


def python(seed: int) -> Batches:
    text = load_text(FOLDER, at_least=BATCH * CONTEXT)
    return batches(text, CONTEXT, seed, BATCH)


def switched(size: Size) -> Compared:
    """Returns Python, then C, then Python again; all after the first switch counts."""
    headers = load_text(HEADERS, BATCH * CONTEXT, "**/*.h")
    (other,) = in_steps(size, ((3, 6),))
    task = byte_task(
        size,
        9,
        lambda seed: Switching(
            python(seed), batches(headers, CONTEXT, seed, BATCH), (other,)
        ),
        language_modelling.loss,
    )
    return Compared(task, Schedule(B2), ((other[0], task.steps),))


def easy(size: Size, b2: float) -> Compared:
    """Returns Python with stretches of spaces; what is hard after the first counts."""
    spans = in_steps(size, EASY)
    task = byte_task(
        size,
        EASY_UNITS,
        lambda seed: Switching(python(seed), easy_batches(CONTEXT, BATCH), spans),
        language_modelling.loss,
    )
    counted = ((spans[0][1], task.steps),)
    return Compared(task, Schedule(b2), counted, left_out=spans)


def weighted_loss(model: nnx.Module, batch: Batch) -> jax.Array:
    """Returns the loss, whose gradient has the weight of the batch."""
    loss = language_modelling.loss(model, batch)
    weight = jnp.asarray(batch["weight"])
    return weight * loss + jax.lax.stop_gradient((1 - weight) * loss)


def small_gradients(size: Size) -> Compared:
    """Returns gradients that are a thousandth for a while; all from then on counts."""
    spans = in_steps(size, SMALL)
    task = byte_task(
        size,
        UNITS,
        lambda seed: Weighted(
            python(seed), lambda step: WEIGHT if within(spans, step) else 1.0
        ),
        weighted_loss,
    )
    return Compared(task, Schedule(B2), ((spans[0][0], task.steps),))


def cosine(done: Any) -> Any:
    """Falls from 1 to ``LOWEST`` as ``done`` goes from 0 to 1."""
    return LOWEST + (1 - LOWEST) * (1 + jnp.cos(jnp.pi * done)) / 2


def jumping(size: Size, schedule: Schedule, counted: Spans) -> Compared:
    task = byte_task(size, UNITS, python, language_modelling.loss)
    return Compared(task, schedule, counted)


def second_half(size: Size) -> Spans:
    return in_steps(size, ((UNITS // 2, UNITS),))


def restarts(size: Size) -> Compared:
    """Returns cosine decay that starts again every two units."""
    period = 2 * size.unit
    schedule = Schedule(
        B2,
        shape=lambda count: cosine(count % period / period),
        since_jump=lambda count: count % period,
    )
    return jumping(size, schedule, size.last(UNITS))


def rewarmed(size: Size) -> Compared:
    """Returns decay over half of the budget, then the full rate; that half counts."""
    half = UNITS * size.unit // 2
    schedule = Schedule(
        B2,
        shape=lambda count: jnp.where(count < half, cosine(count / half), 1.0),
        since_jump=lambda count: jnp.where(count < half, count, count - half),
    )
    return jumping(size, schedule, second_half(size))


def resumed(size: Size) -> Compared:
    """Returns a run that is resumed half-way without its optimizer's state.

    The count is part of it, so warm-ups of the schedule begin again too. The second
    half counts.
    """
    schedule = Schedule(B2, forgets_at=UNITS * size.unit // 2)
    return jumping(size, schedule, second_half(size))


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
