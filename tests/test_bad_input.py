"""Is what cannot work refused, with the name, the value and the way out?"""

import functools
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
TX, ADAM = scale_by_adamod(), scale_by_adamod(b3=0)
STATE = TX.init(PARAMS)
OPTAXS = optax.scale_by_adam().init(PARAMS)
STACK = jax.vmap(TX.init)({"w": jnp.ones((3, 2))})

new = functools.partial(adamodw, 0.1)
rates_of = functools.partial(learning_rates, STATE)


def init(leaf, **settings):
    return new(**settings).init({"dense": {"kernel": X, "steps": leaf}})


def update(params, updates):
    return TX.update(updates, TX.init(params))


def spoiled(**fields):
    return TX.update(PARAMS, STATE._replace(**fields))


def scheduled(value):
    tx = scale_by_adamod(bound_learning_rate=lambda _: value)
    return tx.update(PARAMS, tx.init(PARAMS))


def raises(error, message):
    """Expects the parts between ``.*`` as they are, in this order."""
    parts = map(re.escape, message.split(".*"))
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


NUMBER = "must be a number in [0, 1), got"
RATE = "must be a finite number, or a schedule from the step count to one, got"
SCALAR = "the schedule of the learning rate must return a real scalar, got"
PLACE = "If these are the parameters, init and update take them."
LEFT_OUT = "optax.masked.*optax.partition"
KIND = "updates['w'] has dtype {}, but its parameter takes {}"
OF_TYPE = [
    # Settings.
    (lambda: new(b1="1e-8"), f"b1 {NUMBER} '1e-8', of type str."),
    (lambda: new(b1=True), f"b1 {NUMBER} True, of dtype bool."),
    (lambda: new(b2=np.array("0.9")), f"b2 {NUMBER} 0.9, of dtype <U3."),
    (lambda: new(b3=0.5j), f"b3 {NUMBER} 0.5j, of dtype complex"),
    (lambda: new(b1=PARAMS), f"of type dict. {PLACE}"),
    (lambda: new(b1=MODEL), PLACE),
    (lambda: new(b1=optax.constant_schedule(0.9)), "use optax.inject_hyperparams(ad"),
    (lambda: new(b2=np.float16(0.9)), "b2 was given as an array of float16, which"),
    (lambda: new(eps=jnp.bfloat16(1)), "eps was given as an.*dtype=jnp.float32"),
    (lambda: new(eps="0"), "eps must be a number in [0, inf), got '0'"),
    (lambda: adamod("1e-3"), f"learning_rate {RATE} '1e-3', of type str."),
    (lambda: adamod(PARAMS, 1e-3), f"learning_rate must be.*of type dict. {PLACE}"),
    (lambda: new(weight_decay=1j), f"weight_decay {RATE} 1j.*dtype=jnp.float32"),
    (lambda: new(nu_dtype="float16"), "nu_dtype must be.*got 'float16'.*1e8"),
    (lambda: new(nu_dtype="floaty"), "nu_dtype must be.*float32, .*got 'floaty'"),
    (lambda: new(bound_dtype=jnp.int32), "bound_dtype must be.*got <class.*1e8"),
    (lambda: new(mu_dtype=bool), "mu_dtype must be.*bfloat16.*got <class 'bool'>"),
    (lambda: new(mu_dtype="float8_e4m3fn"), "mu_dtype must be.*got 'float8_e4m3fn'"),
    # Parameters.
    (lambda: init(jnp.arange(3)), f"['dense']['steps'] has dtype int32.*{LEFT_OUT}"),
    (lambda: init(3), f"params['dense']['steps'] has dtype int32.*{LEFT_OUT}"),
    (lambda: init(jax.random.key(0)), f"has dtype key<fry>.*{LEFT_OUT}"),
    (lambda: init("relu"), f"['steps'] is 'relu', of type str.*{LEFT_OUT}"),
    (lambda: init(object), "is <class 'object'>, of type type"),
    (lambda: init(X + 1j, mu_dtype="float8"), "is complex, and mu_dtype='float8' is"),
    # Gradients and states.
    (lambda: update(PARAMS, {"w": X + 1j}), KIND.format("complex64", "bfloat16, f")),
    (lambda: update(PARAMS, {"w": X > 0}), KIND.format("bool", "bfloat16, f")),
    (lambda: update({"w": X + 1j}, PARAMS), KIND.format("float32", "complex64, comp")),
    (lambda: TX.update(PARAMS, STATE._asdict()), "be a ScaleByAdamodState.*got dict"),
    (lambda: TX.update(PARAMS, OPTAXS), "got ScaleByAdamState.*optax_adamod.from_adam"),
    # Learning rates.
    (lambda: rates_of("0.1"), "learning_rate must be a finite number"),
    (lambda: rates_of(0.1, b2=jnp.bfloat16(0.9)), "b2 was given as an array of bfloa"),
    (lambda: held_by_bound(STATE), "that learning_rates(opt_state, ...)"),
    (lambda: held_by_bound(PARAMS), "returns, got dict"),
]
STRUCTURE = "differ in structure"
OF_VALUE = [
    # Settings.
    (lambda: new(b1=jnp.ones(1)), f"b1 {NUMBER} an array of shape (1,)."),
    (lambda: new(b3=jnp.array(0.0)), "b3 is an array of 0.*static_args='b3', or begin"),
    (lambda: adamod(10**400), f"learning_rate {RATE} inf."),
    (lambda: adamod(X, 1e-3), f"learning_rate {RATE} an array of shape (2,). {PLACE}"),
    (lambda: new(convention="tf"), "must be one of 'paper', 'torch', got 'tf'"),
    (lambda: new(convention=["paper"]), "convention must be one of 'paper', 'torch'"),
    (
        lambda: new(convention="torch", nesterov=True),
        "nesterov=True is.*got conv.*torch",
    ),
    (
        lambda: adamod(-0.1, bound_dtype="float8"),
        "the learning rate must be at least 0 ",
    ),
    (lambda: scheduled(X), f"{SCALAR} float32 of shape (2,)"),
    (lambda: scheduled(True), f"{SCALAR} bool"),
    (lambda: scheduled(None), f"{SCALAR} None"),
    (lambda: scheduled((0.1,)), f"{SCALAR} (0.1,)"),
    # Gradients and states.
    (lambda: update({"a": X, "b": X}, {"a": X, "c": X}), f"{STRUCTURE}.*'c'.*'b'"),
    (lambda: update(PARAMS, X), STRUCTURE),
    (lambda: update(PARAMS, None), STRUCTURE),
    (lambda: update({"w": PARAMS}, PARAMS), f"{STRUCTURE}: ['w'] in the updates alone"),
    (lambda: update({"w": None}, PARAMS), STRUCTURE),
    (lambda: update({"w": optax.MaskedNode()}, PARAMS), STRUCTURE),
    (lambda: spoiled(nu=None), f"the state's nu {STRUCTURE}"),
    (lambda: spoiled(bound={"w": X, "v": X}), f"the state's bound {STRUCTURE}"),
    (lambda: update(PARAMS, {"w": X[None]}), "['w'] has shape (1, 2).*of shape (2,)"),
    (lambda: spoiled(nu={"w": X[None]}), "state's nu there was.*of shape (1, 2)"),
    (lambda: spoiled(bound={"w": X[0]}), "state's bound there was.*of shape ()"),
    (lambda: spoiled(bound=None), "bound is None, as with b3=0.*from_adamod"),
    (lambda: ADAM.update(PARAMS, STATE), "state has a bound.*b3 is 0.*from_adamod"),
    (lambda: TX.update(PARAMS, STACK), "the state is a stack of (3,) states.*vmap"),
    # Learning rates.
    (lambda: rates_of(lambda _: X), f"{SCALAR} float32"),
    (lambda: rates_of(0.1, b1=1.0), "b1 must be in [0, 1), got 1.0"),
    (lambda: rates_of(0.1, eps=-1e-8), "eps must be in [0, inf), got -1e-08"),
    (lambda: rates_of(0.1, eps_root=math.inf), "eps_root must be in [0, inf), got inf"),
    (lambda: rates_of(0.1, convention="tf"), "'paper', 'torch', got 'tf'"),
    (
        lambda: held_by_bound(LearningRates(PARAMS, {"w": jnp.ones(3)})),
        "rates.adaptive['w'] has shape (2,), and rates.bounded['w'] (3,)",
    ),
    (lambda: held_by_bound(LearningRates(PARAMS, {"v": X})), STRUCTURE),
]


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [(TypeError, *row) for row in OF_TYPE] + [(ValueError, *row) for row in OF_VALUE],
)
def test_what_is_refused(error, call, message):
    with raises(error, message):
        call()


