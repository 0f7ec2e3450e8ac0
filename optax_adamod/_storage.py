"""How averages are stored and loaded, in each dtype.

Averages in float32 and float64 are stored as they are. ``mu`` may be float16, rounded
to nearest and clipped to its largest number. Averages in bfloat16 and in 8 bits are
rounded stochastically. Rounded to nearest, an average stops moving once its steps are
smaller than half a unit in the last place. Rounded up or down at random, with
probabilities in proportion to the distances, it is right on average. The random bits
are a hash, so the state holds no key.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optax_adamod import _float8
from optax_adamod._float8 import Float8Array

Stored = jax.Array | Float8Array


class Averages(NamedTuple):
    """The averages of one leaf as they are stored."""

    mu: Any
    nu: Any
    bound: Any  # None if there is none

    @property
    def are_float8(self) -> bool:
        """Whether all are in 8 bits."""
        return all(isinstance(x, Float8Array) for x in self if x is not None)

    @property
    def any_float8(self) -> bool:
        """Whether some are in 8 bits."""
        return any(isinstance(x, Float8Array) for x in self)

    def load(
        self, dtypes: Sequence[np.dtype], m_per_root_v: jax.Array
    ) -> tuple[Any, ...]:
        """Returns the numbers, in the dtypes; m within what it can be beside v.

        Args:
          dtypes: One for each average.
          m_per_root_v: The largest ratio of m to the root of v that there can be.
        """
        numbers: Sequence[Any] = [
            None if x is None else _load(x).astype(dtype)
            for x, dtype in zip(self, dtypes, strict=True)
        ]
        m, v, s = numbers
        if isinstance(self.mu, Float8Array) and not isinstance(self.nu, Float8Array):
            # The smallest code of a group may be far more than a coordinate's v allows.
            # Only a unit of its rounding is taken, for b1 and b2 may have changed.
            least = jnp.abs(m) - _float8.smallest(self.mu)
            limit = jnp.maximum(m_per_root_v * jnp.sqrt(v), least)
            m = as_identity(m, jnp.clip(m, -limit, limit))
        return m, v, s

    def store(
        self, numbers: Sequence[Any], exponents: Sequence[Any], seed: "Seed"
    ) -> "Averages":
        """Returns new numbers, stored as the old are.

        Args:
          numbers: The new numbers.
          exponents: Those of groups, from :meth:`exponents_of`.
          seed: From which random bits for rounding follow.
        """
        bits: tuple[Any, ...] = None, None, None
        if any(map(_is_rounded_stochastically, self)):
            x = jax.typeof(numbers[0])
            width = 20 if self.any_float8 else 16
            bits = random_bits(x.shape, seed, width, sharding=x.sharding)
        stored = Averages(
            *(
                old if old is None else _store(x, old, e, b)
                for x, old, e, b in zip(numbers, self, exponents, bits, strict=True)
            )
        )
        if self.any_float8:  # the update reads the codes, and nothing is encoded for it
            stored = jax.lax.optimization_barrier(stored)
        return stored

    def exponents_of(self, numbers: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the exponents of new numbers in 8 bits, None for the others."""
        keys = {}
        for i, old in enumerate(self):
            if isinstance(old, Float8Array):
                v = numbers[1] if i == 2 else None
                key = _float8.key(numbers[i].astype(jnp.float32), v)
                keys[i] = _float8.grouped(key)
        # One reduction, for XLA does not fuse several.
        largest = jax.lax.reduce(
            [*keys.values()],
            [np.int32(_float8.SIGN)] * len(keys),
            lambda a, b: [*map(jnp.maximum, a, b)],
            (next(iter(keys.values())).ndim - 1,),
        )
        exponents: list[Any] = [None, None, None]
        for i, x in zip(keys, largest, strict=True):
            exponents[i] = _float8.exponents_of(x[..., None], self[i].signed)
        return tuple(exponents)


def _load(stored: Stored) -> jax.Array:
    return _float8.numbers(stored) if isinstance(stored, Float8Array) else stored


def _store(x: jax.Array, old: Stored, exponents: Any, bits: Any) -> Stored:
    if isinstance(old, Float8Array):
        members = _float8.grouped(x.astype(jnp.float32))
        random = _float8.grouped(bits.astype(jnp.int32))
        codes = _float8.encode(members, exponents, random, old.signed)
        return _float8.from_groups(codes, exponents, old.signed)
    if old.dtype == jnp.bfloat16:
        rounded = stochastic_round(x, bits & _u32(0xFFFF))
        # True but for NaN, which stays so. Keep this `where` last: it stops XLA on CPU
        # (JAX 0.12) from computing the rounding twice, and from copying.
        return jnp.where(x == x, rounded, jnp.bfloat16(jnp.nan))
    return clipped(x, old.dtype)


