"""Adam under bounds on its learning rates, of which AdaMod's is one.

The bounds that are tried beside the paper's. Each is what ``Bound.limit`` says: it
follows the rates of a leaf, and returns the largest that the step may use.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

B1 = 0.9
EPS = 1e-8


class Bound(NamedTuple):
    """A bound on the learning rates of a leaf.

    Attributes:
      init: Makes its state, from a leaf of parameters.
      limit: Takes the state, the rates and the step's number, from 1; returns the new
        state and the largest rates allowed.
    """

    init: Callable[[jax.Array], Any]
    limit: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


class BoundedAdamState(NamedTuple):
    """What Adam remembers, and for each leaf what its bound remembers."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    bound: Any  # a list, by leaf


def scale_by_bounded_adam(
    bound: Bound, b2: float, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Returns Adam with rates under a bound, per unit of learning rate.

    Args:
      bound: The bound. It sees the rates with the learning rate in them, as AdaMod's.
      b2: Decay rate of the second moment.
      learning_rate: The one that is applied to the result afterwards.
    """

    def init_fn(params: optax.Params) -> BoundedAdamState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        leaves = [bound.init(p) for p in jax.tree.leaves(params)]
        return BoundedAdamState(jnp.zeros([], jnp.int32), mu, nu, leaves)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, BoundedAdamState]:
        del params
        alpha = jnp.asarray(learning_rate(state.step))
        count = jnp.asarray(optax.safe_increment(state.step))
        m_correction, v_correction = 1 - B1**count, 1 - b2**count

        def leaf(
            g: jax.Array, m: jax.Array, v: jax.Array, s: Any
        ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
            m += (1 - B1) * (g - m)
            v += (1 - b2) * (g**2 - v)
            eta = alpha / (jnp.sqrt(v / v_correction) + EPS)
            s, limit = bound.limit(s, eta, count)
            rate = jnp.where(alpha == 0, 0, jnp.minimum(eta, limit) / alpha)
            return rate * (m / m_correction), m, v, s

        leaves, structure = jax.tree.flatten(updates)
        trees = (jax.tree.leaves(x) for x in (state.mu, state.nu))
        done = [leaf(*x) for x in zip(leaves, *trees, state.bound, strict=True)]
        updates, mu, nu = (
            jax.tree.unflatten(structure, [x[i] for x in done]) for i in range(3)
        )
        return updates, BoundedAdamState(count, mu, nu, [x[3] for x in done])

    return optax.GradientTransformation(init_fn, update_fn)


def slack(c: float, b3: float) -> Bound:
    """The paper's average, times ``c``: 1 is the paper."""

    def limit(s: jax.Array, eta: jax.Array, count: jax.Array) -> tuple[Any, jax.Array]:
        del count
        s = s + (1 - b3) * (eta - s)
        return s, c * s

    return Bound(jnp.zeros_like, limit)


def lag_corrected(b3: float) -> Bound:
    """Adds to the average how far it lags behind, as a second average shows.

    A lag below zero, where the rates fall, is none: falling rates are not held back.
    """

    def limit(
        state: tuple[jax.Array, jax.Array], eta: jax.Array, count: jax.Array
    ) -> tuple[Any, jax.Array]:
        del count
        s, ss = state
        s = s + (1 - b3) * (eta - s)
        ss = ss + (1 - b3) * (s - ss)
        return (s, ss), s + jnp.maximum(s - ss, 0)

    return Bound(lambda p: (jnp.zeros_like(p), jnp.zeros_like(p)), limit)


def growing(steps: float, share: float) -> Bound:
    """Averages over a horizon that grows with the count, by ``share`` of a step each.

    It begins with ``steps``, which is what the warm-up takes.
    """

    def limit(s: jax.Array, eta: jax.Array, count: jax.Array) -> tuple[Any, jax.Array]:
        s = s + (eta - s) / (steps + share * count)
        return s, s

    return Bound(jnp.zeros_like, limit)


def shared(b3: float, *, rows: bool) -> Bound:
    """One average for each leaf, or each of its rows; it scales all rates alike.

    Averaged is the harmonic mean of the rates. Parameters that get no gradient, whose
    rates know no limit, add little to it.
    """

    def of_all(x: jax.Array) -> jax.Array:
        if rows and x.ndim > 1:
            return jnp.mean(x, axis=-1, keepdims=True)
        return jnp.mean(x)

    def limit(s: jax.Array, eta: jax.Array, count: jax.Array) -> tuple[Any, jax.Array]:
        del count
        # Where the learning rate is 0 all rates are, and no factor is needed.
        positive = jnp.where(eta > 0, eta, 1)
        mean = jnp.where(jnp.all(eta > 0), 1 / of_all(1 / positive), 0)
        s = s + (1 - b3) * (mean - s)
        factor = jnp.minimum(1, s / jnp.where(mean > 0, mean, 1))
        return s, factor * eta

    return Bound(lambda p: jnp.zeros_like(of_all(p)), limit)


def steps_to_open(c: float, b3: float) -> float:
    """Returns after how many steps a bound with slack no longer binds steady rates."""
    return math.log(1 - 1 / c) / math.log(b3)


def matched_b3(c: float, b3: float) -> float:
    """Returns the ``b3`` that without slack holds back as much of steady rates.

    With slack ``c`` the share ``1 - c * (1 - b3**t)`` of a step is held back until the
    bound is open, without it ``b3**t`` for ever. Their integrals over time are equal.
    """
    decay = -math.log(b3)
    held = 1 / decay - (c - 1) * steps_to_open(c, b3)
    return math.exp(-1 / held)
