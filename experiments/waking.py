"""How far coordinates move when they wake, by how seldom they are awake."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.common.results import table
from experiments.report import final_value, grouped, spread
from experiments.training import History, Row, Run

SHARES = (0.005, 0.05, 0.5)  # of the steps in which a coordinate is awake
AWAKE = ("below 0.5 %", "0.5 to 5 %", "5 to 50 %", "above 50 %")
FIRST = 200  # step before which no share can be told from the smallest
EDGES = np.linspace(-4, 2, 61)  # of the histogram of log10 |update| / learning rate


class RecordUpdatesState(NamedTuple):
    """State of :func:`record_updates`."""

    steps: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
    awake: jax.Array  # steps in which each coordinate was; int32[N].
    counts: jax.Array  # of updates, by share and by size; int32[4, 62].
    largest: jax.Array  # update, in learning rates, by share; float32[4].
    inner: Any


def record_updates(
    inner: optax.GradientTransformation,
    learning_rate: float,
    select: Callable[[Any], jax.Array],
    at_once: int,
) -> optax.GradientTransformation:
    """Records the updates of coordinates that are awake, by how often they are.

    Args:
      inner: What makes the updates.
      learning_rate: The unit of the updates.
      select: The part of a tree that is looked at.
      at_once: The most coordinates that are awake in a step.

    Returns:
      The transformation, whose updates are those of ``inner``.
    """

    def init(params: optax.Params) -> RecordUpdatesState:
        groups = len(AWAKE)
        return RecordUpdatesState(
            jnp.zeros([], jnp.int32),
            jnp.zeros(select(params).size, jnp.int32),
            jnp.zeros((groups, len(EDGES) + 1), jnp.int32),
            jnp.zeros(groups),
            inner.init(params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, RecordUpdatesState]:
        gradients = select(updates).ravel()
        updates, inner_state = inner.update(updates, state.inner, params)
        steps = optax.safe_increment(state.steps)
        awake = state.awake + (gradients != 0)
        (indices,) = jnp.nonzero(
            gradients, size=at_once, fill_value=gradients.size
        )  # what is filled in is out of bounds, and its group as well
        sizes = jnp.abs(select(updates).ravel()[indices]) / learning_rate
        group = jnp.searchsorted(jnp.array(SHARES), awake[indices] / steps)
        group = jnp.where(indices < gradients.size, group, len(AWAKE))
        group = jnp.where(jnp.less(steps, FIRST), len(AWAKE), group)
        bins = jnp.searchsorted(jnp.array(EDGES), jnp.log10(sizes))
        return updates, RecordUpdatesState(
            steps,
            awake,
            state.counts.at[group, bins].add(1, mode="drop"),
            state.largest.at[group].max(sizes, mode="drop"),
            inner_state,
        )

    return optax.GradientTransformation(init, update)


def recorded(state: RecordUpdatesState) -> dict[str, float]:
    """Returns median, 99th percentile and largest update by share of steps awake."""
    row = {}
    counts, largest = jax.device_get((state.counts, state.largest))
    for name, count, most in zip(AWAKE, counts, largest, strict=True):
        if count.sum():
            row[f"awake {name}: median"] = min(quantile(count, 0.5), float(most))
            row[f"awake {name}: 99 %"] = min(quantile(count, 0.99), float(most))
            row[f"awake {name}: largest"] = float(most)
            row[f"awake {name}: updates"] = float(count.sum())
    return row


def asleep(row: Row, size: int) -> float:
    """Returns the share of zeros among so many coordinates' gradients from FIRST on."""
    if row["step"] < FIRST:
        return math.nan
    awake = sum(row.get(f"awake {name}: updates", 0) for name in AWAKE)
    return 1 - awake / (size * (row["step"] - FIRST + 1))


def quantile(counts: np.ndarray, share: float) -> float:
    """Returns the upper edge of the bin in which the quantile is."""
    index = np.searchsorted(np.cumsum(counts), share * counts.sum())
    return float(10 ** np.append(EDGES, np.inf)[index])


def awake_share(counts: np.ndarray, tokens: int) -> np.ndarray:
    """Returns the share of batches of so many tokens in which each word occurs."""
    return -np.expm1(tokens * np.log1p(-counts / counts.sum()))


def updates_table(history: History) -> str:
    """Returns the sizes of updates by optimizer, learning rate and share awake."""

    def cell(runs: Sequence[Run], name: str) -> str:
        last = [history[run][-1] for run in runs]
        last = [row for row in last if f"awake {name}: median" in row]
        if not last:
            return ""
        median, high = (
            np.median([row[f"awake {name}: {x}"] for row in last])
            for x in ("median", "99 %")
        )
        largest = max(row[f"awake {name}: largest"] for row in last)
        return f"{median:.2g}, {high:.2g}, {largest:.2g}"

    rows = [
        {"optimizer": optimizer, "lr": f"{rate:g}"}
        | {f"awake in {name}": cell(runs, name) for name in AWAKE}
        for optimizer, by_rate in grouped(history).items()
        for rate, runs in by_rate.items()
    ]
    return (
        "Updates in learning rates, of coordinates whose gradient was not zero, by the "
        "share of steps in which it was not: median, 99th percentile (medians of the "
        f"seeds), and the largest of all:\n\n{table(rows)}"
    )


def losses_table(history: History, metrics: Sequence[str], title: str) -> str:
    """Returns the last values of several metrics, each mean and range of the seeds."""
    known = {name for rows in history.values() for name in rows[-1]}
    metrics = [x for x in metrics if x in known]
    rows = [
        {"optimizer": optimizer, "lr": f"{rate:g}"}
        | {
            x: spread([final_value(history[run], x, 1) for run in runs])
            for x in metrics
        }
        for optimizer, by_rate in grouped(history).items()
        for rate, runs in by_rate.items()
    ]
    return f"{title}:\n\n{table(rows)}"
