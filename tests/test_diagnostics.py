"""Are the learning rates those that the update used, wherever the state is?"""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from helpers import assert_few_units_apart
from optax_adamod import (
    LearningRates,
    adamod,
    adamodw,
    held_by_bound,
    learning_rates,
    log10_histogram,
    scale_by_adamod,
)
from reference import AdaMod
from test_aliases import documented_arguments
from test_equations import SCHEDULES, STEPS, make_gradients

PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.full(3, 0.5, np.float32),
}
GRADIENTS = jax.tree.map(lambda p: np.cos(5 * p), PARAMS)


def follow(tx, steps=3, params=PARAMS, gradients=GRADIENTS):
    """Returns the last updates and state, with gradients that shrink."""
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(steps):
        g = optax.tree.scale(np.float32(1 / (1 + step)), gradients)
        updates, state = update(g, state, params)
    return updates, state


def reference_rates(gradients, **settings):
    """Both rates of all steps, NaN before a coordinate's first gradient."""
    adaptive, bounded = [], []
    optimizer = AdaMod(**settings)
    m, v, s, none = (np.zeros(gradients.shape[1:]) for _ in range(4))
    for t, g in enumerate(gradients, start=1):
        m, v, eta, s, _ = optimizer.step(t, g, m, v, s, none)
        adaptive.append(np.where(v == 0, np.nan, eta))
        bounded.append(np.where(v == 0, np.nan, optimizer.rate(t, eta, s)))
    return LearningRates(np.stack(adaptive), np.stack(bounded))


COSINE = ("cosine", dict(b3=0.99))
WARM_UP = ("warm_up", dict(b3=0.9, b1=0.8, b2=0.98, eps=1e-4, eps_root=1e-3))
STEP_DROP = ("step_drop", dict(b3=0.0))
BELOW_ZERO = ("falls_below_zero", dict(b3=0.9))


@pytest.mark.parametrize(
    ("schedule", "settings", "convention", "dtype"),
    [
        (*COSINE, "paper", np.float32),
        (*COSINE, "torch", np.float64),
        (*WARM_UP, "torch", np.float32),
        (*WARM_UP, "paper", np.float64),
        (*STEP_DROP, "paper", np.float32),
        (*STEP_DROP, "torch", np.complex128),
        (*BELOW_ZERO, "torch", np.float32),
        (*BELOW_ZERO, "paper", np.float64),
    ],
)
def test_rates_of_the_reference(schedule, settings, convention, dtype, x64):
    """At every step, and of a coordinate that wakes half-way."""
    settings = settings | {"convention": convention}
    table = np.asarray([SCHEDULES[schedule](t) for t in range(STEPS)], np.float64)
    gradients = make_gradients(dtype)
    expected = reference_rates(gradients, alpha=lambda t: table[t - 1], **settings)
    tx = adamod(lambda count: jnp.asarray(table)[count], **settings)
    del settings["b3"]

    def step(state, g):
        _, state = tx.update(g, state)
        rates = learning_rates(state, lambda t: jnp.asarray(table)[t], **settings)
        return state, rates

    state = tx.init(gradients[0])
    _, actual = jax.jit(lambda g: jax.lax.scan(step, state, g))(gradients)
    asleep = np.isnan(expected.adaptive)
    assert asleep.sum(axis=0).tolist() == [0] * 5 + [STEPS, 0, STEPS // 2, 0]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == np.finfo(dtype).dtype
        rtol = 2e-6 if dtype == np.float32 else 1e-12
        atol = 0.0
        if schedule == "falls_below_zero":  # a bound that does cancels on its way
            atol = rtol * np.nanmax(np.abs(theirs), axis=0, initial=0.0)
        error = np.abs(np.asarray(ours, np.float64) - theirs)
        assert np.array_equal(np.isnan(ours), np.isnan(theirs))
        assert np.all((error <= atol + rtol * np.abs(theirs)) | np.isnan(theirs))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (dict(), 1),
        (dict(), 4),
        (dict(nesterov=True), 30),
        (dict(convention="torch", b1=0.8), 1),
        (dict(eps_root=1e-2, eps=1e-3, b2=0.9), 4),
        (dict(mu_dtype="bfloat16", bound_dtype="bfloat16"), 30),
        (dict(mu_dtype="bfloat16", nu_dtype="bfloat16", bound_dtype="bfloat16"), 4),
        (dict(dtype="complex64"), 30),
    ],
    ids=str,
)
def test_the_update_used_them(settings, steps):
    dtype = np.dtype(settings.get("dtype", "float32"))
    settings = {k: v for k, v in settings.items() if k != "dtype"}
    gradients = make_gradients(dtype)[:, [3, 4, 6, 8]]
    tx = scale_by_adamod(**settings, b3=0.99, bound_learning_rate=0.3)
    update, state = jax.jit(tx.update), tx.init(gradients[0])
    for g in gradients[:steps]:
        updates, state = update(g, state)
    names = ("b1", "b2", "eps", "eps_root", "convention")
    given = {k: v for k, v in settings.items() if k in names}
    rates = jax.jit(lambda state: learning_rates(state, 0.3, **given))(state)
    assert rates.bounded.dtype == np.float32
    optimizer = AdaMod(
        alpha=None, b1=settings.get("b1", 0.9),
        nesterov="nesterov" in settings, convention=settings.get("convention", "paper"),
    )  # fmt: skip
    m_hat = optimizer.m_hat(steps, g, np.asarray(state.mu, g.dtype))
    # The update is per unit of learning rate.
    chex.assert_trees_all_close(
        0.3 * np.asarray(updates), rates.bounded * m_hat, rtol=2e-6
    )
    assert np.all(np.abs(updates) > 1e-6)
    assert np.any(rates.bounded < rates.adaptive)


