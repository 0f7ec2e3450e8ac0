"""The inputs that the library refuses, and its error messages."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_adamod._float8 import (
    GROUP,
    Float8Array,
    exponents_shape,
    is_float8,
    is_narrowed,
)

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")
_CONVERT = "Convert it with optax_adamod.from_adamod(state, tx.init(params))."


def decay_rate(name: str, value: Any) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    value, number = _scalar(name, value, "a number in [0, 1)")
    if number is not None and not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {number!r}.")
    return value


def decay_rate_of_bound(name: str, value: Any) -> float | jax.Array:
    """As :func:`decay_rate`; refuses an ``eps`` in the position of ``b3``."""
    value = decay_rate(name, value)
    if isinstance(value, jax.Array) and _number(value) == 0:
        raise ValueError(
            f"{name} is an array of 0. The number 0 gives Adam; with an array there is "
            "a bound, which holds back by its rounding. Under optax.inject_hyperparams "
            f"pass static_args='{name}', or begin a schedule above 0."
        )
    # Not an array of JAX: a schedule under optax.inject_hyperparams may begin so low.
    if isinstance(value, float) and 0.0 < value < 1e-3:
        raise ValueError(
            f"{name} must be 0, which gives Adam, or at least 1e-3, got {value!r}. By "
            f"position {name} comes before eps: adamod(1e-3, 0.9, 0.999, 1e-8) sets "
            f"{name}, and adamod(1e-3, 0.9, 0.999, eps=1e-8) sets eps."
        )
    return value


def nonnegative(name: str, value: Any) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    value, number = _scalar(name, value, "a number in [0, inf)")
    if number is not None and not 0.0 <= number < math.inf:
        raise ValueError(f"{name} must be in [0, inf), got {number!r}.")
    return value


def scalar_or_schedule(name: str, value: Any) -> Any:
    """Returns a finite scalar, as :func:`nonnegative` does, or the schedule."""
    if callable(value) and not hasattr(value, "__jax_array__"):
        return value
    accepted = "a finite number, or a schedule from the step count to one"
    value, number = _scalar(name, value, accepted, precise=False)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be {accepted}, got {number!r}.")
    return value


def at_count(value: Any, count: jax.Array) -> jax.typing.ArrayLike:
    """Returns a learning rate, or the value of a schedule at ``count``."""
    if not callable(value):
        return value
    scheduled: Any = value(count)
    dtype = _dtype_of(scheduled)
    if dtype is None or not _is_real(dtype) or jnp.ndim(scheduled):
        given = _brief(scheduled)
        if dtype is not None:
            given = f"{dtype} of shape {jnp.shape(scheduled)}"
        raise ValueError(
            f"the schedule of the learning rate must return a real scalar, got {given}."
        )
    return scheduled


def choice(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``accepted``."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}."
        )
    return value


def mu_dtype(dtype: Any) -> np.dtype | Literal["float8"] | None:
    """Returns the real dtype that ``mu_dtype`` asks for, or None for the default."""
    dtype = _dtype("mu_dtype", dtype, ("float8", *_FLOATS, *_COMPLEX), "")
    return dtype if dtype in (None, "float8") else jnp.finfo(dtype).dtype


def rate_dtype(name: str, dtype: Any) -> np.dtype | Literal["float8"] | None:
    """Returns the dtype of ``nu`` or ``bound``, or None for the default."""
    return _dtype(
        name,
        dtype,
        ("float8", "bfloat16", "float32", "float64"),
        "The averages of squared gradients and of learning rates are real, and span "
        "more magnitudes than float16 holds (1/eps is 1e8).",
    )


def signs(name: str, learning_rate: Any, bound_dtype: Any) -> None:
    """Refuses a bound in 8 bits on learning rates that are known to be negative."""
    known = isinstance(learning_rate, float)
    if bound_dtype == "float8" and known and learning_rate < 0:
        raise ValueError(
            f"{name} must be at least 0 with bound_dtype='float8', which has no sign, "
            f"got {learning_rate!r}. Use bound_dtype='bfloat16', or ascend by negative "
            "gradients."
        )


def parameters(params: Any, dtypes: Mapping[str, Any]) -> None:
    """Refuses parameter leaves whose averages cannot be kept, in their dtypes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"the parameter at params{jax.tree_util.keystr(path)}"
        accepted = ", ".join((*_FLOATS, *_COMPLEX))
        way_out = (
            "Leave such parameters out with optax.masked, or give them a "
            "transformation of their own with optax.partition."
        )
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (int, float, complex)):
            raise TypeError(
                f"{name} is {_brief(leaf)}, of type {type(leaf).__name__}; AdaMod "
                f"updates arrays of {accepted}. {way_out}"
            )
        if (dtype := jnp.result_type(leaf)).name not in (*_FLOATS, *_COMPLEX):
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