def clipped(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns numbers in a dtype; finite ones stay so in float16, up to 65504."""
    if dtype == jnp.float16:
        largest = jnp.finfo(jnp.float16).max.astype(x.dtype)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    return x.astype(dtype)


def _is_rounded_stochastically(stored: Stored | None) -> bool:
    return isinstance(stored, Float8Array) or (
        stored is not None and stored.dtype == jnp.bfloat16
    )


@jax.custom_jvp
def as_identity(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """Returns ``rounded``, whose derivative is that of ``x``."""
    del x
    return rounded


@as_identity.defjvp
def _as_identity_jvp(primals, tangents):
    return as_identity(*primals), tangents[0]


def real_dtype(*values: Any) -> np.dtype:
    """Returns the real dtype for arithmetic on ``values``: theirs, or float32."""
    wide = (x for x in values if not isinstance(x, Float8Array))
    bits = (jnp.finfo(jnp.result_type(x)).bits for x in wide if x is not None)
    return np.dtype(np.float64 if max(bits, default=32) == 64 else np.float32)


def zeros_like(
    field: str, dtype: np.dtype | Literal["float8"] | None, param: Any
) -> Stored:
    """Returns an average of zeros in the shards and kind of memory of ``param``.

    Args:
      field: Which of the averages it is.
      dtype: Its dtype, None for that of the parameter, real if the average is.
      param: The parameter.
    """
    shape = jnp.shape(param)
    if dtype == "float8":
        if _float8.is_narrowed(shape):
            codes = _zeros(param, _float8.code_dtype(field == "mu"), shape)
            shape = _float8.exponents_shape(shape)
            return Float8Array(codes, _zeros(param, np.dtype(np.uint8), shape))
        dtype = np.dtype(np.float32)
    elif field != "mu":
        dtype = dtype or real_dtype(param)
    elif dtype is None:
        dtype = jnp.result_type(param)
    elif jnp.iscomplexobj(param):
        dtype = np.result_type(dtype, np.complex64)
    return _zeros(param, dtype, shape)


def _zeros(param: Any, dtype: np.dtype, shape: tuple[int, ...]) -> jax.Array:
    sharding = getattr(param, "sharding", None)  # of a ShapeDtypeStruct too
    if not isinstance(param, jax.core.Tracer) and hasattr(sharding, "device_set"):
        sharding = _sharding_for(shape, sharding)
        default = next(iter(sharding.device_set)).default_memory().kind
        if sharding.memory_kind not in (None, default):
            # Shard by shard: no program of the device's writes to another memory.
            zeros = np.broadcast_to(np.zeros((), dtype), shape)
            return jax.make_array_from_callback(
                shape, sharding, lambda index: zeros[index]
            )
        if isinstance(sharding, NamedSharding):
            # Of one device too: a mesh with explicit axes is part of the type.
            if sharding.num_devices == 1:
                return jnp.zeros(shape, dtype, device=sharding)
            # Outside jit, jnp.zeros_like makes all of them on one device, and copies.
            zeros = jax.jit(
                functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding
            )
            return zeros()
    if shape == jnp.shape(param):
        return jnp.zeros_like(param, dtype=dtype)
    if isinstance(param, jax.core.Tracer):
        # Of the parameter, so that shards and varying axes are those of its type.
        return jnp.zeros_like(_float8.grouped(param)[..., 0], dtype=dtype)
    return jnp.zeros(shape, dtype)


def _sharding_for(shape: tuple[int, ...], sharding: Any) -> Any:
    """Returns a parameter's sharding for an array of its shape, or of its groups'.

    Where the last dimension has fewer groups than shards, or they do not divide it, the
    exponents are replicated along it.
    """
    try:
        sharding.shard_shape(shape)
    except ValueError:
        if not isinstance(sharding, NamedSharding):
            raise
        return sharding.update(spec=PartitionSpec(*sharding.spec[: len(shape) - 1]))
    return sharding


class Seed(NamedTuple):
    """What the random bits of one leaf at one step are a hash of, in uint32."""

    step: tuple[jax.Array, jax.Array]  # two words, the same for all leaves
    leaf: jax.Array  # shape=()

    @staticmethod
    def step_words(count: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns the words of a step."""
        word = jax.lax.bitcast_convert_type(jnp.asarray(count, jnp.int32), jnp.uint32)
        first = mix(mix(word))
        return first, mix(first + _u32(0x85EBCA6B))

    @staticmethod
    def leaf_word(path: Any, salt: str = "") -> np.uint32:
        """Returns the word of a leaf: of its path, whatever else the tree holds."""
        return np.uint32(zlib.crc32((salt + jax.tree_util.keystr(path)).encode()))

    @classmethod
    def of(cls, step: Any, leaf: jax.typing.ArrayLike, *arrays: Any) -> "Seed":
        """Returns the seed of a leaf that consists of these arrays.

        Members inside vmap have bits of their own, and so have shards inside shard_map,
        unless its ``check_vma=False`` hides what varies.
        """
        parts: list[Any] = jax.tree.leaves(arrays)
        # The barrier keeps the leaf from being a constant of the kernel, so all leaves
        # of one shape have the same kernel, compiled once.
        leaf = jax.lax.optimization_barrier(jnp.asarray(leaf, jnp.uint32))
        varying = {axis for x in parts for axis in varying_axes(x)}
        for axis in sorted(varying, key=str):
            index = jax.lax.axis_index(axis).astype(jnp.uint32)
            leaf = mix(leaf + (index + 1) * _u32(0x9E3779B9))
        return cls(step, _of_member(leaf, *map(jax.lax.stop_gradient, parts)))


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """Returns the mesh axes along which shard_map has other values of ``x``."""
    kind: Any = jax.typeof(x)
    # From JAX 0.10 on a field of the former name is gone.
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


@jax.custom_batching.custom_vmap
def _of_member(leaf: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Returns the word of a leaf; inside vmap a word of its own for each member."""
    del arrays
    return leaf


@_of_member.def_vmap
def _of_member_vmap(axis_size, in_batched, leaf, *arrays):
    if not in_batched[0]:
        leaf = leaf[None]
    members = jax.lax.iota(jnp.uint32, axis_size) + 1
    members = members.reshape(-1, *[1] * (leaf.ndim - 1))
    words = mix(leaf + members * _u32(0x9E3779B9))
    return _of_member(words, *arrays), True  # which an outer vmap batches again


def random_bits(
    shape: tuple[int, ...],
    seed: Seed,
    width: Literal[16, 20],
    *,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three independent sets of random bits for each coordinate of a leaf.

    They are a hash of the step, the leaf and the coordinate, so they are the same in
    every run, on every sharding and after a restart, and need no storage.

    Args:
      shape: Shape of the leaf.
      seed: The step and the leaf.
      width: How many bits a set has: what a float32 has more than bfloat16, or a code
        of 8 bits.
      sharding: Sharding of the leaf's type. Under explicit mesh axes, what has no
        sharding is computed whole by every device.

    Returns:
      Three uint32 arrays of the given shape, below ``2**width``.
    """
    return sets_of_bits(*_row_and_column(shape, sharding), seed, width)


def sets_of_bits(
    row: jax.Array, column: jax.Array, seed: Seed, width: Literal[16, 20]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the random bits of coordinates, given as uint32; see random_bits."""
    # Every operation depends on row and column together. If one depended on either
    # alone, XLA would give it a kernel of its own, and fuse the leaves that share it.
    place = (row + column) * _u32(0x9E3779B9) ^ column
    first = mix((place ^ seed.leaf) + seed.step[0])
    second = mix((first ^ row) + seed.step[1])
    if width == 16:  # so that mu and bound take one word
        return first >> 16, second >> 16, first & _u32(0xFFFF)
    return (
        first >> 12,
        (first << 8 | second >> 24) & _u32(0xFFFFF),
        second & _u32(0xFFFFF),
    )


@jax.custom_jvp
def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds ``x`` to bfloat16: away from zero if its lower half plus ``bits`` carries.

    Numbers that bfloat16 holds stay as they are, and so do infinities and NaN. No
    finite number becomes infinite. On average this is the identity, and its derivative
    is that of the identity.
    """
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # From the last finite number on nothing is added: not to infinity, nor to NaN.
    below = (word & _u32(0x7FFFFFFF)) < _u32(0x7F7F0000)
    upper = (word + jnp.where(below, bits, 0)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


@stochastic_round.defjvp
def _stochastic_round_jvp(primals, tangents):
    return stochastic_round(*primals), tangents[0].astype(jnp.bfloat16)


def _row_and_column(
    shape: tuple[int, ...], sharding: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """Returns two 32-bit indices that together identify a coordinate of an array."""
    *rows, columns = shape or (1,)
    index = functools.partial(linear_index, shape, sharding)
    sizes = [x for x in (math.prod(rows), columns) if isinstance(x, int)]
    if all(x <= 2**32 for x in sizes):  # and symbols of jax.export
        row = index(range(len(rows)), jnp.uint32)
        return row, index(range(len(rows), len(shape)), jnp.uint32)
    with jax.enable_x64(True):
        wide = index(range(len(shape)), jnp.uint64)
        return (wide >> 32).astype(jnp.uint32), wide.astype(jnp.uint32)


def linear_index(
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


def mix(x: Any) -> jax.Array:
    """Permutes 32-bit words so that every bit depends on every other.

    The constants are lowbias32's, https://nullprogram.com/blog/2018/07/31/.
    """
    x = (x ^ (x >> 16)) * _u32(0x7FEB352D)
    x = (x ^ (x >> 15)) * _u32(0x846CA68B)
    return x ^ (x >> 16)


def _u32(x: int) -> np.uint32:
    return np.uint32(x % 2**32)
