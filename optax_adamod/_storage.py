"""How averages are stored and loaded.

Averages in float32 and float64 are stored as they are. ``mu`` may be float16, rounded
to nearest and clipped to its largest number. Averages in bfloat16 and in 8 bits are
rounded stochastically. Rounded to nearest, an average stops moving once its steps are
smaller than half a unit in the last place. Rounded up or down at random, with
probabilities in proportion to the distances, it is right on average. The random bits
are a hash, so the state holds no key.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from optax_adamod import _float8
from optax_adamod._float8 import Float8Array

RANDOM_BITS = 20  # of each set: what a float32 has and a code of 8 bits lacks

Stored = jax.Array | Float8Array


class Averages(NamedTuple):
    """The averages of one leaf as they are stored: of 8 bits, 16 or more."""

    mu: Any
    nu: Any
    bound: Any  # None if there is none

    @property
    def packed(self) -> jax.Array | None:
        """The exponents of those in 8 bits, in one array."""
        arrays = [x for x in self if isinstance(x, Float8Array)]
        if not arrays:
            return None
        # Without the barrier XLA reads them again where they are needed, by when a
        # donated state has the new ones, so it copies the old.
        return jax.lax.optimization_barrier(_float8.pack(arrays))

    def load(
        self, packed: jax.Array | None, dtypes: Sequence[np.dtype]
    ) -> tuple[Any, ...]:
        """Returns the numbers, in the dtypes."""
        arrays = [x for x in self if isinstance(x, Float8Array)]
        decoded = iter([] if packed is None else _float8.decode(arrays, packed))
        numbers = (next(decoded) if isinstance(x, Float8Array) else x for x in self)
        return tuple(
            x if x is None else x.astype(dtype)
            for x, dtype in zip(numbers, dtypes, strict=True)
        )

    def exponents(self, numbers: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the shared exponents of new numbers, None where there are none."""
        narrow = [isinstance(old, Float8Array) for old in self]
        codes = [old.codes.dtype for old in itertools.compress(self, narrow)]
        found = _float8.exponents(list(itertools.compress(numbers, narrow)), codes)
        shared = iter(found)
        return tuple(next(shared) if x else None for x in narrow)

    def store(
        self,
        numbers: Sequence[Any],
        exponents: Sequence[Any],
        place: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    ) -> Iterator[tuple[Any, Any]]:
        """Stores new numbers as the old were; loads them again.

        Args:
          numbers: The averages of the gradients, their squares and the rates.
          exponents: Their exponents.
          place: The step and the leaf, from which random bits for rounding follow.

        Yields:
          Each average as it is stored, and the numbers that are loaded from that.
        """
        bits: tuple[Any, ...] = None, None, None
        if any(map(_is_rounded, self)):
            x = jax.typeof(numbers[0])
            bits = random_bits(x.shape, *place, sharding=x.sharding)
        stored: list[tuple[Any, Any]] = [
            (None, None) if x is None else _store(x, old, *how)
            for x, old, *how in zip(numbers, self, exponents, bits, strict=True)
        ]
        narrow = [isinstance(new, Float8Array) for new, _ in stored]
        written = iter(_written(list(itertools.compress(stored, narrow))))
        for x, pair, is_narrow in zip(numbers, stored, narrow, strict=True):
            if is_narrow:
                new, rounded = next(written)
                yield new, _as_identity(x, rounded.astype(x.dtype))
            else:
                yield pair


def _store(
    x: jax.Array, old: Stored, exponents: Any, bits: Any
) -> tuple[Stored, jax.Array]:
    if isinstance(old, Float8Array):
        return _float8.encode(x, exponents, old.codes.dtype, bits)
    if old.dtype == jnp.bfloat16:
        new = stochastic_round(x, bits >> (RANDOM_BITS - 16))
    elif old.dtype == jnp.float16:  # whose largest number is 65504
        largest = jnp.finfo(jnp.float16).max.astype(x.dtype)
        new = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
        new = new.astype(jnp.float16)
    else:
        new = x.astype(old.dtype)
    return new, new.astype(x.dtype)


def _written(
    stored: list[tuple[Float8Array, jax.Array]],
) -> list[tuple[Float8Array, jax.Array]]:
    """Returns the same; on TPUs the numbers are read from the codes once these exist.

    XLA updates parameters in a kernel of their own there. If that reads the old codes,
    the new ones do not take their memory: they are written elsewhere and copied.
    """

    def read_again(stored: Any) -> Any:
        arrays = jax.lax.optimization_barrier([new for new, _ in stored])
        decoded = _float8.decode(arrays, _float8.pack(arrays))
        return list(zip(arrays, decoded, strict=True))

    if not stored:
        return []
    return jax.lax.platform_dependent(stored, tpu=read_again, default=lambda x: x)


