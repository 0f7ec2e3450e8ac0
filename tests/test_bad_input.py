"""Is what cannot work refused, with the name, the value and the way out?

Each row of a table: what is given, and what the error says.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import (
    LearningRates,
    adamod,
    adamodw,
    held_by_bound,
    learning_rates,
    scale_by_adamod,
)

X = jnp.ones(2)
PARAMS = {"w": X}


MODEL = jax.tree_util.Partial(jnp.dot, X)  # is called, as those of Equinox and NNX


def schedule(count):
    return 0.1 / (1 + count)


def described(value):
    """A name in the list of tests, without the address of a function."""
    if isinstance(value, dict):
        return ",".join(value)
    return getattr(value, "__name__", None) or str(value).split(" at 0x")[0]


def raises(error, *parts):
    """Expects the parts, as they are, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


# Given as a Python number, as NumPy's and as JAX's.
KINDS = [float, np.float32, np.float64, np.asarray, jnp.asarray]
RANGES = {
    "b1": ([-0.1, 1.0, 2.0, math.nan, math.inf], "b1 must be in [0, 1), got"),
    "b2": ([-0.1, 1.0, 1.5, math.nan, -math.inf], "b2 must be in [0, 1), got"),
    "b3": ([-0.1, 1.0, 1.5, math.nan], "b3 must be in [0, 1), got"),
    "eps": ([-1e-8, -1.0, math.nan, math.inf], "eps must be in [0, inf), got"),
    "eps_root": ([-1e-8, math.nan], "eps_root must be in [0, inf), got"),
    "learning_rate": (
        [math.nan, math.inf, -math.inf],
        "learning_rate must be a finite number, or a schedule from the step count to "
        "one, got",
    ),
}


@pytest.mark.parametrize("kind", KINDS, ids=described)
@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range(name, kind):
    values, message = RANGES[name]
    for value in values:
        with raises(ValueError, message, f"{float(kind(value))}"):
            adamod(**{"learning_rate": 0.1, name: kind(value)})


@pytest.mark.parametrize("name", ["weight_decay", "bound_learning_rate"])
def test_other_rates_out_of_range(name):
    make = scale_by_adamod if name == "bound_learning_rate" else adamodw
    settings = {} if make is scale_by_adamod else {"learning_rate": 0.1}
    for value in (math.nan, jnp.inf, np.float32(-np.inf)):
        with raises(ValueError, f"{name} must be a finite number, or a schedule"):
            make(**settings, **{name: value})


@pytest.mark.parametrize("name", ["b1", "b2", "b3", "eps", "eps_root"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("1e-8", TypeError, ", got '1e-8', of type str."),
        (None, TypeError, ", got None, of type NoneType."),
        (True, TypeError, ", got True, of dtype bool."),
        (np.True_, TypeError, ", got True, of dtype bool."),
        (jnp.array(False), TypeError, ", got False, of dtype bool."),
        (np.array("0.9"), TypeError, ", got 0.9, of dtype <U3."),
        ((0.9, 0.999), TypeError, ", got (0.9, 0.999), of type tuple."),
        (0.5j, TypeError, ", got 0.5j, of dtype complex"),
        (jnp.complex64(0.5), TypeError, ", of dtype complex64."),
        (jnp.ones(1), ValueError, ", got an array of shape (1,)."),
        (np.ones((2, 1)), ValueError, ", got an array of shape (2, 1)."),
        ([0.9], TypeError, ", got [0.9], of type list."),
        (PARAMS, TypeError, "of type dict. If these are the parameters, init and"),
        (schedule, TypeError, "To schedule it, use optax.inject_hyperparams(adamod)"),
        (MODEL, TypeError, "If these are the parameters, init and update take them."),
    ],
    ids=described,
)
def test_hyperparameters_that_are_no_numbers(name, value, error, message):
    start = f"{name} must be a number in [0, {'1' if name[0] == 'b' else 'inf'})"
    with raises(error, start, message):
        adamod(0.1, **{name: value})


@pytest.mark.parametrize("name", ["b1", "b2", "b3", "eps", "eps_root"])
@pytest.mark.parametrize("value", [np.float16(0.9), jnp.bfloat16(0.9)], ids=str)
def test_hyperparameters_that_are_too_coarse(name, value):
    with raises(TypeError, f"{name} was given as an array of {value.dtype}, which"):
        adamod(0.1, **{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("1e-3", TypeError, ", got '1e-3', of type str."),
        (None, TypeError, ", got None, of type NoneType."),
        (True, TypeError, ", got True, of dtype bool."),
        (1j, TypeError, ", got 1j, of dtype complex"),
        (10**400, ValueError, ", got inf."),
        (jnp.ones(3), ValueError, ", got an array of shape (3,). If these are the"),
        (PARAMS, TypeError, "of type dict. If these are the parameters, init and"),
    ],
    ids=str,
)
def test_learning_rates_that_are_neither_numbers_nor_schedules(
    name, value, error, message
):
    start = f"{name} must be a finite number, or a schedule from the step count to one"
    with raises(error, start, message):
        adamodw(**{"learning_rate": 0.1, name: value})


