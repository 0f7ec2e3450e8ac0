"""Averages in 8 bits: floating-point codes that share an exponent in groups.

A group is 128 neighbours of the last dimension. Its largest number determines one
shared exponent, a byte, which stands for a power of two, the offset. A number x is
stored as the upper bits of the float32 x + offset: the exponent relative to the
offset's, and three bits of the mantissa. Far above the offset, codes are therefore
spaced like floating-point numbers, 8 to an octave; below it they are spaced evenly,
down to zero. Signed codes reach 2**-18 of the group's largest number, unsigned ones
2**-34. Everything but the addition of the offset is arithmetic of integers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 128
MANTISSA = 3
SHIFT = 23 - MANTISSA  # bits of a float32 that a code lacks
# Exponents of the offset for which every code is a finite, normal float32.
_LOWEST = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Float8Array:
    """Numbers in 8 bits, of which 128 neighbours share an exponent.

    A pytree with two leaves. The state of AdaMod holds one in the place of each array
    whose dtype is ``'float8'``.

    Attributes:
      codes: int8 for numbers of both signs, uint8 for numbers of at least 0; in the
        shape of the numbers, whose last dimension is a multiple of 128.
      exponents: uint8, one for each group of 128 codes: in the shape of ``codes`` but
        for the last dimension, which is 128 times smaller.
    """

    codes: Any
    exponents: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return self.codes.shape

    @property
    def signed(self) -> bool:
        """Whether the numbers may be negative."""
        return self.codes.dtype == jnp.int8

    @property
    def nbytes(self) -> int:
        """Bytes of codes and exponents."""
        return self.codes.nbytes + self.exponents.nbytes

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Returns the numbers as an array of ``dtype``, float32 or wider."""
        return _decode(self.codes, self.exponents).astype(dtype)

    @classmethod
    def quantize(cls, x: jax.typing.ArrayLike, *, signed: bool) -> "Float8Array":
        """Returns numbers rounded to the nearest code.

        Args:
          x: The numbers, real; the last dimension must be a multiple of 128.
          signed: Whether codes are to have a sign. Without one, there are twice as
            many octaves, and negative numbers become NaN.

        Raises:
          ValueError: If the last dimension is no multiple of 128.
        """
        x = jnp.asarray(x)
        if not is_grouped(x.shape):
            raise ValueError(
                f"the last dimension must be a multiple of {GROUP}, and the shape is "
                f"{x.shape}."
            )
        return encode(x, code_dtype(signed), jnp.uint32(2 ** (SHIFT - 1)))

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        if shape is None:  # a tree of something else, such as of shardings
            return f"Float8Array(codes={self.codes!r}, exponents={self.exponents!r})"
        sign = "signed" if self.signed else "unsigned"
        sizes = ",".join(map(str, shape))
        return f"Float8Array({sign} float8[{sizes}], an exponent for each {GROUP})"


def is_float8(x: Any) -> bool:
    """Whether this is a Float8Array, or what Flax NNX and Orbax make of one.

    Both turn a pytree of a class into a mapping by the names of its fields.
    """
    if isinstance(x, Float8Array):
        return True
    if not isinstance(x, Mapping) or set(x) != {"codes", "exponents"}:
        return False
    dtypes = [getattr(value, "dtype", None) for value in x.values()]
    return all(dtype in (jnp.int8, jnp.uint8) for dtype in dtypes)


def as_float8(x: Any) -> Any:
    """Returns such a mapping as the Float8Array that it was, and all else as it is."""
    if is_float8(x) and not isinstance(x, Float8Array):
        return Float8Array(x["codes"], x["exponents"])
    return x


def is_grouped(shape: tuple[int, ...]) -> bool:
    """Returns whether an array of this shape consists of whole groups."""
    return bool(shape) and math.prod(shape) > 0 and shape[-1] % GROUP == 0