def _is_rounded(stored: Stored | None) -> bool:
    return isinstance(stored, Float8Array) or (
        stored is not None and stored.dtype == jnp.bfloat16
    )


@jax.custom_jvp
def _as_identity(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """Returns ``rounded``, whose derivative is that of ``x``."""
    del x
    return rounded


@_as_identity.defjvp
def _as_identity_jvp(primals, tangents):
    return _as_identity(*primals), tangents[0]


def random_bits(
    shape: tuple[int, ...],
    count: jax.typing.ArrayLike,
    leaf: jax.typing.ArrayLike,
    *,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three independent sets of 20 random bits for each coordinate of a leaf.

    They are a hash of the step, the leaf and the coordinate, so they are the same in
    every run, on every sharding and after a restart, and need no storage.

    Args:
      shape: Shape of the leaf.
      count: The step, a scalar.
      leaf: Index of the leaf among those of the tree.
      sharding: Sharding of the leaf's type. Under explicit mesh axes, what has no
        sharding is computed whole by every device.

    Returns:
      Three uint32 arrays of the given shape, below 2**20.
    """
    row, column = _row_and_column(shape, sharding)
    # Every operation depends on row and column together. If one depended on the row
    # alone or on the column alone, XLA would give it a kernel of its own. The step is
    # mixed by itself and enters before the first mix. Otherwise coordinates of one
    # row ^ column would take turns with the same bits.
    step = jax.lax.bitcast_convert_type(jnp.asarray(count, jnp.int32), jnp.uint32)
    step = _mix(step)
    # The barrier keeps the leaf's index from being a constant of the kernel, so all
    # leaves of one shape have the same kernel, compiled once.
    seed = jax.lax.optimization_barrier(
        jnp.asarray(leaf, jnp.uint32) * _u32(0x9E3779B9)
    )
    word = _mix((row ^ column ^ seed) + step)
    word = _mix(word ^ row)
    other = _mix(word ^ _u32(0x85EBCA6B))
    lower = (word & _u32(0xFFF)) << 8 | other >> 24
    return lower, other & _u32(0xFFFFF), word >> 12


@jax.custom_jvp
def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds ``x`` to bfloat16: away from zero if its lower half plus ``bits`` carries.

    Numbers that bfloat16 holds stay as they are, and so do infinities and NaN. No
    finite number becomes infinite. On average this is the identity, and its derivative
    is that of the identity.
    """
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign, magnitude = word & _u32(0x80000000), word & _u32(0x7FFFFFFF)
    largest, infinity = _u32(0x7F7FFFFF), _u32(0x7F800000)
    upper = (sign | jnp.minimum(magnitude + bits, largest)) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    # Keep this `where` last: it stops XLA on CPU (JAX 0.12) from computing the rounding
    # twice, and from copying.
    return jnp.where(magnitude < infinity, rounded, x.astype(jnp.bfloat16))


@stochastic_round.defjvp
def _stochastic_round_jvp(primals, tangents):
    return stochastic_round(*primals), tangents[0].astype(jnp.bfloat16)


def _row_and_column(
    shape: tuple[int, ...], sharding: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """Returns two 32-bit indices that together identify a coordinate of an array."""
    *rows, columns = shape or (1,)
    index = functools.partial(_linear_index, shape, sharding)
    if max(math.prod(rows), columns) <= 2**32:
        row = index(range(len(rows)), jnp.uint32)
        return row, index(range(len(rows), len(shape)), jnp.uint32)
    with jax.enable_x64(True):
        wide = index(range(len(shape)), jnp.uint64)
        return (wide >> 32).astype(jnp.uint32), wide.astype(jnp.uint32)


def _linear_index(
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    dimensions: range,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns the row-major index over some successive dimensions."""
    index = jnp.asarray(0, dtype)
    for d in dimensions:
        stride = math.prod(shape[d + 1 : dimensions.stop])
        along = jax.lax.broadcasted_iota(dtype, shape, d, out_sharding=sharding)
        index += along * jnp.asarray(stride, dtype)
    return index


def _mix(x: jax.Array) -> jax.Array:
    """Permutes 32-bit words so that every bit depends on every other.

    The constants are lowbias32's, https://nullprogram.com/blog/2018/07/31/.
    """
    x = (x ^ (x >> 16)) * _u32(0x7FEB352D)
    x = (x ^ (x >> 15)) * _u32(0x846CA68B)
    return x ^ (x >> 16)


def _u32(x: int) -> np.uint32:
    return np.uint32(x % 2**32)
