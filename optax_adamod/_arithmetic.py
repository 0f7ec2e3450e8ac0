"""How the equations are computed: averages, rates and bias corrections.

Each is made of the hyperparameters once a step and applied to every leaf.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Average(NamedTuple):
    """``b * old + (1 - b) * new``, exact in the smaller of ``b`` and ``1 - b``."""

    keep: jax.typing.ArrayLike | None  # 1 for b >= 1/2, else b; None for the number 0
    weight: jax.typing.ArrayLike  # 1 - b
    forget: jax.typing.ArrayLike  # 1 - b for b >= 1/2, else 0

    @classmethod
    def of(cls, b: float | jax.Array) -> "Average":
        """Returns the average with this decay rate."""
        if isinstance(b, float):
            return cls(1.0, 1 - b, 1 - b) if b >= 0.5 else cls(b or None, 1 - b, 0.0)
        near = b >= 0.5
        return cls(jnp.where(near, 1, b), 1 - b, jnp.where(near, 1 - b, 0))

    def __call__(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """Returns ``old + (1 - b) * (new - old)`` for ``b >= 0.5``.

        It subtracts products, because the difference of two finite numbers may be
        infinite.
        """
        if self.keep is None:
            return new
        finite = old
        if not jnp.iscomplexobj(old):
            # An infinite average stays infinite: less infinity it would be NaN.
            largest = jnp.finfo(old.dtype).max
            finite = jnp.clip(old, -largest, largest)
        towards = self.weight * new - self.forget * finite
        return jnp.asarray(self.keep * old + towards)


class Rate(NamedTuple):
    """The adaptive learning rate, of the average of the squared gradients."""

    numerator: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike  # 1 / (1 - b2**t), so that scale * v is the corrected v
    eps: jax.typing.ArrayLike
    eps_root: jax.typing.ArrayLike

    def __call__(self, v: jax.Array) -> jax.Array:
        root = jnp.sqrt(self.scale * v + self.eps_root)
        return jnp.divide(self.numerator, root + self.eps)

    def unmerged(self) -> "Rate":
        """Returns the same rate, with numerator and denominator scaled by 1/2.

        Scaling both leaves the rate unchanged but stops XLA on CPU from merging it with
        the rate in the bound. Merged, XLA would write the root to memory, which takes
        longer than the rest of the update.
        """
        return Rate(
            0.5 * self.numerator,
            0.25 * self.scale,
            0.5 * self.eps,
            0.25 * self.eps_root,
        )


class BoundPerAlpha(NamedTuple):
    """The magnitude of the bound per unit of learning rate."""

    factor: jax.Array  # 1 / |alpha|
    slack: jax.Array  # 0, and the largest number where alpha is 0

    @classmethod
    def of(cls, alpha: jax.Array) -> "BoundPerAlpha":
        """Returns the bound under this learning rate."""
        largest, tiny = (getattr(jnp.finfo(alpha.dtype), x) for x in ("max", "tiny"))
        # At alpha = 0 there is no bound: the update is Adam's, and the chain scales it.
        is_zero = jnp.abs(alpha) < tiny
        factor = 1 / jnp.where(is_zero, 1, jnp.abs(alpha))
        return cls(factor, jnp.where(is_zero, largest, 0))

    def __call__(self, s: jax.Array) -> jax.Array:
        return jnp.abs(s) * self.factor + self.slack


class Momentum(NamedTuple):
    """The bias-corrected average of the gradients, with Nesterov's look-ahead."""

    of_m: jax.typing.ArrayLike
    of_g: jax.Array | None

    def __call__(self, m: jax.Array, g: jax.Array, *, times: jax.Array) -> jax.Array:
        """Returns the momentum times a rate.

        The rate is multiplied by the bias correction before m. If a square overflows,
        the rate is 0, and so is the product. The momentum alone could be infinite, and
        0 times infinity is NaN.
        """
        rate = times
        update = (rate * self.of_m).astype(m.dtype) * m
        if self.of_g is not None:
            update += (rate * self.of_g).astype(g.dtype) * g
        return update


def largest_ratio(
    average_g: Average, average_g2: Average, dtype: np.dtype
) -> jax.Array:
    """Returns c of ``|m_t| <= c √v_t``, by Cauchy and Schwarz.

    Without one (b2 <= b1^2) it is the root of the largest number, so c √v is finite.
    """
    a, b = (jnp.asarray(x.weight, dtype) for x in (average_g, average_g2))
    gap = 2 * a - a * a - b  # b2 - b1^2
    exists = gap > 4 * jnp.finfo(dtype).eps
    square = (1 - b) / (b * jnp.where(exists, gap, 1))
    largest = jnp.sqrt(jnp.finfo(dtype).max)
    return jnp.where(exists, a * jnp.sqrt(square), largest)


def abs_sq(g: jax.Array) -> jax.Array:
    """Returns the squares of the magnitudes, real."""
    return jnp.real(jnp.conj(g) * g)


def bias_correction(b: float | jax.Array, t: jax.Array) -> jax.Array:
    """Returns ``1 / (1 - b**t)`` without cancellation where ``b**t`` is near 1."""
    if isinstance(b, float):
        return -1 / jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)
    # For b < 1/2 use the power itself: at b = 0, log b has no derivative.
    near = b >= 0.5
    complement = -jnp.expm1(t * jnp.log(jnp.where(near, b, 0.5)))
    return 1 / jnp.where(near, complement, 1 - jnp.where(near, 0, b) ** t)