def rates_of_adamod(**settings):
    return learning_rates(follow(adamod(0.1, **settings))[1], 0.1)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
    "named_chain": lambda tx: optax.named_chain(("first", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition(
        {"train": tx, "freeze": optax.set_to_zero()}, {"w": "train", "b": "train"}
    ),
    "alone": lambda tx: tx,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_state_is_found(wrapper):
    factory = adamodw if wrapper == "chain" else adamod
    _, state = follow(WRAPPED[wrapper](factory(0.1)))
    assert_few_units_apart(learning_rates(state, 0.1), rates_of_adamod())


def test_state_is_found_in_lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    _, state = follow(
        optax.lookahead(adamod(0.1), 2, 0.5), params=params, gradients=GRADIENTS
    )
    assert_few_units_apart(learning_rates(state, 0.1), rates_of_adamod())


@pytest.mark.parametrize("inject", [False, True])
def test_state_is_found_in_flax(inject):
    factory = optax.inject_hyperparams(adamod) if inject else adamod
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, factory(0.1, b2=0.9), wrt=nnx.Param)
    for _ in range(2):
        moved = float(model.bias[0])
        gradients = jax.tree.map(jnp.cos, nnx.state(model, nnx.Param))
        optimizer.update(model, gradients)
    if inject:
        learning_rate, given = optimizer.opt_state.hyperparams["learning_rate"], {}
    else:
        learning_rate, given = 0.1, {"b2": 0.9}
    rates = learning_rates(optimizer.opt_state, learning_rate, **given)
    jitted = jax.jit(lambda state, rate: learning_rates(state, rate, **given))
    chex.assert_trees_all_close(
        jitted(optimizer.opt_state, learning_rate), rates, rtol=1e-6
    )
    in_place = nnx.jit(
        lambda o: learning_rates(
            o.opt_state,
            o.opt_state.hyperparams["learning_rate"] if inject else 0.1,
            **given,
        )
    )
    chex.assert_trees_all_close(in_place(optimizer), rates, rtol=1e-6)
    of_fields = learning_rates(nnx.state(optimizer), learning_rate, **given)
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (of_fields, rates)))
    # The biases start from zero, where their gradient is 1.
    eta = 0.1 / np.sqrt((0.9 * 0.1 + 0.1 * np.cos(moved) ** 2) / (1 - 0.9**2))
    assert rates.adaptive["bias"][...].shape == (3,)
    chex.assert_trees_all_close(
        np.asarray(rates.adaptive["bias"]), np.full(3, eta, np.float32), rtol=1e-6
    )
    chex.assert_shape(rates.bounded["kernel"][...], (2, 3))