def rounded(path: Any, p: Any) -> bool:
    """Returns whether sums with a parameter are rounded; refuses other narrow ones."""
    dtype = _dtype_of(p)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    if dtype != jnp.bfloat16 and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"the parameter at params{jax.tree_util.keystr(path)} is {dtype}; "
            "round_updates_stochastically rounds sums with bfloat16 parameters, "
            "and leaves wider ones alone. Use bfloat16, or leave such parameters "
            "out with optax.masked."
        )
    return dtype == jnp.bfloat16


def summand(path: Any, u: Any, p: Any) -> None:
    """Refuses an update that has no parameter, or would broadcast to it."""
    where = jax.tree_util.keystr(path)
    if _dtype_of(p) is None:
        raise TypeError(
            f"there is an update at updates{where}, and params{where} is {_brief(p)}, "
            f"of type {type(p).__name__}. Pass None as the update of what is no array."
        )
    if jnp.shape(u) != jnp.shape(p):
        raise ValueError(
            f"the update at updates{where} has shape {jnp.shape(u)}, and its parameter "
            f"{jnp.shape(p)}."
        )


def state_of_adamod(state: Any, bounded: bool) -> None:
    """Refuses the state of another optimizer, such as Adam's from a checkpoint."""
    if not all(hasattr(state, name) for name in ("count", "mu", "nu", "bound")):
        raise TypeError(
            "the state must be a ScaleByAdamodState, with count, mu, nu and bound, got "
            f"{type(state).__name__}. That of optax.adam lacks the bound: turn it into "
            "this one with optax_adamod.from_adam."
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


def same_structure(
    gradients: list[tuple[Any, Any]], treedef: Any, averages: dict[str, Any]
) -> None:
    """Refuses updates, flattened with their paths, whose tree is not the state's."""
    for field, average in averages.items():
        try:
            entries = treedef.flatten_up_to(average)
        except ValueError as error:
            problem = str(error)
        else:
            problem = None
            for (path, g), entry in zip(gradients, entries, strict=True):
                # None is a missing gradient, unless it is the whole tree.
                missing = g is None and (bool(path) or entry is None)
                array = is_float8(entry)
                array = array or jax.tree_util.all_leaves([entry])
                if not missing and not array:
                    problem = f"updates{jax.tree_util.keystr(path)} is one array"
        if problem is not None:
            raise ValueError(
                f"the updates and the state's {field} differ in structure: {problem}\n"
                f"updates: {treedef}\n{field}: {jax.tree.structure(average)}"
            )


def gradient(path: Any, g: Any, **averages: jax.Array) -> None:
    """Refuses a gradient that would broadcast, or lose its imaginary part."""
    where = jax.tree_util.keystr(path)
    for field, average in averages.items():
        shape = shape_of_average(f"the state's {field}{where}", average, field)
        if jnp.shape(g) != shape:
            raise ValueError(
                f"the update at updates{where} has shape {jnp.shape(g)}, but the "
                f"state's {field} there was initialised for a parameter of shape "
                f"{shape}."
            )
    mu = averages["mu"]
    is_complex = not isinstance(mu, Float8Array) and jnp.iscomplexobj(mu)
    accepted = _COMPLEX if is_complex else _FLOATS
    if jnp.result_type(g).name not in accepted:
        raise TypeError(
            f"the update at updates{where} has dtype {jnp.result_type(g)}, but its "
            f"parameter takes {', '.join(accepted)}."
        )


def storage(
    path: Any, p: Any, dtypes: Mapping[str, Any], **averages: jax.Array
) -> None:
    """Refuses averages that are known to be stored otherwise than the settings ask.

    Args:
      path: The path of the leaf.
      p: The parameter; anything else where it is not known.
      dtypes: The settings: the dtype of each average, or None.
      averages: The averages.
    """
    dtype = _dtype_of(p)
    known = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    for field, average in averages.items():
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
                    f"integers, got {_brief(array)}. Both parts of a Float8Array "
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


def _scalar(
    name: str, value: Any, accepted: str, *, precise: bool = True
) -> tuple[Any, float | None]:
    """Returns a float or an array, and its value if that is known."""
    if callable(value) and not hasattr(value, "__jax_array__"):
        raise TypeError(
            f"{name} must be {accepted}, got the function {_brief(value)}. To schedule "
            f"it, use optax.inject_hyperparams(adamod)(..., {name}=schedule)."
            f"{_hint(value)}"
        )
    if not isinstance(value, (int, float, complex, np.generic, np.ndarray, jax.Array)):
        if not hasattr(value, "__jax_array__"):
            raise TypeError(
                f"{name} must be {accepted}, got {_brief(value)}, of type "
                f"{type(value).__name__}.{_hint(value)}"
            )
        value = jnp.asarray(value)  # such as a variable of Flax
    dtype = _dtype_of(value)
    if dtype is None or not _is_real(dtype):
        of = f"of dtype {getattr(value, 'dtype', dtype)}"
        way_out = ""
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            way_out = (
                " Under optax.inject_hyperparams with complex parameters, pass "
                "hyperparam_dtype=jnp.float32."
            )
        raise TypeError(f"{name} must be {accepted}, got {value}, {of}.{way_out}")
    if jnp.ndim(value):
        raise ValueError(
            f"{name} must be {accepted}, got an array of shape {jnp.shape(value)}."
            f"{_hint(value)}"
        )
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    if precise and half and not isinstance(value, float):
        raise TypeError(
            f"{name} was given as an array of {dtype}, which is too coarse: "
            "0.999 is 1 in bfloat16, and 1e-8 is 0 in float16. Give a Python float, or "
            "an array of at least float32. Under optax.inject_hyperparams with "
            "half-precision parameters, pass hyperparam_dtype=jnp.float32."
        )
    number = _number(value)
    # Only a JAX array may be a tracer; of everything else the number is known.
    return (value, number) if isinstance(value, jax.Array) else (number, number)


def _number(value: Any) -> float | None:
    """Returns ``value`` as a float, or None if only a running program knows it."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of Python
        return math.inf if value > 0 else -math.inf


def _dtype_of(value: Any) -> Any:
    """The dtype that JAX gives a value; None for what is no number."""
    try:
        no_value = value is None or isinstance(value, (str, type))
        return None if no_value else jnp.result_type(value)
    except (TypeError, OverflowError):
        return np.dtype(np.float32) if isinstance(value, int) else None


def _hint(value: Any) -> str:
    """What to do with parameters that stand in the place of a number."""
    if any(map(np.ndim, jax.tree.leaves(value))):
        return " If these are the parameters, init and update take them."
    return ""


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dtype(name: str, dtype: Any, accepted: tuple[str, ...], why: str) -> Any:
    if dtype is None or (isinstance(dtype, str) and dtype == "float8"):
        return dtype
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in accepted:
        raise TypeError(
            f"{name} must be None or one of {', '.join(accepted)}, got {dtype!r}. {why}"
        )
    return resolved
