"""What the kernels of GPUs and TPUs have in common.

In a kernel, codes and exponents are int32, and the members of a group are the last
dimension of a block.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from optax_adamod import _float8, _storage

SIGNS = (True, False, False)  # of mu, nu and bound


def advanced(
    step: Any,
    g: jax.Array,
    codes: Sequence[jax.Array],
    exponents: Sequence[jax.Array],
    bits: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns new codes and exponents: Algorithm 1 and the codec, for some groups.

    Args:
      step: The step, whose numbers are scalars.
      g: The gradients in float32.
      codes: Of mu, nu and, if there is one, bound.
      exponents: Theirs, which broadcast to the codes.
      bits: Three sets of random bits.
    """
    old = three(map(_float8.decode, codes, exponents, SIGNS))
    new = [x for x in step.averages(g, *old) if x is not None]
    largest = (
        jnp.max(_float8.key(x, new[1] if i == 2 else None), axis=-1, keepdims=True)
        for i, x in enumerate(new)
    )
    exponents = [*map(_float8.exponents_of, largest, SIGNS)]
    integers = (x.astype(jnp.int32) for x in bits)
    return [*map(_float8.encode, new, exponents, integers, SIGNS)], exponents


def decoded(codes: Sequence[jax.Array], exponents: Sequence[jax.Array]) -> list[Any]:
    """Returns the numbers of new codes, None for a bound that there is not."""
    signed, *unsigned = codes
    extended = signed << 24 >> 24  # as a byte with a sign would be
    return three(map(_float8.decode, (extended, *unsigned), exponents, SIGNS))


def three(averages: Iterable[Any]) -> list[Any]:
    """Returns what there is of mu, nu and bound, with None for no bound."""
    return [*averages, None][:3]


def scalars(step: Any) -> jax.Array:
    """Returns the numbers of a step as one array, which a kernel reads."""
    leaves = jax.tree.leaves(step)
    # Triton reads powers of two.
    padding = [0.0] * (2 ** math.ceil(math.log2(len(leaves))) - len(leaves))
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in (*leaves, *padding)])


def struct(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the type of an array, with the axes along which it varies."""
    return jax.eval_shape(lambda: x)


def varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns arrays that vary along the same axes of shard_map, as a kernel wants."""
    axes = frozenset().union(*map(_storage.varying_axes, arrays))

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(axes - _storage.varying_axes(x))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return getattr(jax.lax, "pvary")(x, missing)  # before JAX 0.9  # noqa: B009

    return [*map(vary, arrays)]


def axis_types(sharding: NamedSharding) -> tuple[AxisType, ...]:
    """Returns the types of the mesh's axes; Auto for a mesh that is not known."""
    mesh = sharding.mesh
    return (AxisType.Auto,) if mesh.empty else tuple(mesh.axis_types)


def full_spec(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """Returns the mesh axes of each dimension; a spec may leave out the last ones."""
    return (*sharding.spec, *[None] * ndim)[:ndim]


def by_shards(
    call: Any, inputs: Sequence[jax.Array], outputs: Sequence[jax.Array]
) -> Any:
    """Returns a kernel that runs on the shards of explicit mesh axes.

    Args:
      call: The kernel.
      inputs: Its inputs.
      outputs: Those of the inputs that the outputs are like.
    """
    specs, out_specs = (
        tuple(jax.typeof(x).sharding.spec for x in arrays)
        for arrays in (inputs, outputs)
    )
    mesh = jax.typeof(outputs[0]).sharding.mesh
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    return jax.shard_map(
        call, mesh=mesh, in_specs=specs, out_specs=out_specs,
        axis_names=explicit, check_vma=False,
    )  # fmt: skip