def test_leaves_of_others_stay_out():
    _, state = follow(optax.masked(adamod(0.1), {"w": True, "b": False}))
    rates = learning_rates(state, 0.1)
    for tree, expected in zip(rates, rates_of_adamod(), strict=True):
        assert tree["b"] == optax.MaskedNode()
        assert_few_units_apart(tree["w"], expected["w"])
    _, state = follow(
        adamod(0.1), params={"a": None, **PARAMS}, gradients={"a": None, **GRADIENTS}
    )
    rates = learning_rates(state, 0.1)
    assert rates.adaptive["a"] is None
    assert_few_units_apart(rates.bounded["w"], rates_of_adamod().bounded["w"])
    assert learning_rates(adamod(0.1).init({})) == ({}, {})


def test_before_the_first_step_there_is_none():
    rates = learning_rates(adamod(0.1).init(PARAMS), SCHEDULES["cosine"])
    chex.assert_trees_all_equal(
        rates, LearningRates(*[jax.tree.map(lambda p: p * np.nan, PARAMS)] * 2)
    )


@pytest.mark.parametrize("convention", ["paper", "torch"])
def test_zero_learning_rate(convention):
    _, state = follow(adamod(lambda count: 0.0, convention=convention))
    rates = learning_rates(state, 0.0, convention=convention)
    chex.assert_trees_all_equal(
        rates, LearningRates(*[jax.tree.map(np.zeros_like, PARAMS)] * 2)
    )


@pytest.mark.parametrize("number", [float, jnp.float32])
def test_negative_learning_rate(number):
    """As of ascent: the rates are those of descent, with the other sign."""
    _, up = follow(adamod(-0.1, b3=0.9))
    _, down = follow(adamod(0.1, b3=0.9))
    ascent, descent = learning_rates(up, number(-0.1)), learning_rates(down, 0.1)
    chex.assert_trees_all_close(ascent, optax.tree.scale(-1, descent), rtol=1e-6)
    chex.assert_trees_all_close(
        held_by_bound(ascent), held_by_bound(descent), rtol=1e-6
    )
    assert held_by_bound(descent).share["b"] == 1.0


