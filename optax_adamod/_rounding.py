"""Stochastic rounding to bfloat16, without a random key in the state.

An average in bfloat16 that is rounded to nearest stops moving once its steps are
smaller than half a unit in the last place. Rounded up or down at random, with
probabilities in proportion to the distances, it is right in the mean.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def random_bits(
    shape: tuple[int, ...], count: jax.typing.ArrayLike, leaf: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three independent sets of 16 random bits for each coordinate of a leaf.

    They are a hash of the step, the leaf and the coordinate: the same in every run,
    on every sharding and after a restart, with nothing to store.

    Args:
      shape: Shape of the leaf.
      count: The step, a scalar.
      leaf: Index of the leaf among those of the tree.

    Returns:
      Three uint32 arrays of the given shape, below 2**16.
    """
    row, column = _row_and_column(shape)
    # Two sums that together tell every coordinate from every other, since their
    # determinant is odd. Nothing but sums comes before rows and columns are one
    # array: a hash of the rows alone XLA would compute in a kernel of its own.
    first = column + (row * _u32(0x9E3779B9) + _u32(leaf * 0x632BE5AB))
    second = row + (column * _u32(0xC2B2AE36) + _mix(jnp.asarray(count, jnp.uint32)))
    word = _mix(_mix(first) ^ second)
    lower = _u32(0xFFFF)
    return word & lower, _mix(word ^ _u32(0x85EBCA6B)) & lower, word >> 16


def store(x: jax.Array, dtype: np.dtype, bits: jax.Array | None) -> jax.Array:
    """Returns ``x`` in ``dtype``, rounded by ``bits`` if that is bfloat16."""
    if dtype == jnp.bfloat16 and bits is not None:
        return stochastic_round(x, bits)
    return x.astype(dtype)


def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds ``x`` to bfloat16: away from zero if its lower half and ``bits`` carry.

    What bfloat16 holds stays as it is, infinities and NaN too. No finite number
    becomes infinite.
    """
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign, magnitude = word & _u32(0x80000000), word & _u32(0x7FFFFFFF)
    infinity, largest = _u32(0x7F800000), _u32(0x7F7FFFFF)
    rounded = jnp.minimum(magnitude + bits, largest)
    # A NaN's quiet bit keeps its upper half from being that of infinity.
    nan = magnitude | _u32(0x00400000)
    special = jnp.where(magnitude == infinity, magnitude, nan)
    upper = (sign | jnp.where(magnitude < infinity, rounded, special)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _row_and_column(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Indices over all dimensions but the last, and over the last."""

    def iota(dimension, dtype=jnp.uint32):
        return jax.lax.broadcasted_iota(dtype, shape, dimension)

    row = jnp.zeros(shape, jnp.uint32)
    if not shape:
        return row, row
    *rows, last = range(len(shape))
    for dimension in rows:
        row += iota(dimension) * _u32(math.prod(shape[dimension + 1 : -1]))
    if shape[-1] <= 2**32:
        return row, iota(last)
    with jax.enable_x64(True):  # the upper half of a long index counts as a row
        index = iota(last, jnp.uint64)
        upper, lower = (index >> 32).astype(jnp.uint32), index.astype(jnp.uint32)
    return row * _u32(-(-shape[-1] // 2**32)) + upper, lower


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of 32-bit words that lets every bit depend on every other.

    The constants are lowbias32's, https://nullprogram.com/blog/2018/07/31/.
    """
    x = (x ^ (x >> 16)) * _u32(0x7FEB352D)
    x = (x ^ (x >> 15)) * _u32(0x846CA68B)
    return x ^ (x >> 16)


def _u32(x: int) -> np.uint32:
    return np.uint32(x % 2**32)
