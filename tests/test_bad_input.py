"""Is what cannot work refused, with the name, the value and the way out?"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod, adamodw, scale_by_adamod

FACTORIES = pytest.mark.parametrize(
    "factory",
    [scale_by_adamod, lambda **kw: adamod(0.1, **kw), lambda **kw: adamodw(0.1, **kw)],
    ids=["scale_by_adamod", "adamod", "adamodw"],
)


@FACTORIES
@pytest.mark.parametrize("name", ["b1", "b2", "b3"])
@pytest.mark.parametrize(
    "value", [-0.1, 1.0, 1, 2.0, math.nan, math.inf, np.float32(1)]
)
def test_decay_rates(factory, name, value):
    with pytest.raises(
        ValueError, match=rf"^{name} must be in \[0, 1\), got .*{value}"
    ):
        factory(**{name: value})


@FACTORIES
@pytest.mark.parametrize("name", ["eps", "eps_root"])
@pytest.mark.parametrize("value", [-1e-8, math.nan, math.inf])
def test_epsilons(factory, name, value):
    with pytest.raises(
        ValueError, match=rf"^{name} must be in \[0, inf\), got {value}"
    ):
        factory(**{name: value})


@FACTORIES
@pytest.mark.parametrize("name", ["nu_dtype", "bound_dtype"])
@pytest.mark.parametrize(
    "value", ["float16", "complex64", "int32", jnp.float16, "floaty"]
)
def test_dtypes_of_rates(factory, name, value):
    with pytest.raises(
        TypeError,
        match=rf"^{name} must be .*float32.*got {re.escape(repr(value))}.*1e8",
    ):
        factory(**{name: value})


@FACTORIES
@pytest.mark.parametrize("value", ["int8", bool, "float8_e4m3fn", "floaty"])
def test_dtype_of_mu(factory, value):
    with pytest.raises(
        TypeError, match=rf"^mu_dtype must be .*bfloat16.*got {re.escape(repr(value))}"
    ):
        factory(mu_dtype=value)


@FACTORIES
def test_conventions(factory):
    with pytest.raises(
        ValueError, match="convention must be one of 'paper', 'torch', got 'tf'"
    ):
        factory(convention="tf")
    with pytest.raises(
        ValueError, match=r"nesterov=True .*'paper'.* got convention='torch'"
    ):
        factory(convention="torch", nesterov=True)


@FACTORIES
@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(2, bool), jax.random.key(0)])
def test_parameters_without_moments(factory, leaf):
    params = {"dense": {"kernel": jnp.ones(2), "steps": leaf}}
    message = r"params\['dense'\]\['steps'\] has dtype .*optax.masked.*optax.partition"
    with pytest.raises(TypeError, match=message) as error:
        factory().init(params)
    assert str(leaf.dtype) in str(error.value)


X = jnp.ones(2)


@FACTORIES
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
def test_another_structure(factory, params, updates):
    tx = factory()
    state = tx.init(params)
    with pytest.raises(ValueError, match="differ in structure") as error:
        tx.update(updates, state, params)
    for tree in (params, updates):
        if tree is not None:
            assert str(jax.tree.structure(tree)) in str(error.value)


@FACTORIES
@pytest.mark.parametrize(
    ("parameter", "g"),
    [("float32", "complex64"), ("complex64", "float32"), ("float32", "int32")],
)
def test_another_kind_of_gradient(factory, parameter, g):
    tx = factory()
    params = {"a": jnp.ones(2, parameter)}
    with pytest.raises(
        TypeError, match=rf"updates\['a'\] has dtype {g}, .*{parameter}"
    ):
        tx.update({"a": jnp.ones(2, g)}, tx.init(params), params)


@FACTORIES
@pytest.mark.parametrize("name", ["b3", "eps"])
def test_arrays_as_hyperparameters(factory, name):
    with pytest.raises(ValueError, match=f"{name} must be in .* got -?1000.0"):
        factory(**{name: np.array(1000.0) if name == "b3" else np.array(-1000.0)})
    with pytest.raises(ValueError, match=rf"{name} must be a scalar, got .*\(1,\)"):
        factory(**{name: jnp.ones(1)})
    with pytest.raises(TypeError, match=f"{name} was given as an array of float16"):
        factory(**{name: jnp.float16(0.5)})


@FACTORIES
def test_another_shape(factory):
    tx = factory()
    state = tx.init({"a": jnp.ones((2, 3))})
    updates = {"a": jnp.ones((1, 3))}
    message = r"updates\['a'\] has shape \(1, 3\), but .* shape \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        tx.update(updates, state, updates)


@pytest.mark.parametrize("factory", [optax.adam, dict], ids=["adam", "dict"])
def test_another_state(factory):
    params = {"w": jnp.ones(2)}
    if factory is dict:  # what Orbax restores when it is not told what
        state = ({"count": 0, "mu": params, "nu": params, "bound": params}, None)
        name = "dict"
    else:
        state, name = factory(0.1).init(params), "ScaleByAdamState"
    with pytest.raises(TypeError, match=f"must be a ScaleByAdamodState.*got {name}"):
        adamod(0.1).update(params, state, params)
