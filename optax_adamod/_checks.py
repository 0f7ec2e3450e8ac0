"""Trees that the library refuses: parameters, gradients and states."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod._float8 import (
    GROUP,
    Float8Array,
    exponents_shape,
    is_float8,
    is_narrowed,
)
from optax_adamod._settings import COMPLEX, FLOATS, brief, dtype_of
from optax_adamod._storage import Averages

_CONVERT = "Convert it with optax_adamod.from_adamod(state, tx.init(params))."


def parameters(params: Any, dtypes: Mapping[str, Any]) -> None:
    """Refuses parameter leaves whose averages cannot be kept, in their dtypes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"the parameter at params{jax.tree_util.keystr(path)}"
        accepted = ", ".join((*FLOATS, *COMPLEX))
        way_out = (
            "Leave such parameters out with optax.masked, or give them a "
            "transformation of their own with optax.partition."
        )
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (int, float, complex)):
            raise TypeError(
                f"{name} is {brief(leaf)}, of type {type(leaf).__name__}; AdaMod "
                f"updates arrays of {accepted}. {way_out}"
            )
        if (dtype := jnp.result_type(leaf)).name not in (*FLOATS, *COMPLEX):
            raise TypeError(
                f"{name} has dtype {dtype}; AdaMod updates arrays of {accepted}. "
                f"{way_out}"
            )
        if dtypes["mu"] == "float8" and jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{name} is complex, and mu_dtype='float8' is for real parameters. Use "
                "mu_dtype=None for such parameters, by optax.partition; nu_dtype and "
                "bound_dtype may be 'float8'."
            )
        if "float8" in dtypes.values() and is_narrowed(shape := jnp.shape(leaf)):
            # Known of explicit mesh axes; under Auto the compiler splits groups.
            columns = _shard_shape(leaf)[-1]
            if columns % GROUP:
                raise ValueError(
                    f"{name} has shape {shape} in shards of {columns} columns, and "
                    f"averages in 'float8' have an exponent for each {GROUP}. Shard "
                    f"the last dimension by multiples of {GROUP}, or another one."
                )


def _shard_shape(x: Any) -> tuple[int, ...]:
    """Returns the shape of a shard, as far as explicit mesh axes split the array."""
    sharding = jax.typeof(x).sharding
    shape = list(jnp.shape(x))
    for dimension, axes in enumerate(sharding.spec):
        if axes is not None:
            axes = (axes,) if isinstance(axes, str) else axes
            shape[dimension] //= math.prod(sharding.mesh.shape[x] for x in axes)
    return tuple(shape)


def state_of_adamod(state: Any, bounded: bool) -> None:
    """Refuses the state of another optimizer, such as Adam's from a checkpoint."""
    if not all(hasattr(state, name) for name in ("count", "mu", "nu", "bound")):
        way_out = "Call update(updates, state), with the state that init returned."
        if isinstance(state, optax.ScaleByAdamState):
            way_out = "Turn it into one with optax_adamod.from_adam."
        elif isinstance(state, Mapping):
            way_out = "Restore a checkpoint with a template, tx.init(params)."
        raise TypeError(
            "the state must be a ScaleByAdamodState, with count, mu, nu and bound, got "
            f"{type(state).__name__}. {way_out}"
        )
    if bounded and state.bound is None and state.mu is not None:
        raise ValueError(
            "the state's bound is None, as with b3=0, and this optimizer's b3 is not "
            f"0. {_CONVERT}"
        )
    if not bounded and state.bound is not None:
        raise ValueError(
            "the state has a bound, and this optimizer has none, for its b3 is 0. "
            f"{_CONVERT}"
        )
    if jnp.ndim(state.count):
        raise ValueError(
            f"the state is a stack of {jnp.shape(state.count)} states: update it "
            "under jax.vmap, as it was made."
        )


def like_updates(
    gradients: list[tuple[Any, Any]], treedef: Any, field: str, average: Any
) -> list[Any]:
    """Returns the leaves of an average; refuses one with another tree than updates.

    Args:
      gradients: The updates, flattened with their paths.
      treedef: Their structure.
      field: Which of the averages it is.
      average: The average.
    """
    try:
        leaves = treedef.flatten_up_to(average)
        alike = all(
            # None is a missing gradient, unless it is the whole tree.
            (g is None and (bool(path) or leaf is None))
            or is_float8(leaf)
            or jax.tree_util.all_leaves([leaf])
            for (path, g), leaf in zip(gradients, leaves, strict=True)
        )
    except ValueError:
        leaves, alike = [], False
    if not alike:
        updates = treedef.unflatten([g for _, g in gradients])
        raise ValueError(
            f"the updates and the state's {field} differ in structure: "
            f"{difference('the updates', updates, field, average)}."
        )
    return leaves