RANGES = {
    "b1": ([-0.1, 1.0, math.nan, math.inf], "b1 must be in [0, 1), got"),
    "b2": ([-0.1, 1.0, math.nan, -math.inf], "b2 must be in [0, 1), got"),
    "b3": ([-0.1, 1.0, math.nan], "b3 must be in [0, 1), got"),
    "eps": ([-1e-8, math.nan, math.inf], "eps must be in [0, inf), got"),
    "eps_root": ([-1e-8, math.nan, math.inf], "eps_root must be in [0, inf), got"),
    "learning_rate": ([math.nan, math.inf, -math.inf], f"learning_rate {RATE}"),
    "weight_decay": ([math.nan, math.inf], f"weight_decay {RATE}"),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range(name):
    values, message = RANGES[name]
    for kind in (float, np.float32, np.asarray, jnp.asarray):
        for value in map(kind, values):
            with raises(ValueError, f"{message} {float(value)}"):
                adamodw(**{"learning_rate": 0.1, name: value})


@pytest.mark.parametrize("factory", [scale_by_adamod, adamod, adamodw])
def test_every_factory_checks(factory):
    """With the code that the tables ask through ``adamodw``, and its own names."""
    rate = "bound_learning_rate" if factory is scale_by_adamod else "learning_rate"
    wrong = dict.fromkeys(("b1", "b2", "b3"), 1.0) | {"eps": -1.0, "eps_root": -1.0}
    wrong |= dict.fromkeys(("mu_dtype", "nu_dtype", "bound_dtype"), "int8")
    wrong |= {"convention": "tf", rate: math.nan}
    for name, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            factory(**{rate: 0.1, name: value})


@pytest.mark.parametrize("factory", [adamod, adamodw])
def test_the_fourth_position_is_that_of_b3(factory):
    for kind in (float, np.float32, np.asarray):
        for others in ((1e-8,), (9.9e-4,), (1e-8, 0.0)):
            with raises(ValueError, "b3 must be 0, which gives Adam, or.*eps=1e-8"):
                factory(1e-3, 0.9, 0.999, kind(others[0]), *others[1:])
        for b3 in (0.0, 1e-3):
            factory(1e-3, 0.9, 0.999, kind(b3))


def test_what_is_concrete_is_checked_under_inject_hyperparams_too():
    tx = optax.inject_hyperparams(adamod)
    with raises(ValueError, "b3 must be in [0, 1), got 1.5"):
        tx(0.1, b3=1.5).init(PARAMS)
    tx(0.1, b3=optax.linear_schedule(1e-4, 0.9, 20_000)).init(PARAMS)  # begins low
    jax.jit(tx(0.1, b3=1.5).init)(PARAMS)  # where it is a number of the program
    # Optax makes hyperparameters of the parameters' dtype.
    for dtype, message in (
        ("complex64", "learning_rate must be.*hyperparam_dtype=jnp.float32"),
        ("bfloat16", "b1 was given as an array of bfloat16.*hyperparam_dtype"),
    ):
        params = {"w": X.astype(dtype)}
        with raises(TypeError, message):
            tx(0.1).init(params)
        optax.inject_hyperparams(adamod, hyperparam_dtype=jnp.float32)(0.1).init(params)