@pytest.mark.parametrize(
    "arguments", [(PARAMS, 1e-3), (X, 1e-3), (1e-3, PARAMS)], ids=str
)
@pytest.mark.parametrize("factory", [adamod, adamodw])
def test_swapped_arguments(factory, arguments):
    name = "b1" if isinstance(arguments[0], float) else "learning_rate"
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        factory(*arguments)


@pytest.mark.parametrize("kind", KINDS[:-1], ids=described)
@pytest.mark.parametrize("arguments", [(1e-8,), (9.9e-4,), (1e-8, 0.0)], ids=str)
def test_the_fourth_position_is_that_of_b3(arguments, kind):
    b3, *others = arguments
    for factory in (adamod, adamodw):
        with raises(
            ValueError,
            "b3 must be 0, which gives Adam, or at least 1e-3, got",
            "eps=1e-8",
        ):
            factory(1e-3, 0.9, 0.999, kind(b3), *others)
    for b3 in (0.0, 1e-3):
        adamod(1e-3, 0.9, 0.999, kind(b3))


def test_what_is_concrete_is_checked_under_inject_hyperparams_too():
    tx = optax.inject_hyperparams(adamod)
    with raises(ValueError, "b3 must be in [0, 1), got 1.5"):
        tx(0.1, b3=1.5).init(PARAMS)
    tx(0.1, b3=optax.linear_schedule(1e-4, 0.9, 20_000)).init(PARAMS)  # begins low
    jax.jit(tx(0.1, b3=1.5).init)(PARAMS)  # where it is a number of the program


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (jnp.ones(2), "float32 of shape (2,)"),
        (True, "bool"),
        (1j, "complex64"),
        (None, "got None"),
        ("0.1", "got '0.1'"),
        ((0.1,), "got (0.1,)"),
    ],
    ids=str,
)
def test_schedules_that_return_no_scalar(returned, message):
    tx = scale_by_adamod(bound_learning_rate=lambda count: returned)
    with raises(
        ValueError,
        "the schedule of the learning rate must return a real scalar",
        message,
    ):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("name", ["nu_dtype", "bound_dtype"])
@pytest.mark.parametrize(
    "value", ["float16", "complex64", "int32", jnp.float16, "floaty"]
)
def test_dtypes_of_rates(name, value):
    with raises(TypeError, f"{name} must be", "float32", f"got {value!r}", "1e8"):
        adamod(0.1, **{name: value})


@pytest.mark.parametrize("value", ["int8", bool, "float8_e4m3fn", "floaty"])
def test_dtype_of_mu(value):
    with raises(TypeError, "mu_dtype must be", "bfloat16", f"got {value!r}"):
        adamod(0.1, mu_dtype=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"convention": "tf"}, "convention must be one of 'paper', 'torch', got 'tf'"),
        (
            {"convention": "torch", "nesterov": True},
            "nesterov=True is defined for convention='paper' alone, got "
            "convention='torch'",
        ),
    ],
)
def test_conventions(settings, message):
    with raises(ValueError, message):
        adamod(0.1, **settings)


@pytest.mark.parametrize("factory", [scale_by_adamod, lambda **kw: adamodw(0.1, **kw)])
def test_every_factory_checks(factory):
    """With the code that the tables above ask through ``adamod``."""
    for name, value in {
        "b1": 1.0,
        "b2": 1.0,
        "b3": 1.0,
        "eps": -1.0,
        "eps_root": -1.0,
        "mu_dtype": "int8",
        "nu_dtype": "int8",
        "bound_dtype": "int8",
        "convention": "tf",
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            factory(**{name: value})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.arange(3), "has dtype int32"),
        (jnp.ones(2, bool), "has dtype bool"),
        (3, "has dtype int32"),
        (jax.random.key(0), "has dtype key<fry>"),
        ("relu", "is 'relu', of type str"),
        (jax.nn.relu, "of type"),
        (object, "is <class 'object'>, of type type"),
    ],
    ids=described,
)
def test_parameters_without_moments(leaf, message):
    params = {"dense": {"kernel": X, "steps": leaf}}
    start = "the parameter at params['dense']['steps']"
    with raises(TypeError, start, message, "optax.masked", "optax.partition"):
        adamod(0.1).init(params)


