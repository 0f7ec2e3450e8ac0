"""What AdaMod might do with a coordinate that sleeps, beside what it does.

A coordinate sleeps in a step in which its gradient is exactly zero: the embedding of a
word that is not in the batch, the weights of a ReLU unit that no example turned on. The
published bound then goes on averaging, and averages rates that grow without limit,
because the second moment decays. Before the first gradient, while the second moment is
exactly zero, the rate is 1 / eps. Four ways out, none of which changes anything for a
coordinate that never sleeps:

kept: the bound stands still, and opens over 1 / (1 - b3) steps awake;
opened: the bound opens with the clock, around the mean of the rates when awake;
frozen: that, and the second moment stands still too, and so the rate;
started: the rate counts as zero before the first gradient, as published afterwards.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_adamod import ScaleByAdamodState

Sleeping = Literal["published", "kept", "opened", "frozen", "started"]
VARIANTS: tuple[Sleeping, ...] = ("kept", "opened", "frozen", "started")


def scale_by_lazy_adamod(
    sleeping: Sleeping,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Returns AdaMod, published or a variant, per unit of a constant learning rate."""

    def init(params: optax.Params) -> ScaleByAdamodState:
        averages = (optax.tree.zeros_like(params) for _ in range(3))
        return ScaleByAdamodState(jnp.zeros([], jnp.int32), *averages)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByAdamodState]:
        del params
        count = optax.safe_increment(state.count)

        def leaf(
            g: jax.Array, m: jax.Array, v_hat: jax.Array, bound: jax.Array
        ) -> tuple[jax.Array, ...]:
            awake = g != 0
            m += (1 - b1) * (g - m)
            if sleeping == "frozen":
                v_hat = jnp.where(awake, mean(v_hat, g**2, b2, count), v_hat)
            else:
                v_hat += weight(b2, count) * (g**2 - v_hat)
            rate = 1 / (jnp.sqrt(v_hat) + eps)
            if sleeping == "kept":
                bound = jnp.where(awake, bound + (1 - b3) * (rate - bound), bound)
                limit = bound
            elif sleeping in ("published", "started"):
                counted = rate
                if sleeping == "started":
                    counted = jnp.where(v_hat > 0, rate, 0)
                bound += (1 - b3) * (counted - bound)
                limit = bound
            else:
                bound = jnp.where(awake, mean(bound, rate, b3, count), bound)
                limit = opening(b3, count) * bound
            m_hat = m / opening(b1, count)
            return jnp.minimum(rate, limit) * m_hat, m, v_hat, bound

        leaves = jax.tree.map(leaf, updates, state.mu, state.nu, state.bound)
        updates, *averages = jax.tree.transpose(
            jax.tree.structure(updates), None, leaves
        )
        return updates, ScaleByAdamodState(count, *averages)

    return optax.GradientTransformation(init, update)


def lazy_adamod(
    learning_rate: float,
    sleeping: Sleeping,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Returns the same with its learning rate."""
    return optax.chain(
        scale_by_lazy_adamod(sleeping, b1, b2, b3, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def opening(b: float, count: jax.typing.ArrayLike) -> jax.Array:
    """Returns ``1 - b**t``."""
    return -jnp.expm1(jnp.multiply(count, jnp.log(b)))


def weight(b: float, count: jax.typing.ArrayLike) -> jax.Array:
    """Returns what makes an average the bias-corrected one, at every step."""
    return (1 - b) / opening(b, count)


def mean(
    average: jax.Array, x: Any, b: float, count: jax.typing.ArrayLike
) -> jax.Array:
    """Returns the bias-corrected average of positive numbers; the first is itself."""
    return average + jnp.where(average == 0, 1, weight(b, count)) * (x - average)
