"""What the optimizer refuses, and how it says so."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")


def decay_rate(name: str, value: jax.typing.ArrayLike) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    value = _scalar(name, value)
    if isinstance(value, float) and not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")
    return value


def nonnegative(name: str, value: jax.typing.ArrayLike) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    value = _scalar(name, value)
    if isinstance(value, float) and not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be in [0, inf), got {value!r}.")
    return value


def finite(name: str, value: jax.typing.ArrayLike) -> float | jax.Array:
    """Returns ``value`` as a Python float if it is a number, else as an array."""
    value = _scalar(name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    return value


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


def state_of_adamod(state: Any) -> None:
    """Refuses the state of another optimizer, such as Adam's from a checkpoint."""
    if not all(hasattr(state, name) for name in ("count", "mu", "nu", "bound")):
        raise TypeError(
            "the state must be a ScaleByAdamodState, with count, mu, nu and bound, got "
            f"{type(state).__name__}. That of optax.adam lacks the bound: carry its "
            "averages over to a fresh state, with optax.tree.set."
        )


def same_structure(gradients: list[tuple[Any, Any]], treedef: Any, state: Any) -> None:
    """Refuses updates, flattened with their paths, of another tree than the state's."""
    try:
        entries = treedef.flatten_up_to(state)
    except ValueError as error:
        problem = str(error)
    else:
        problem = None
        for (path, g), entry in zip(gradients, entries, strict=True):
            # None is a missing gradient, but not as the whole tree.
            missing = g is None and (bool(path) or entry is None)
            if not missing and not jax.tree_util.all_leaves([entry]):
                problem = f"updates{jax.tree_util.keystr(path)} is one array"
    if problem is not None:
        raise ValueError(
            f"the updates and the state differ in structure: {problem}\n"
            f"updates: {treedef}\nstate: {jax.tree.structure(state)}"
        )


def gradient(path: Any, g: Any, mu: jax.Array) -> None:
    """Refuses a gradient that would broadcast against its state, or lose a part."""
    name = f"the update at updates{jax.tree_util.keystr(path)}"
    if jnp.shape(g) != mu.shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(g)}, but the state was initialised for a "
            f"parameter of shape {mu.shape}."
        )
    accepted = _COMPLEX if jnp.iscomplexobj(mu) else _FLOATS
    if jnp.result_type(g).name not in accepted:
        raise TypeError(
            f"{name} has dtype {jnp.result_type(g)}, but its parameter takes "
            f"{', '.join(accepted)}."
        )


def log10_edges(bins: Any) -> tuple[float, ...]:
    """Returns the edges of a histogram, given by their powers of ten."""
    powers = np.asarray(bins, np.float64)
    increasing = powers.ndim == 1 and powers.size > 1 and np.all(np.diff(powers) > 0)
    # float32 holds no other powers of ten.
    if not (increasing and powers[0] >= -37 and powers[-1] <= 38):
        raise ValueError(
            "bins must be at least two increasing powers of ten within [-37, 38], such "
            f"as np.linspace(-8, 0, 33), got {bins!r}."
        )
    return tuple((10.0**powers).tolist())


def _scalar(name: str, value: Any) -> float | jax.Array:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, int | float | np.integer | np.floating):
        return float(value)
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(f"{name} must be a scalar, got an array of {value.shape}.")
    if jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
        raise TypeError(
            f"{name} was given as an array of {value.dtype}, which is too coarse: "
            "0.999 is 1 in bfloat16, and 1e-8 is 0 in float16. Give a Python float, or "
            "an array of at least float32. Under optax.inject_hyperparams with "
            "half-precision parameters, pass hyperparam_dtype=jnp.float32."
        )
    return value


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