@pytest.mark.parametrize(
    ("params", "updates"),
    [
        ({"a": X, "b": X}, {"a": X}),
        ({"a": X, "b": X}, {"a": X, "c": X}),
        ({"a": X, "b": X}, [X]),
        ({"a": X}, X),
        ({"a": X}, None),
        ({"a": {"b": X}}, {"a": X}),
        ({"a": [X, X]}, {"a": X}),
        ({"a": None}, {"a": X}),
        ({"a": optax.MaskedNode()}, {"a": X}),
    ],
    ids=str,
)
def test_another_structure(params, updates):
    tx = adamod(0.1)
    state = tx.init(params)
    with raises(ValueError, "differ in structure") as error:
        tx.update(updates, state, params)
    for tree in (params, updates):
        if tree is not None:
            assert str(jax.tree.structure(tree)) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nu": None}, "the state's nu differ in structure"),
        ({"bound": {"w": X, "v": X}}, "the state's bound differ in structure"),
        (
            {"mu": {"w": jnp.ones((1, 2))}},
            "the state's mu there was initialised for a ",
        ),
        ({"nu": {"w": jnp.ones((2, 2))}}, "nu there was initialised for a parameter"),
        ({"bound": {"w": jnp.ones(())}}, "bound there was initialised for a parameter"),
    ],
    ids=str,
)
def test_averages_of_another_shape(change, message):
    tx = scale_by_adamod()
    state = tx.init(PARAMS)._replace(**change)
    with raises(ValueError, message):
        tx.update(PARAMS, state)


@pytest.mark.parametrize(
    ("parameter", "g"),
    [("float32", "complex64"), ("complex64", "float32"), ("float32", "int32")],
)
def test_another_kind_of_gradient(parameter, g):
    tx = adamod(0.1)
    params = {"a": jnp.ones(2, parameter)}
    with raises(TypeError, f"updates['a'] has dtype {g}, ", parameter):
        tx.update({"a": jnp.ones(2, g)}, tx.init(params), params)


def test_another_shape():
    tx = adamod(0.1)
    state = tx.init({"a": jnp.ones((2, 3))})
    updates = {"a": jnp.ones((1, 3))}
    with raises(ValueError, "updates['a'] has shape (1, 3), but", "shape (2, 3)"):
        tx.update(updates, state, updates)


def test_a_stack_of_states_without_vmap():
    tx = adamod(0.1)
    params = {"w": jnp.ones((3, 2))}
    stack = jax.vmap(tx.init)(params)
    with raises(ValueError, "the state is a stack of (3,) states", "jax.vmap"):
        tx.update(params, stack)
    jax.vmap(tx.update)(params, stack)


@pytest.mark.parametrize("factory", [optax.adam, dict], ids=["adam", "dict"])
def test_another_state(factory):
    if factory is dict:  # what Orbax restores when it is not told what
        state = ({"count": 0, "mu": PARAMS, "nu": PARAMS, "bound": PARAMS}, None)
        name = "dict"
    else:
        state, name = factory(0.1).init(PARAMS), "ScaleByAdamState"
    with raises(TypeError, "must be a ScaleByAdamodState", f"got {name}"):
        adamod(0.1).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        (adamod(0.1).init(PARAMS), TypeError, "that learning_rates(opt_state, ...)"),
        (PARAMS, TypeError, "returns, got dict"),
        (
            LearningRates(PARAMS, {"w": jnp.ones(3)}),
            ValueError,
            "rates.adaptive['w'] has shape (2,), and rates.bounded['w'] (3,)",
        ),
        (LearningRates(PARAMS, {"v": X}), ValueError, "differ in structure"),
    ],
    ids=["state", "dict", "shapes", "structures"],
)
def test_held_by_bound_of_something_else(rates, error, message):
    with raises(error, message):
        held_by_bound(rates)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a finite number"),
        ({"learning_rate": -math.inf}, ValueError, "to one, got -inf"),
        ({"learning_rate": X}, ValueError, "to one, got an array of shape (2,)"),
        (
            {"learning_rate": lambda _: X},
            ValueError,
            "return a real scalar, got float32",
        ),
        ({"b1": 1.0}, ValueError, "b1 must be in [0, 1), got 1.0"),
        ({"b2": jnp.array(1.0)}, ValueError, "b2 must be in [0, 1), got 1.0"),
        ({"b2": jnp.bfloat16(0.9)}, TypeError, "b2 was given as an array of bfloat16"),
        ({"eps": "1e-8"}, TypeError, "eps must be a number in [0, inf), got '1e-8'"),
        ({"eps": -1e-8}, ValueError, "eps must be in [0, inf), got -1e-08"),
        ({"eps_root": math.inf}, ValueError, "eps_root must be in [0, inf), got inf"),
        ({"convention": "tf"}, ValueError, "'paper', 'torch', got 'tf'"),
    ],
    ids=described,
)
def test_learning_rates_of_something_else(settings, error, message):
    with raises(error, message):
        learning_rates(adamod(0.1).init(PARAMS), **settings)


def test_injected_hyperparameters_of_complex_parameters():
    """Which Optax makes complex too."""
    params = {"w": jnp.ones(3, jnp.complex64)}
    tx = optax.inject_hyperparams(adamod)(0.1)
    with pytest.raises(TypeError, match=r"learning_rate.*hyperparam_dtype"):
        tx.update(params, tx.init(params), params)
    tx = optax.inject_hyperparams(adamod, hyperparam_dtype=jnp.float32)(0.1)
    tx.update(params, tx.init(params), params)