def groups(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the exponents of an array of this shape."""
    return (*shape[:-1], shape[-1] // GROUP)


def sharding_of(shape: tuple[int, ...], sharding: Any) -> Any:
    """Returns a parameter's sharding for an array of its shape, or of its groups'.

    Where the last dimension has fewer groups than shards, or they do not divide it, the
    exponents are replicated along it.
    """
    try:
        sharding.shard_shape(shape)
    except ValueError:
        if not isinstance(sharding, jax.sharding.NamedSharding):
            raise
        spec = jax.sharding.PartitionSpec(*sharding.spec[: len(shape) - 1])
        return sharding.update(spec=spec)
    return sharding


def code_dtype(signed: bool) -> np.dtype:
    return np.dtype(np.int8 if signed else np.uint8)


def encode(x: jax.Array, dtype: np.dtype, bits: jax.Array) -> Float8Array:
    """Returns ``x`` in codes of ``dtype``, rounded away from zero if ``bits`` carry.

    Infinities and NaN have codes of their own, and do not enter the exponents. Zero
    stays zero. Unsigned numbers other than zero never become zero: an average of
    squares that did would divide by eps. Negative ones become NaN.

    Args:
      x: Real numbers.
      dtype: int8 or uint8.
      bits: uint32 below ``2**SHIFT``: random for stochastic rounding, half of it for
        rounding to the nearest.
    """
    signed = dtype == jnp.int8
    finite, infinity, nan = _special(signed)
    x = x.astype(jnp.float32)
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = word & 0x7FFFFFFF
    is_finite, is_nan = magnitude < 0x7F800000, magnitude > 0x7F800000
    if not signed:
        is_nan |= x < 0
    magnitude = jnp.where(is_finite, magnitude, 0)
    largest = largest_of_groups(magnitude)
    # The largest number, and what rounding and the offset may add to it, is below the
    # last finite code.
    top = ((largest + (2**SHIFT - 1)) >> SHIFT) + 1
    exponents = (top - finite + (2**MANTISSA - 1)) >> MANTISSA
    highest = ((255 << MANTISSA) - 1 - finite) >> MANTISSA
    exponents = jnp.clip(exponents, _LOWEST, highest)
    exponent = _of_members(exponents)
    offset = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    shifted = jax.lax.bitcast_convert_type(magnitude, jnp.float32) + offset
    upper = jax.lax.bitcast_convert_type(shifted, jnp.int32) + bits.astype(jnp.int32)
    code = (upper >> SHIFT) - (exponent << MANTISSA)
    least = 0 if signed else (magnitude > 0).astype(jnp.int32)
    code = jnp.clip(code, least, finite)
    code = jnp.where(is_finite, code, infinity)
    if signed:
        code = jnp.where(word < 0, -code, code)
    code = jnp.where(is_nan, nan, code)
    return Float8Array(code.astype(dtype), exponents.astype(jnp.uint8))


def _decode(codes: jax.Array, exponents: jax.Array) -> jax.Array:
    """Returns the float32 numbers."""
    signed = codes.dtype == jnp.int8
    finite, infinity, _ = _special(signed)
    code = codes.astype(jnp.int32)
    magnitude = jnp.abs(code)
    exponent = _of_members(exponents.astype(jnp.int32))
    offset = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    upper = magnitude + (exponent << MANTISSA)
    x = jax.lax.bitcast_convert_type(upper << SHIFT, jnp.float32) - offset
    x = jnp.where(
        magnitude > finite, jnp.where(magnitude == infinity, jnp.inf, jnp.nan), x
    )
    return jnp.where(code < 0, -x, x) if signed else x


def _special(signed: bool) -> tuple[int, int, int]:
    """Returns the last finite code, and those of infinity and of NaN."""
    return (126, 127, -128) if signed else (253, 255, 254)


def largest_of_groups(x: jax.Array) -> jax.Array:
    return jnp.max(x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP), axis=-1)


def _of_members(x: jax.Array) -> jax.Array:
    """Returns, for each member of a group, what its group has."""
    members = jnp.broadcast_to(x[..., None], (*x.shape, GROUP))
    return members.reshape(*x.shape[:-1], x.shape[-1] * GROUP)