def difference(name: str, tree: Any, other_name: str, other: Any) -> str:
    """Says which leaves two trees have alone, or else of what types they are."""
    trees = {name: tree, other_name: other}
    paths = {
        key: {
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(
                x, is_leaf=lambda x: x is None or is_float8(x)
            )
        }
        for key, x in trees.items()
    }
    said = []
    for key, own in paths.items():
        alone = sorted(own - set.intersection(*paths.values()))
        if alone:
            more = f" and {len(alone) - 1} more" if alone[1:] else ""
            said.append(f"{alone[0] or 'one leaf'}{more} in {key} alone")
    if not said:
        said = [f"{key} is {brief(jax.tree.structure(x))}" for key, x in trees.items()]
    return ", and ".join(said)


def gradient(path: Any, g: Any, averages: Averages) -> None:
    """Refuses a gradient that would broadcast, or lose its imaginary part."""
    where = jax.tree_util.keystr(path)
    for field, average in averages._asdict().items():
        if average is None:
            continue
        shape = shape_of_average(f"the state's {field}{where}", average, field)
        if jnp.shape(g) != shape:
            raise ValueError(
                f"the update at updates{where} has shape {jnp.shape(g)}, but the "
                f"state's {field} there was initialised for a parameter of shape "
                f"{shape}."
            )
    mu = averages.mu
    is_complex = not isinstance(mu, Float8Array) and jnp.iscomplexobj(mu)
    accepted = COMPLEX if is_complex else FLOATS
    if jnp.result_type(g).name not in accepted:
        raise TypeError(
            f"the update at updates{where} has dtype {jnp.result_type(g)}, but its "
            f"parameter takes {', '.join(accepted)}."
        )


def storage(path: Any, p: Any, averages: Averages, dtypes: Mapping[str, Any]) -> None:
    """Refuses averages that are known to be stored otherwise than the settings ask.

    Args:
      path: The path of the leaf.
      p: The parameter; anything else where it is not known.
      averages: The averages.
      dtypes: The settings: the dtype of each average, or None.
    """
    dtype = dtype_of(p)
    known = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    for field, average in averages._asdict().items():
        if average is None:
            continue
        asked = dtypes[field]
        if isinstance(average, Float8Array):  # of any shape: shards may be short
            kept, wanted = "float8", asked or "the dtype of the parameter"
        elif asked == "float8":
            kept = jnp.result_type(average)
            narrowed = is_narrowed(jnp.shape(average))
            wanted = "float8" if narrowed else np.dtype(np.float32)
        else:
            kept = jnp.result_type(average)
            # Of a parameter that was cast, so init may have seen a wider one.
            least = [dtype] if known else []
            if field != "mu":
                least = [jnp.float32, *(jnp.finfo(x).dtype for x in least)]
            is_complex = jnp.issubdtype(kept, jnp.complexfloating)
            wanted = jnp.result_type(
                *([kept, *least] if asked is None else [asked]),
                *([jnp.complex64] if is_complex else []),
            )
        if kept != wanted:
            raise TypeError(
                f"the state's {field}{jax.tree_util.keystr(path)} is in {kept}, and "
                f"the settings of this optimizer ask for {wanted}. {_CONVERT}"
            )


def shape_of_average(name: str, average: Any, field: str) -> tuple[int, ...]:
    """Returns the shape of an average; refuses codes that mean something else."""
    if isinstance(average, Float8Array):
        codes, exponents = average.codes, average.exponents
        for part, array in (("codes", codes), ("exponents", exponents)):
            if not hasattr(array, "shape") or jnp.result_type(array).name not in (
                ("int8", "uint8") if part == "codes" else ("uint8",)
            ):
                raise TypeError(
                    f"the {part} of {name} must be an array of 8-bit "
                    f"integers, got {brief(array)}. Both parts of a Float8Array "
                    "belong together: restore them with a template, tx.init(params)."
                )
        if exponents.shape != exponents_shape(codes.shape):
            raise ValueError(
                f"{name} has codes of shape {codes.shape}, which take "
                f"exponents of shape {exponents_shape(codes.shape)}, and its exponents "
                f"have shape {exponents.shape}."
            )
        if average.signed != (field == "mu"):
            raise TypeError(
                f"the codes of {name} are {codes.dtype}; those of mu are int8, with a "
                "sign, and those of nu and bound uint8. Make zeros with "
                "tx.init(params), and other numbers with Float8Array.quantize."
            )
        return codes.shape
    if not jnp.issubdtype(jnp.result_type(average), jnp.inexact):
        raise TypeError(
            f"{name} has dtype {jnp.result_type(average)}, which is no "
            "average. If these are the codes of a Float8Array, they need its "
            "exponents: restore both with a template, tx.init(params)."
        )
    return jnp.shape(average)
