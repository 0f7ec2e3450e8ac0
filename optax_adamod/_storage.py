"""How averages are stored, and read again.

In float32 and float64 they are stored as they are. In bfloat16 they are rounded
stochastically: rounded to nearest, an average stops moving once its steps are smaller
than half a unit in the last place; rounded up or down at random, with probabilities in
proportion to the distances, it is right in the mean. The random bits are a hash, so
that the state holds no key.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def random_bits(
    shape: tuple[int, ...], count: jax.typing.ArrayLike, leaf: jax.typing.ArrayLike
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
    # All that is computed is computed of rows and columns together: what depends on
    # one of them alone XLA would compute in a kernel of its own. The step is mixed, and
    # enters before the first mix: added to the word later, as it is, it would let
    # coordinates of one row ^ column take turns with the same bits.
    step = jax.lax.bitcast_convert_type(jnp.asarray(count, jnp.int32), jnp.uint32)
    step = _mix(step)
    # Behind the barrier the leaf is no constant of its kernel: leaves of one shape then
    # have the same kernel, which is compiled once.
    seed = jax.lax.optimization_barrier(
        jnp.asarray(leaf, jnp.uint32) * _u32(0x9E3779B9)
    )
    word = _mix((row ^ column ^ seed) + step)
    word = _mix(word ^ row)
    lower = _u32(0xFFFF)
    return word & lower, _mix(word ^ _u32(0x85EBCA6B)) & lower, word >> 16


def load(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns a stored average as numbers of ``dtype``."""
    return stored.astype(dtype)


def store(x: jax.Array, stored: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Returns ``x`` as ``stored`` is stored; ``bits`` are for what is rounded."""
    if _is_rounded(stored):
        assert bits is not None
        return stochastic_round(x, bits)
    if stored.dtype == jnp.float16:  # whose largest number is 65504
        largest = jnp.finfo(jnp.float16).max.astype(x.dtype)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    return x.astype(stored.dtype)


def bits_for(
    averages: tuple[jax.Array, jax.Array, jax.Array],
    count: jax.typing.ArrayLike,
    leaf: jax.typing.ArrayLike,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Random bits for each of three averages of one leaf, if any of them needs some."""
    if any(map(_is_rounded, averages)):
        return random_bits(averages[0].shape, count, leaf)
    return None, None, None


def _is_rounded(stored: jax.Array) -> bool:
    return stored.dtype == jnp.bfloat16


@jax.custom_jvp
def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds ``x`` to bfloat16: away from zero if its lower half and ``bits`` carry.

    What bfloat16 holds stays as it is, infinities and NaN too. No finite number
    becomes infinite. In the mean this is the identity, and its derivative is that too.
    """
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign, magnitude = word & _u32(0x80000000), word & _u32(0x7FFFFFFF)
    largest, infinity = _u32(0x7F7FFFFF), _u32(0x7F800000)
    upper = (sign | jnp.minimum(magnitude + bits, largest)) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    # The choice comes last, for of all these operations it alone keeps XLA on CPU (of
    # JAX 0.12) from repeating the rounding where the result is read, and from copying.
    return jnp.where(magnitude < infinity, rounded, x.astype(jnp.bfloat16))


@stochastic_round.defjvp
def _stochastic_round_jvp(primals, tangents):
    return stochastic_round(*primals), tangents[0].astype(jnp.bfloat16)


def _row_and_column(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two 32-bit indices that together name a coordinate of an array."""
    *rows, columns = shape or (1,)
    if max(math.prod(rows), columns) <= 2**32:
        row = _linear_index(shape, range(len(rows)), jnp.uint32)
        return row, _linear_index(shape, range(len(rows), len(shape)), jnp.uint32)
    with jax.enable_x64(True):
        index = _linear_index(shape, range(len(shape)), jnp.uint64)
        return (index >> 32).astype(jnp.uint32), index.astype(jnp.uint32)


def _linear_index(
    shape: tuple[int, ...], dimensions: range, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Row-major index over some successive dimensions."""
    index = jnp.zeros(shape, dtype)
    for d in dimensions:
        stride = math.prod(shape[d + 1 : dimensions.stop])
        index += jax.lax.broadcasted_iota(dtype, shape, d) * jnp.asarray(stride, dtype)
    return index


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of 32-bit words that lets every bit depend on every other.

    The constants are lowbias32's, https://nullprogram.com/blog/2018/07/31/.
    """
    x = (x ^ (x >> 16)) * _u32(0x7FEB352D)
    x = (x ^ (x >> 15)) * _u32(0x846CA68B)
    return x ^ (x >> 16)


def _u32(x: int) -> np.uint32:
    return np.uint32(x % 2**32)
