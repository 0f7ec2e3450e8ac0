"""The kernel for NVIDIA's GPUs, by Triton: it advances the averages in place.

XLA then makes the update from the new codes, in one fusion with whatever follows in
the chain.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_adamod import _groups, _storage
from optax_adamod._float8 import GROUP, Float8Array
from optax_adamod._storage import Averages, Seed

# Of the blocks tried on an H100 those of 8 groups and 4 warps were the fastest.
GROUPS_A_BLOCK, WARPS = 8, 4


def advance(
    step: Any, seed: Seed, g: jax.Array, stored: Averages, *, interpret: bool = False
) -> Averages:
    """Returns the averages after a step, by a kernel of Triton."""
    scalars, tree = _groups.scalars(step), jax.tree.structure(step)
    arrays = [x for x in stored if x is not None]
    sharding = jax.typeof(g).sharding
    inputs = (
        scalars, jnp.stack(seed.step), seed.leaf, *_indices(g.shape, sharding), g,
        *(x.codes for x in arrays), *(x.exponents for x in arrays),
    )  # fmt: skip
    n = len(arrays)
    call = functools.partial(_local, tree, interpret)
    if any(kind == AxisType.Auto for kind in _groups.axis_types(sharding)):
        call = _partitioned(tree, interpret, n)
    if any(kind == AxisType.Explicit for kind in _groups.axis_types(sharding)):
        call = _groups.by_shards(call, inputs, inputs[6:])
    new = call(*inputs)
    return Averages(*_groups.three(map(Float8Array, new[:n], new[n:])))


def _indices(
    shape: tuple[int, ...], sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """Returns the complement of each row, and the first column of each group.

    They are partitioned as the leaf is, so that random bits do not depend on that.
    """
    spec = _groups.full_spec(sharding, len(shape))
    rows, columns = (
        sharding.update(spec=PartitionSpec(*x)) for x in (spec[:-1], spec[-1:])
    )
    groups = (shape[-1] // GROUP,)
    row = _storage.linear_index(shape[:-1], rows, range(len(shape) - 1), jnp.uint32)
    column = jax.lax.broadcasted_iota(jnp.uint32, groups, 0, out_sharding=columns)
    # Complemented, so that XLA writes the rows once for all leaves, as it does no iota.
    return ~row, column * np.uint32(GROUP)


def _partitioned(tree: Any, interpret: bool, n: int) -> Callable[..., Any]:
    """Returns the GPU's kernel, which XLA splits over devices with its arrays."""
    local = functools.partial(_local, tree, interpret)
    call = custom_partitioning(local)

    def partition(mesh, inputs, outputs):
        del outputs
        g = inputs[5]
        *rows, columns = _groups.full_spec(g.sharding, g.ndim)
        # Shards that cut groups are put together.
        axes = (columns,) if isinstance(columns, str) else columns or ()
        if g.shape[-1] % (GROUP * math.prod(mesh.shape[axis] for axis in axes)):
            columns = None

        def placed(*spec: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*spec))

        leaf = placed(*rows, columns)
        small = placed(), placed(), placed(), placed(*rows), placed(columns)
        return mesh, local, (leaf,) * (2 * n), (*small, leaf, *(leaf,) * (2 * n))

    members, groups = ", ".join(["... (g k)"] * n), ", ".join(["... g"] * n)
    rule = f"h, w, , ..., g, ... (g k), {members}, {groups} -> {members}, {groups}"
    call.def_partition(partition=partition, sharding_rule=rule, k=GROUP)
    return call


def _local(tree: Any, interpret: bool, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Advances the averages of one device's shard of a leaf."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scalars, words, leaf, rows, columns, g, *state = arrays
    n = len(state) // 2
    shapes = [x.shape for x in state]
    per_row, groups = columns.size, math.prod(shapes[n])

    flattened = [x.reshape(groups, GROUP) for x in (g, *state[:n])]
    flattened += [x.reshape(groups) for x in state[n:]]
    inputs = [scalars, words, leaf.reshape(1), rows.reshape(-1), columns, *flattened]
    inputs = _groups.varying_alike(inputs)
    state = inputs[6:]
    params = triton.CompilerParams(num_warps=WARPS, num_stages=1)
    new = pl.pallas_call(
        functools.partial(_kernel, tree=tree, groups=groups, per_row=per_row),
        grid=(-(-groups // GROUPS_A_BLOCK),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(state),
        out_shape=[*map(_groups.struct, state)],
        input_output_aliases={6 + i: i for i in range(len(state))},
        compiler_params=params,
        interpret=interpret,
        name="adamod_float8",
    )(*inputs)
    return tuple(x.reshape(shape) for x, shape in zip(new, shapes, strict=True))


def _kernel(scalars, words, leaf, rows, columns, g, *refs, tree, groups, per_row):
    """Advances the averages of a block of groups."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    n = len(refs) // 4
    block = GROUPS_A_BLOCK
    start = pl.program_id(0) * block
    group = start + jax.lax.broadcasted_iota(jnp.int32, (block,), 0)
    inside = group < groups  # the last block may reach beyond
    load = functools.partial(triton.load, mask=inside, other=0)
    row = ~load(rows.at[group // per_row])[:, None]
    column = load(columns.at[group % per_row])[:, None]
    column += jax.lax.broadcasted_iota(jnp.uint32, (block, GROUP), 1)
    bits = _storage.sets_of_bits(row, column, Seed((words[0], words[1]), leaf[0]), 20)
    here = pl.ds(start, block), slice(None)
    members = jnp.broadcast_to(inside[:, None], (block, GROUP))

    def whole(ref):
        return triton.load(ref.at[here], mask=members, other=0)

    codes = [whole(ref).astype(jnp.int32) for ref in refs[:n]]
    exponents = [
        load(ref.at[pl.ds(start, block)]).astype(jnp.int32)[:, None]
        for ref in refs[n : 2 * n]
    ]
    step = tree.unflatten([scalars[i] for i in range(tree.num_leaves)])
    codes, exponents = _groups.advanced(
        step, whole(g).astype(jnp.float32), codes, exponents, bits
    )
    for ref, x in zip(refs[2 * n : 3 * n], codes, strict=True):
        triton.store(ref.at[here], x.astype(ref.dtype), mask=members)
    for ref, x in zip(refs[3 * n :], exponents, strict=True):
        x = x.reshape(block).astype(ref.dtype)
        triton.store(ref.at[pl.ds(start, block)], x, mask=inside)
