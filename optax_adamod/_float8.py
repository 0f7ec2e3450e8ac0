"""Averages in 8 bits: floating-point codes that share an exponent in groups.

A group is 128 neighbours of the last dimension. Its largest number determines one
shared exponent, a byte, which stands for a power of two, the offset. A number x is
stored as the upper bits of the float32 |x| + offset: the exponent relative to the
offset's, and three bits of the mantissa. Far above the offset, codes are therefore
spaced like floating-point numbers, 8 to an octave; below it they are spaced evenly,
down to zero. Signed codes reach 2**-18 of the group's largest number, unsigned ones
2**-34. Everything but the addition of the offset is arithmetic of integers.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 128
MANTISSA = 3
SHIFT = 23 - MANTISSA  # bits of a float32 that a code lacks
INFINITY = 0x7F800000  # as the bits of a float32, like the following
SIGN = -0x80000000
# The largest numbers. Of signed ones 2**64: no gradient beyond has a finite square, and
# an average of gradients must not outgrow the root of that of their squares.
LARGEST_SIGNED, LARGEST_UNSIGNED = 0x5F800000, 0x7F600000
ALL_NAN = 255  # the exponent of a group that is NaN


class Float8Array(NamedTuple):
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
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self.codes.size

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
        return jax.jit(numbers)(self).astype(dtype)

    @classmethod
    def quantize(cls, x: jax.typing.ArrayLike, *, signed: bool) -> "Float8Array":
        """Returns numbers rounded to the nearest code.

        A group with an infinity or NaN among its members becomes NaN. Finite numbers
        saturate: at 2**64 with a sign, at 2.98e38 without one. Numbers that were
        dequantized stay as they are. The largest of a group may lose 2**-15 of itself
        even where a code is near, so 1 with a sign becomes 0.99997.

        Args:
          x: The numbers, real; the last dimension must be a multiple of 128.
          signed: Whether codes are to have a sign. Without one, there are twice as
            many octaves, and negative numbers become NaN.

        Raises:
          TypeError: If the numbers are complex.
          ValueError: If the last dimension is no multiple of 128.
        """
        x = jnp.asarray(x)
        if jnp.iscomplexobj(x):
            raise TypeError(f"Float8Array holds real numbers, got {x.dtype}.")
        if not is_grouped(x.shape):
            raise ValueError(
                f"the last dimension must be a multiple of {GROUP}, and the shape is "
                f"{x.shape}."
            )
        return nearest(x, signed)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        if shape is None:  # a tree of something else, such as of shardings
            return f"Float8Array(codes={self.codes!r}, exponents={self.exponents!r})"
        sign = "signed" if self.signed else "unsigned"
        sizes = ",".join(map(str, shape))
        return f"Float8Array({sign} float8[{sizes}], an exponent for each {GROUP})"


def is_float8(x: Any) -> bool:
    """Whether this is a Float8Array, or the mapping that Orbax makes of one."""
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
    return bool(shape) and 0 not in shape and shape[-1] % GROUP == 0


def is_narrowed(shape: tuple[int, ...]) -> bool:
    """Returns whether averages of this shape are kept in 8 bits, if asked for.

    Short vectors, as of norms and biases, are not: they are few of a model's numbers,
    and on a TPU each would take more kernels than a matrix.
    """
    return is_grouped(shape) and (len(shape) > 1 or math.prod(shape) >= 2**16)


def exponents_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the exponents of an array of this shape."""
    return (*shape[:-1], shape[-1] // GROUP)


def code_dtype(signed: bool) -> np.dtype:
    """Returns the dtype of codes."""
    return np.dtype(np.int8 if signed else np.uint8)


def grouped(x: jax.Array) -> jax.Array:
    """Returns ``x`` with the members of a group as the last dimension."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def from_groups(codes: jax.Array, exponents: jax.Array, signed: bool) -> Float8Array:
    """Returns the array of codes (..., groups, 128) and exponents (..., groups, 1)."""
    *rows, groups, _ = codes.shape
    codes = codes.astype(code_dtype(signed)).reshape(*rows, groups * GROUP)
    return Float8Array(codes, exponents.astype(jnp.uint8).reshape(*rows, groups))


def numbers(x: Float8Array) -> jax.Array:
    """Returns the float32 numbers of an array."""
    groups = grouped(x.codes).shape
    exponents = jnp.broadcast_to(x.exponents.astype(jnp.int32)[..., None], groups)
    exponents = exponents.reshape(x.codes.shape)
    return decode(x.codes.astype(jnp.int32), exponents, x.signed)


@functools.partial(jax.jit, static_argnames="signed")
def nearest(x: jax.Array, signed: bool, v: jax.Array | None = None) -> Float8Array:
    """Returns numbers rounded to the nearest code; a bound's with their v."""
    x = grouped(x.astype(jnp.float32))
    v = v if v is None else grouped(v)
    is_bad = ~jnp.isfinite(x) if signed else ~jnp.isfinite(x) | (x < 0)

    def coded(exponents):
        codes = encode(x, exponents, np.int32(2 ** (SHIFT - 1)), signed)
        return from_groups(codes, exponents, signed)

    exponents = exponents_of(jnp.max(key(x, v), axis=-1, keepdims=True), signed)
    # Codes stay what they were, though the largest may have been rounded down to where
    # a smaller exponent would do.
    stays = grouped(numbers(coded(exponents + 1))) == x
    exponents += stays.all(-1, keepdims=True)
    return coded(jnp.where(is_bad.any(-1, keepdims=True), ALL_NAN, exponents))


def smallest(x: Float8Array) -> jax.Array:
    """Returns the smallest number above 0 of each number's group, in their shape."""
    return numbers(x._replace(codes=jnp.ones_like(x.codes)))


# In the following, codes and exponents are int32, so that kernels call the same; the
# sign of a code is extended. Exponents broadcast to the members of their groups.


def decode(codes: jax.Array, exponents: jax.Array, signed: bool) -> jax.Array:
    """Returns the float32 numbers of codes."""
    offset = exponents << 23
    magnitude = codes & 0x7F if signed else codes
    # Infinity less infinity in groups that are NaN, whose codes are 0.
    x = _float((magnitude << SHIFT) + offset) - _float(offset)
    return _float(_bits(x) | (codes & SIGN)) if signed else x


def magnitudes(x: jax.Array) -> jax.Array:
    """Returns the bits of numbers without the sign; in order, NaN the largest."""
    return _bits(x) & 0x7FFFFFFF


def key(x: jax.Array, v: jax.Array | None = None) -> jax.Array:
    """Returns what the maximum of a group is taken of: the magnitudes.

    Given v for a bound, they are negative where v is 0. The rate is 1 / eps there and
    says nothing, so it counts only if the group has no other.
    """
    asleep = 0 if v is None else jnp.where(v == 0, np.int32(SIGN), np.int32(0))
    return magnitudes(x) | asleep


def exponents_of(largest: jax.Array, signed: bool) -> jax.Array:
    """Returns the exponents of groups, of the largest of their magnitudes."""
    last, limit = (127, LARGEST_SIGNED) if signed else (255, LARGEST_UNSIGNED)
    largest &= ~SIGN
    # An average of squares may overflow to infinity. NaN, and infinite gradients, may
    # not pass unseen.
    is_bad = largest >= (INFINITY if signed else INFINITY + 1)
    # The number, and what rounding and the offset may add, is below the last code.
    top = ((jnp.minimum(largest, limit) + (2**SHIFT - 1)) >> SHIFT) + 1
    needed = (top - last + (2**MANTISSA - 1)) >> MANTISSA
    # From 1 on the offset, and so every code, stands for a normal float32.
    return jnp.where(is_bad, ALL_NAN, jnp.maximum(needed, 1))


def encode(
    x: jax.Array, exponents: jax.Array, bits: jax.typing.ArrayLike, signed: bool
) -> jax.Array:
    """Returns the codes of ``x``, rounded away from zero if ``bits`` carry.

    Zero stays zero. Unsigned numbers other than zero never become zero: an average of
    squares that did would divide by eps. Those beyond the last code saturate.

    Args:
      x: float32 numbers.
      exponents: What :func:`exponents_of` makes of them.
      bits: int32 below ``2**SHIFT``: random for stochastic rounding, half of it for
        rounding to the nearest.
      signed: Whether codes have a sign.
    """
    offset = exponents << 23
    limit = LARGEST_SIGNED
    if not signed:
        limit = jnp.minimum(LARGEST_UNSIGNED, offset + (255 << SHIFT))
    magnitude = jnp.minimum(magnitudes(x), limit)
    shifted = _bits(_float(magnitude) + _float(offset))
    codes = (shifted + (bits - offset)) >> SHIFT
    if signed:
        return codes | ((_bits(x) >> 24) & 0x80)
    return jnp.maximum(codes, jnp.minimum(magnitude, 1))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
