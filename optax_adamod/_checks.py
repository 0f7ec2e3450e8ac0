"""What the optimizer refuses, and how it says so."""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")


def decay_rate(name: str, value: jax.typing.ArrayLike) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    if _is_number(value):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}.")
        return float(value)
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
        raise TypeError(
            f"{name} was given as an array of {value.dtype}, in which decay rates near "
            "1 round to 1 (0.999 does in bfloat16); give a Python float, or an array "
            "of at least float32. Under optax.inject_hyperparams with half-precision "
            "parameters, pass hyperparam_dtype=jnp.float32."
        )
    return value


def nonnegative(name: str, value: jax.typing.ArrayLike) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    if _is_number(value):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be in [0, inf), got {value!r}.")
        return float(value)
    return jnp.asarray(value)


def choice(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}."
        )
    return value


def mu_dtype(dtype: Any) -> np.dtype | None:
    """Returns the real dtype that ``mu_dtype`` asks for; None asks for nothing."""
    dtype = _dtype("mu_dtype", dtype, (*_FLOATS, *_COMPLEX), "")
    return None if dtype is None else jnp.finfo(dtype).dtype


def rate_dtype(name: str, dtype: Any) -> np.dtype | None:
    """Returns the dtype of ``nu`` or ``bound``; None asks for the default."""
    return _dtype(
        name,
        dtype,
        ("bfloat16", "float32", "float64"),
        "The averages of squared gradients and of learning rates are real, and span "
        "more magnitudes than float16 holds (1/eps is 1e8).",
    )


def parameters(params: Any) -> None:
    """Refuses parameter leaves that have no moments."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if str(dtype) not in (*_FLOATS, *_COMPLEX):
            raise TypeError(
                f"the parameter at params{jax.tree_util.keystr(path)} has dtype "
                f"{dtype}; AdaMod updates {', '.join((*_FLOATS, *_COMPLEX))}. Leave "
                "such parameters out with optax.masked, or give them a transformation "
                "of their own with optax.partition."
            )


def same_structure(updates: Any, state: Any) -> None:
    """Refuses updates, given as a treedef, of another structure than the state's."""
    try:
        updates.flatten_up_to(state)
    except ValueError as error:
        raise ValueError(
            f"the updates and the state differ in structure: {error}\n"
            f"updates: {updates}\nstate: {jax.tree.structure(state)}"
        ) from error


def same_shape(path: Any, update: jax.Array, average: jax.Array) -> None:
    """Refuses an update that would broadcast against its state."""
    if jnp.shape(update) != jnp.shape(average):
        raise ValueError(
            f"the update at updates{jax.tree_util.keystr(path)} has shape "
            f"{jnp.shape(update)}, but the state was initialised for a parameter of "
            f"shape {jnp.shape(average)}."
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float | np.integer | np.floating)


def _dtype(
    name: str, dtype: Any, accepted: tuple[str, ...], why: str
) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in accepted:
        raise TypeError(
            f"{name} must be None or one of {', '.join(accepted)}, got {dtype!r}. {why}"
        )
    return resolved
