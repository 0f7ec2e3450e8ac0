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
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

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
        (x,) = decode([self], pack([self]))
        return x.astype(dtype)

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
        dtype, half = code_dtype(signed), 2 ** (SHIFT - 1)
        (shared,) = exponents([x], [dtype])
        return encode(x, shared, dtype, half)[0]

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


def shard_shape(x: Any) -> tuple[int, ...]:
    """Returns the shape of a shard, as far as explicit mesh axes split the array."""
    sharding = jax.typeof(x).sharding
    shape = list(jnp.shape(x))
    for dimension, axes in enumerate(sharding.spec):
        if axes is not None:
            axes = (axes,) if isinstance(axes, str) else axes
            shape[dimension] //= math.prod(sharding.mesh.shape[x] for x in axes)
    return tuple(shape)


def code_dtype(signed: bool) -> np.dtype:
    return np.dtype(np.int8 if signed else np.uint8)


def pack(arrays: Sequence[Float8Array]) -> jax.Array:
    """Returns the exponents of up to three arrays as one array of int32.

    A TPU broadcasts exponents by moving them to another layout first, in a kernel for
    each array.
    """
    exponents = [x.exponents.astype(jnp.int32) for x in arrays]
    return functools.reduce(lambda packed, x: packed << 8 | x, exponents)


def decode(arrays: Sequence[Float8Array], packed: jax.Array) -> list[jax.Array]:
    """Returns the float32 numbers of arrays of one shape, with their packed exponents.

    Args:
      arrays: The arrays.
      packed: What :func:`pack` makes of them.
    """
    members = _of_members(packed, arrays[0].codes.astype(jnp.int32))
    shifts = range(8 * (len(arrays) - 1), -1, -8)
    return [
        _numbers(x.codes.astype(jnp.int32), members >> shift & 0xFF, x.signed)
        for x, shift in zip(arrays, shifts, strict=True)
    ]


def exponents(
    numbers: Sequence[jax.Array], dtypes: Sequence[np.dtype]
) -> tuple[jax.Array, ...]:
    """Returns the shared exponents of arrays of one shape, to be stored in codes.

    Infinities and NaN have no part in them.

    Args:
      numbers: Real arrays.
      dtypes: int8 or uint8, of the codes of each.
    """
    needed = tuple(map(_needed, numbers, dtypes))
    zeros = (np.uint8(0),) * len(needed)

    def largest(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]):
        return tuple(map(jnp.maximum, a, b))

    # One reduction, for XLA does not fuse several where groups are few on a GPU.
    grouped = tuple(map(_grouped, needed))
    found = jax.lax.reduce(grouped, zeros, largest, (grouped[0].ndim - 1,))
    shape = groups(numbers[0].shape)
    return tuple(x.reshape(shape) for x in found)


def _needed(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the exponents that numbers need, of which a group has the largest."""
    signed = dtype == jnp.int8
    finite, _, _ = _special(signed)
    magnitude, _, _ = _magnitude(x, signed)
    # The number, and what rounding and the offset may add to it, is below the last
    # finite code.
    top = ((magnitude + (2**SHIFT - 1)) >> SHIFT) + 1
    needed = (top - finite + (2**MANTISSA - 1)) >> MANTISSA
    highest = ((255 << MANTISSA) - 1 - finite) >> MANTISSA
    return jnp.clip(needed, _LOWEST, highest).astype(jnp.uint8)


def encode(
    x: jax.Array, exponents: jax.Array, dtype: np.dtype, bits: jax.typing.ArrayLike
) -> tuple[Float8Array, jax.Array]:
    """Returns ``x`` in codes, and the numbers of these.

    It is rounded away from zero if ``bits`` carry. Infinities and NaN have codes of
    their own. Zero stays zero. Unsigned numbers other than zero never become zero: an
    average of squares that did would divide by eps. Negative ones become NaN.

    Args:
      x: Real numbers.
      exponents: What :func:`exponents` makes of them.
      dtype: int8 or uint8.
      bits: uint32 below ``2**SHIFT``: random for stochastic rounding, half of it for
        rounding to the nearest.
    """
    signed = dtype == jnp.int8
    finite, infinity, nan = _special(signed)
    magnitude, is_finite, is_nan = _magnitude(x, signed)
    exponent = _of_members(exponents, magnitude)
    offset = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    shifted = jax.lax.bitcast_convert_type(magnitude, jnp.float32) + offset
    upper = jax.lax.bitcast_convert_type(shifted, jnp.int32)
    upper += jnp.asarray(bits).astype(jnp.int32)
    code = (upper >> SHIFT) - (exponent << MANTISSA)
    least = 0 if signed else (magnitude > 0).astype(jnp.int32)
    code = jnp.clip(code, least, finite)
    code = jnp.where(is_finite, code, infinity)
    if signed:
        code = jnp.where(jnp.signbit(x), -code, code)
    code = jnp.where(is_nan, nan, code)
    return Float8Array(code.astype(dtype), exponents), _numbers(code, exponent, signed)


def _magnitude(x: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the words of numbers without the sign, and which are finite, and NaN.

    The words of infinities and NaN are 0.
    """
    x = x.astype(jnp.float32)
    magnitude = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    is_finite, is_nan = magnitude < 0x7F800000, magnitude > 0x7F800000
    if not signed:
        is_nan |= x < 0
    return jnp.where(is_finite, magnitude, 0), is_finite, is_nan


def _numbers(code: jax.Array, exponent: jax.Array, signed: bool) -> jax.Array:
    """Returns the float32 numbers of codes with their exponents, all int32."""
    finite, infinity, _ = _special(signed)
    magnitude = jnp.abs(code)
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


def _split(x: jax.Array) -> jax.Array:
    """Returns ``x`` with 8 rows as a dimension of their own, if shards have whole 8s.

    A TPU keeps arrays in tiles of 8 rows and 128 columns. In this shape a group is a
    row of one tile, so that it takes no copy to see groups. Where XLA splits rows as it
    likes, 8 must divide those of every device, lest it move rows between devices.
    """
    if x.ndim < 2 or shard_shape(x)[-2] % (8 * _auto_devices(x)):
        return x
    return x.reshape(*x.shape[:-2], x.shape[-2] // 8, 8, x.shape[-1])


def _auto_devices(x: jax.Array) -> int:
    """Returns over how many devices XLA may split ``x``, unknown to its type."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return jax.device_count()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in sizes if kind == AxisType.Auto)


def _grouped(x: jax.Array) -> jax.Array:
    """Returns ``x`` with groups as the last dimension."""
    x = _split(x)
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def first_of_groups(x: jax.Array) -> jax.Array:
    """Returns an array in the shape, and the sharding, of exponents."""
    return _grouped(x)[..., 0].reshape(groups(x.shape))


def _of_members(x: jax.Array, words: jax.Array) -> jax.Array:
    """Returns as int32, for each member of a group, what its group has.

    Args:
      x: Integers, one for each group.
      words: int32 in the shape of the members, of which the sign has no part.
    """
    members = _split(x)
    rows = members.shape[:-1]
    members = jnp.broadcast_to(members[..., None], (*members.shape, GROUP))
    members = members.reshape(*rows, words.shape[-1]).reshape(words.shape)
    # Zero, but XLA does not see it. What it saw to depend on the groups alone, it would
    # compute for them, in kernels of their own.
    zero = (words & 0x7FFFFFFF) >> 31
    return (members ^ zero.astype(x.dtype)).astype(jnp.int32)
