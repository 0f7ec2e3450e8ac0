"""The settings of an optimizer, checked: numbers, learning rates and dtypes."""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Convention = Literal["paper", "torch"]
FLOATS = ("bfloat16", "float16", "float32", "float64")
COMPLEX = ("complex64", "complex128")


class Hyperparameters(NamedTuple):
    """The numbers that an optimizer is made with; those of Python are floats."""

    b1: float | jax.Array
    b2: float | jax.Array
    b3: float | jax.Array
    eps: float | jax.Array
    eps_root: float | jax.Array
    convention: str
    nesterov: bool

    @property
    def bounded(self) -> bool:
        """Whether there is a bound: not if b3 is the Python number 0, as in Adam."""
        return not (isinstance(self.b3, float) and self.b3 == 0.0)

    @classmethod
    def checked(
        cls,
        b1: Any,
        b2: Any,
        b3: Any,
        eps: Any,
        eps_root: Any,
        convention: Any,
        nesterov: bool = False,
    ) -> "Hyperparameters":
        """Refuses what is out of its range; traced numbers pass."""
        accepted = get_args(Convention)
        if not isinstance(convention, str) or convention not in accepted:
            raise ValueError(
                f"convention must be one of {', '.join(map(repr, accepted))}, got "
                f"{convention!r}."
            )
        if nesterov and convention != "paper":
            raise ValueError(
                "nesterov=True is defined for convention='paper' alone, got "
                f"convention={convention!r}."
            )
        b1, b2, b3 = (
            _below(1, name, value)
            for name, value in (("b1", b1), ("b2", b2), ("b3", b3))
        )
        _check_b3(b3)
        eps, eps_root = (
            _below(math.inf, "eps", eps),
            _below(math.inf, "eps_root", eps_root),
        )
        return cls(b1, b2, b3, eps, eps_root, convention, nesterov)


def _below(end: float, name: str, value: Any) -> float | jax.Array:
    """Returns ``value``, at least 0, as a float if it is a number, else as an array."""
    value, number = _scalar(name, value, f"a number in [0, {end})")
    if number is not None and not 0.0 <= number < end:
        raise ValueError(f"{name} must be in [0, {end}), got {number!r}.")
    return value


def _check_b3(b3: float | jax.Array) -> None:
    """Refuses an ``eps`` in the position of ``b3``, and a bound without memory."""
    if isinstance(b3, jax.Array):
        # A schedule under optax.inject_hyperparams may begin above 0, however low.
        if _number(b3) == 0:
            raise ValueError(
                "b3 is an array of 0, for which AdaMod keeps a bound whose rounding "
                "shortens steps. For Adam pass the number 0. Under "
                "optax.inject_hyperparams pass static_args='b3', or begin a schedule "
                "above 0."
            )
    elif 0.0 < b3 < 1e-3:
        raise ValueError(
            f"b3 must be 0, which gives Adam, or at least 1e-3, got {b3!r}. By "
            "position b3 comes before eps: adamod(1e-3, 0.9, 0.999, 1e-8) sets b3, and "
            "adamod(1e-3, 0.9, 0.999, eps=1e-8) sets eps."
        )


def scalar_or_schedule(name: str, value: Any) -> Any:
    """Returns a finite scalar, a float if it is a number, or the schedule."""
    if callable(value) and not hasattr(value, "__jax_array__"):
        return value
    accepted = "a finite number, or a schedule from the step count to one"
    value, number = _scalar(name, value, accepted, precise=False)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be {accepted}, got {number!r}.")
    return value


def bound_learning_rate(value: Any, in_float8: bool) -> Any:
    """As :func:`scalar_or_schedule`; at least 0 if the bound is in 8 bits."""
    value = scalar_or_schedule("bound_learning_rate", value)
    if in_float8 and isinstance(value, float) and value < 0:
        raise ValueError(
            "the learning rate must be at least 0 with bound_dtype='float8', which has "
            f"no sign, got {value!r}. Use bound_dtype='bfloat16', or ascend by "
            "negative gradients."
        )
    return value


def at_count(value: Any, count: jax.Array) -> jax.typing.ArrayLike:
    """Returns a learning rate, or the value of a schedule at ``count``."""
    if not callable(value):
        return value
    scheduled: Any = value(count)
    dtype = dtype_of(scheduled)
    if dtype is None or not _is_real(dtype) or jnp.ndim(scheduled):
        given = brief(scheduled)
        if dtype is not None:
            given = f"{dtype} of shape {jnp.shape(scheduled)}"
        raise ValueError(
            f"the schedule of the learning rate must return a real scalar, got {given}."
        )
    return scheduled


def state_dtypes(mu_dtype: Any, nu_dtype: Any, bound_dtype: Any) -> dict[str, Any]:
    """Returns the dtypes of the averages by name: real ones, 'float8', or None."""
    mu_dtype = _dtype("mu_dtype", mu_dtype, ("float8", *FLOATS, *COMPLEX))
    if mu_dtype not in (None, "float8"):
        mu_dtype = jnp.finfo(mu_dtype).dtype
    accepted = ("float8", "bfloat16", "float32", "float64")
    why = (
        " The averages of squared gradients and of learning rates are real, and span "
        "more magnitudes than float16 holds (1/eps is 1e8)."
    )
    return {
        "mu": mu_dtype,
        "nu": _dtype("nu_dtype", nu_dtype, accepted, why),
        "bound": _dtype("bound_dtype", bound_dtype, accepted, why),
    }


def _scalar(
    name: str, value: Any, accepted: str, *, precise: bool = True
) -> tuple[Any, float | None]:
    """Returns a float or an array, and its value if that is known."""
    if callable(value) and not hasattr(value, "__jax_array__"):
        raise TypeError(
            f"{name} must be {accepted}, got the function {brief(value)}. To schedule "
            f"it, use optax.inject_hyperparams(adamod)(..., {name}=schedule)."
            f"{_hint(value)}"
        )
    if not isinstance(value, (int, float, complex, np.generic, np.ndarray, jax.Array)):
        if not hasattr(value, "__jax_array__"):
            raise TypeError(
                f"{name} must be {accepted}, got {brief(value)}, of type "
                f"{type(value).__name__}.{_hint(value)}"
            )
        value = jnp.asarray(value)  # such as a variable of Flax
    dtype = dtype_of(value)
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


def dtype_of(value: Any) -> Any:
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


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dtype(name: str, dtype: Any, accepted: tuple[str, ...], why: str = "") -> Any:
    if dtype is None or (isinstance(dtype, str) and dtype == "float8"):
        return dtype
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in accepted:
        raise TypeError(
            f"{name} must be None or one of {', '.join(accepted)}, got {dtype!r}.{why}"
        )
    return resolved