def test_traced_learning_rate_and_one_trace():
    _, state = follow(adamod(0.1))
    rates = jax.jit(chex.assert_max_traces(learning_rates, n=1))
    for learning_rate in (0.1, 0.2, 0.1):
        actual = rates(state, jnp.float32(learning_rate))
        expected = learning_rates(state, learning_rate)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    chex.assert_trees_all_close(actual, rates_of_adamod(), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_injected_hyperparameters_are_used(jit):
    schedule = optax.linear_schedule(0.1, 0.3, 10)
    settings = dict(b1=0.8, b2=0.9, b3=0.5, eps=1e-3, eps_root=1e-2)
    settings = {k: float(np.float32(v)) for k, v in settings.items()}
    inject = optax.inject_hyperparams(adamod)
    _, state = follow(inject(schedule, **settings, convention="torch"))
    _, plain = follow(adamod(schedule, **settings, convention="torch"))
    del settings["b3"]

    def rates(state):
        alpha = state.hyperparams["learning_rate"]
        return learning_rates(state, alpha, convention="torch")

    actual = jax.jit(rates)(state) if jit else rates(state)
    expected = learning_rates(plain, schedule, **settings, convention="torch")
    chex.assert_trees_all_close(actual, expected, rtol=5e-6)
    # The state inside is like any other.
    alpha = schedule(2)
    inner = learning_rates(state.inner_state, alpha, **settings, convention="torch")
    chex.assert_trees_all_close(inner, expected, rtol=5e-6)


def test_injected_bound_learning_rate_is_used():
    inject = optax.inject_hyperparams(scale_by_adamod)
    _, state = follow(inject(bound_learning_rate=0.1, b3=0.5))
    expected = rates_of_adamod(b3=0.5)
    chex.assert_trees_all_close(learning_rates(state), expected, rtol=1e-5)


def test_static_hyperparameters_are_given():
    inject = optax.inject_hyperparams(adamod, static_args=("b1", "b2", "eps"))
    _, state = follow(inject(0.1, b2=0.9, b3=0.5))
    alpha = state.hyperparams["learning_rate"]
    expected = learning_rates(follow(adamod(0.1, b2=0.9, b3=0.5))[1], 0.1, b2=0.9)
    chex.assert_trees_all_close(
        learning_rates(state, alpha, b2=0.9), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("given", "jit"),
    [
        ({"b2": 0.98}, False),
        ({"b2": 0.98}, True),
        ({"eps": 1e-6}, True),
        ({"b1": 0.5}, False),
        ({"eps_root": 1e-9}, True),
    ],
    ids=str,
)
def test_another_value_than_the_injected_one(given, jit):
    _, state = follow(optax.inject_hyperparams(adamod)(0.1))
    ((name, value),) = given.items()

    def rates(state):
        return learning_rates(state, state.hyperparams["learning_rate"], **given)

    message = rf"^{name} is given as {value}, but .*leave {name} out.*inner_state"
    with pytest.raises(ValueError, match=message):
        (jax.jit(rates) if jit else rates)(state)


@pytest.mark.parametrize("inject", [False, True])
def test_one_dictionary_of_settings_serves_optimizer_and_rates(inject):
    settings = dict(b1=0.8, b2=0.98, b3=0.9, eps=1e-6, eps_root=1e-9)
    factory = optax.inject_hyperparams(adamod) if inject else adamod
    _, state = follow(factory(0.1, **settings))
    rates = learning_rates(state, 0.1, **settings)
    other = learning_rates(state.inner_state if inject else state, 0.1, **settings)
    chex.assert_trees_all_close(rates, other, rtol=1e-5)
    assert np.all(rates.bounded["w"] < rates.adaptive["w"])


def test_injected_learning_rates_are_told_apart():
    _, state = follow(optax.inject_hyperparams(adamod)(0.1))
    with pytest.raises(ValueError, match=r"holds a learning_rate.*adamod and adamodw"):
        learning_rates(state)
    _, state = follow(optax.inject_hyperparams(scale_by_adamod)())
    with pytest.raises(ValueError, match=r"^learning_rate is given as 0.1, but"):
        learning_rates(state, 0.1)


def test_several_states_or_none():
    tx = optax.partition(
        {"fast": adamod(0.1), "slow": adamod(0.01)}, {"w": "fast", "b": "slow"}
    )
    _, state = follow(tx)
    with pytest.raises(ValueError, match="one ScaleByAdamodState, and holds 2: pass one of") as error:
        learning_rates(state, 0.1)
    paths = re.findall(r"opt_state[^ ,]*\[0\](?=[,.]|$)", str(error.value))
    assert len(paths) == 2
    one = eval(paths[0], {"opt_state": state})  # what the message says to pass
    rates = learning_rates(one, 0.1)
    assert_few_units_apart(rates.bounded["w"], rates_of_adamod().bounded["w"])

    _, state = follow(optax.chain(optax.clip(1.0), optax.adam(0.1)))
    with pytest.raises(ValueError, match=r"no ScaleByAdamodState.*ScaleByAdamState"):
        learning_rates(state, 0.1)
    with pytest.raises(ValueError, match="no ScaleByAdamodState; it is made of dict"):
        learning_rates(PARAMS)
    for nothing in (None, 3.0):
        with pytest.raises(ValueError, match=f"made of {type(nothing).__name__}"):
            learning_rates(nothing)


def test_a_stack_of_states():
    tx = adamod(0.1)
    params = jnp.ones((4, 4))
    _, state = jax.vmap(tx.update)(jnp.cos(params), jax.vmap(tx.init)(params))
    with pytest.raises(ValueError, match=r"stack of \(4,\) states.*jax.vmap"):
        learning_rates(state, 0.1)
    rates = jax.vmap(lambda state: learning_rates(state, 0.1))(state)
    _, one = tx.update(jnp.cos(params[0]), tx.init(params[0]))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[2], rates), learning_rates(one, 0.1), rtol=1e-6
    )
    chex.assert_shape(
        jax.vmap(lambda x: log10_histogram(x, [-1, 0, 1]).counts)(rates.bounded), (4, 2)
    )


def test_defaults_are_those_of_the_optimizer():
    ours = inspect.signature(learning_rates).parameters
    theirs = inspect.signature(scale_by_adamod).parameters
    names = list(ours)[2:]
    assert names == ["b1", "b2", "b3", "eps", "eps_root", "convention"]
    assert all(ours[name].default is None for name in ["learning_rate", *names])
    defaults = {name: theirs[name].default for name in names}
    _, state = follow(scale_by_adamod())
    chex.assert_trees_all_equal(
        learning_rates(state), learning_rates(state, 1.0, **defaults)
    )
    for f in (learning_rates, log10_histogram, held_by_bound):
        assert list(documented_arguments(f)) == list(inspect.signature(f).parameters)
