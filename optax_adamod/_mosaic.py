"""The kernel for TPUs, by Mosaic: it advances the averages and writes the update.

The averages are advanced in place, and the update takes the place of the gradient. XLA
would make it of the new codes by broadcasting exponents to the size of the leaf.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optax_adamod import _groups, _storage
from optax_adamod._float8 import GROUP, Float8Array
from optax_adamod._storage import Averages, Seed


def update(
    step: Any, seed: Seed, g: jax.Array, stored: Averages, *, interpret: bool = False
) -> tuple[jax.Array, Averages]:
    """Returns the update and the averages after a step, by a kernel of Mosaic."""
    scalars, tree = _groups.scalars(step), jax.tree.structure(step)
    arrays = [x for x in stored if x is not None]
    n = len(arrays)
    words = jnp.stack([*seed.step, seed.leaf])
    state = [*(x.codes for x in arrays), *(x.exponents for x in arrays)]
    strides = tuple(math.prod(g.shape[d + 1 : -1]) for d in range(g.ndim - 2))
    sharding = jax.typeof(g).sharding

    def call(scalars, words, g, *state):
        starts = [jnp.int32(0)] * (max(g.ndim, 2) - len(g.shape))
        for axes, length in zip(spec, g.shape, strict=True):
            start = jnp.int32(0)
            if axes:
                start = jax.lax.axis_index(axes) * length
            starts.append(start)
        inputs = scalars, words, jnp.stack(starts), g, *state
        return _local(tree, strides, interpret, *inputs)

    spec = _groups.full_spec(sharding, g.ndim)
    if any(kind == AxisType.Explicit for kind in _groups.axis_types(sharding)):
        call = _groups.by_shards(call, (scalars, words, g, *state), (g, *state))
    else:
        spec = (None,) * g.ndim
    updates, *new = call(scalars, words, g, *state)
    return updates, Averages(*_groups.three(map(Float8Array, new[:n], new[n:])))


def _local(
    tree: Any, strides: tuple[int, ...], interpret: bool, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Advances the averages of one chip's shard of a leaf; returns the update first."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    scalars, words, starts, g, *state = arrays
    n = len(state) // 2
    shapes = [x.shape for x in (g, *state)]
    *lead, rows, columns = (1,) * max(0, 2 - g.ndim) + g.shape
    groups = columns // GROUP
    # As XLA lays exponents out, so that they need not be copied.
    transposed = _padded(groups, rows) < _padded(rows, groups)
    outer = math.prod(lead)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(outer, rows, -1)

    exponents = [flat(x) for x in state[n:]]
    if transposed:
        exponents = [x.swapaxes(1, 2) for x in exponents]
    inputs = _groups.varying_alike(
        [scalars, words, starts, *map(flat, (g, *state[:n])), *exponents]
    )
    unit = GROUP if transposed else 32
    high = rows if rows <= unit else unit
    widths = [x * GROUP for x in range(1, groups + 1) if groups % x == 0]
    wide = max(x for x in widths if x == GROUP or high * x <= 2**18)

    def block(x: jax.Array) -> pl.BlockSpec:
        if x.shape[1:] == (rows, columns):
            return pl.BlockSpec((1, high, wide), lambda i, j, k: (i, j, k))
        if transposed:
            return pl.BlockSpec((1, groups, high), lambda i, j, _: (i, 0, j))
        return pl.BlockSpec((1, high, groups), lambda i, j, _: (i, j, 0))

    big = inputs[3:]
    new = pl.pallas_call(
        functools.partial(
            _kernel, tree=tree, transposed=transposed,
            lead=tuple(lead), strides=strides,
        ),
        grid=(outer, -(-rows // high), columns // wide),
        in_specs=[
            *[pl.BlockSpec(memory_space=tpu.SMEM)] * 3,
            *map(block, big),
        ],
        out_specs=[*map(block, big)],
        out_shape=[*map(_groups.struct, big)],
        input_output_aliases={3 + i: i for i in range(len(big))},
        scratch_shapes=[tpu.VMEM((high, groups), jnp.int32)] * 2,
        interpret=interpret,
        name="adamod_float8",
    )(*inputs)  # fmt: skip
    new = [
        *new[: n + 1],
        *(x.swapaxes(1, 2) if transposed else x for x in new[n + 1 :]),
    ]
    return tuple(x.reshape(shape) for x, shape in zip(new, shapes, strict=True))


def _padded(rows: int, columns: int) -> int:
    """Returns how many numbers the tiles of a matrix have room for."""
    return -(-rows // 8) * 8 * (-(-columns // GROUP) * GROUP)


def _kernel(scalars, words, starts, g, *refs, tree, transposed, lead, strides):
    """Advances a block of averages and writes the update in the gradient's place.

    ``scalars`` are the numbers of the step. The exponents of the averages share an
    int32, one byte each: ``old`` has those of all groups of the block's rows, ``new``
    gets them.
    """
    from jax.experimental import pallas as pl

    n = (len(refs) - 3) // 4
    codes, exponents = refs[:n], refs[n : 2 * n]
    updates, new_codes = refs[2 * n], refs[2 * n + 1 : 3 * n + 1]
    new_exponents, (old, new) = refs[3 * n + 1 : 4 * n + 1], refs[4 * n + 1 :]
    step = tree.unflatten([scalars[i] for i in range(tree.num_leaves)])
    _, rows, width = g.shape
    here, last = pl.program_id(2), pl.num_programs(2) - 1
    turned = (lambda x: x.T) if transposed else (lambda x: x)

    @pl.when(here == 0)
    def _():
        packed = functools.reduce(
            lambda a, x: a << 8 | x, [x[0].astype(jnp.int32) for x in exponents]
        )
        old[...] = turned(packed)

    # The row among those of the whole leaf.
    first = starts[len(lead)] + pl.program_id(1) * rows
    for d, size in enumerate(lead):
        below = math.prod(lead[d + 1 :])
        index = starts[d] + pl.program_id(0) // below % size
        first += index * strides[d]
    row = first + jax.lax.broadcasted_iota(jnp.int32, (rows, GROUP), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)

    def group(k, _):
        index = here * (width // GROUP) + k
        members = pl.ds(pl.multiple_of(k * GROUP, GROUP), GROUP)
        packed = jnp.where(lane == index, old[...], 0)
        packed = jnp.max(packed, axis=1, keepdims=True)
        column = starts[len(lead) + 1] + index * GROUP
        column += jax.lax.broadcasted_iota(jnp.int32, (rows, GROUP), 1)
        bits = _storage.sets_of_bits(
            row.astype(jnp.uint32),
            column.astype(jnp.uint32),
            Seed((words[0], words[1]), words[2]),
            20,
        )
        gradients = g[0, :, members].astype(jnp.float32)
        advanced_codes, advanced_exponents = _groups.advanced(
            step,
            gradients,
            [x[0, :, members].astype(jnp.int32) & (-1 if i == 0 else 0xFF)
             for i, x in enumerate(codes)],
            [packed >> 8 * (n - 1 - i) & 0xFF for i in range(n)],
            bits,
        )  # fmt: skip
        for ref, x in zip(new_codes, advanced_codes, strict=True):
            ref[0, :, members] = x.astype(ref.dtype)
        packed = functools.reduce(lambda a, x: a << 8 | x, advanced_exponents)
        new[...] = jnp.where(lane == index, packed, new[...])
        numbers = _groups.decoded(advanced_codes, advanced_exponents)
        update = step.update(gradients, *numbers)
        updates[0, :, members] = update.astype(updates.dtype)
        return 0

    jax.lax.fori_loop(0, width // GROUP, group, 0)

    @pl.when(here == last)
    def _():
        packed = turned(new[...])
        for i, ref in enumerate(new_exponents):
            ref[0] = (packed >> 8 * (n - 1 - i) & 0xFF).astype(ref.dtype)
