"""Are the learning rates, and what the bound holds, those of the update?"""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_adamod import (
    LearningRates,
    ScaleByAdamodState,
    adamod,
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


@functools.cache
def trained():
    """The state of AdaMod after three gradients that shrink."""
    tx = scale_by_adamod(b3=0.9, bound_learning_rate=0.1)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for step in range(3):
        g = optax.tree.scale(np.float32(1 / (1 + step)), GRADIENTS)
        _, state = update(g, state)
    return state


def with_trained(state):
    """A state with that one in it, where it has one of AdaMod."""
    return jax.tree.map(
        lambda x: trained() if is_adamod(x) else x, state, is_leaf=is_adamod
    )


def is_adamod(x):
    return isinstance(x, ScaleByAdamodState)


def reference_rates(gradients, **settings):
    """Both rates of all steps, NaN before a coordinate's first gradient."""
    adaptive, bounded = [], []
    optimizer = AdaMod(**settings)
    m, v, s = (np.zeros(gradients.shape[1:]) for _ in range(3))
    for t, g in enumerate(gradients, start=1):
        m, v, eta, s, _ = optimizer.step(t, g, m, v, s)
        adaptive.append(np.where(v == 0, np.nan, eta))
        bounded.append(np.where(v == 0, np.nan, optimizer.rate(t, eta, s)))
    return LearningRates(np.stack(adaptive), np.stack(bounded))


WARM_UP = dict(b3=0.9, b1=0.8, b2=0.98, eps=1e-4, eps_root=1e-3)


@pytest.mark.parametrize(
    ("schedule", "settings", "convention", "dtype"),
    [
        ("cosine", dict(b3=0.99), "paper", np.float32),
        ("warm_up", WARM_UP, "torch", np.float64),
        ("step_drop", dict(b3=0.0), "torch", np.complex128),
        ("falls_below_zero", dict(b3=0.9), "paper", np.float64),
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
        if schedule == "falls_below_zero":  # whose bound cancels on its way
            atol = rtol * np.nanmax(np.abs(theirs), axis=0, initial=0.0)
        error = np.abs(np.asarray(ours, np.float64) - theirs)
        assert np.array_equal(np.isnan(ours), np.isnan(theirs))
        assert np.all((error <= atol + rtol * np.abs(theirs)) | np.isnan(theirs))


def test_the_update_used_them():
    """As they are stored."""
    gradients = make_gradients(np.float32)[:4, [3, 4, 6, 8]]
    dtypes = dict.fromkeys(("mu_dtype", "nu_dtype", "bound_dtype"), "bfloat16")
    tx = scale_by_adamod(**dtypes, b3=0.99, bound_learning_rate=0.3)
    update, state = jax.jit(tx.update), tx.init(gradients[0])
    for g in gradients:
        updates, state = update(g, state)
    rates = learning_rates(state, 0.3)
    assert rates.bounded.dtype == np.float32
    m_hat = np.asarray(state.mu, np.float32) / (1 - 0.9**4)
    # The update is per unit of learning rate.
    expected = rates.bounded * m_hat / 0.3
    chex.assert_trees_all_close(updates, expected, rtol=2e-6)
    assert np.any(rates.bounded < rates.adaptive)


FREEZE, SYNCED = optax.set_to_zero(), optax.LookaheadParams.init_synced(PARAMS)


@pytest.mark.parametrize(
    "init",
    [
        lambda tx: tx.init(PARAMS),
        lambda tx: optax.chain(optax.identity(), optax.chain(tx)).init(PARAMS),
        lambda tx: optax.named_chain(("first", tx)).init(PARAMS),
        lambda tx: optax.MultiSteps(tx, every_k_schedule=1).init(PARAMS),
        lambda tx: optax.apply_if_finite(tx, 3).init(PARAMS),
        lambda tx: optax.masked(tx, True).init(PARAMS),
        lambda tx: optax.partition({0: tx, 1: FREEZE}, {"w": 0, "b": 0}).init(PARAMS),
        lambda tx: optax.lookahead(tx, 2, 0.5).init(SYNCED),
    ],
)
def test_state_is_found(init):
    rates = learning_rates(with_trained(init(adamod(0.1))), 0.1)
    chex.assert_trees_all_equal(rates, learning_rates(trained(), 0.1))


def test_state_is_found_in_flax():
    """With hyperparameters in it, under nnx.jit, and where fields are mappings."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    factory = optax.inject_hyperparams(adamod)
    optimizer = nnx.Optimizer(model, factory(0.1, b2=0.9), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))

    def rates_of(optimizer):
        state = optimizer.opt_state
        return learning_rates(state, state.hyperparams["learning_rate"])

    rates = rates_of(optimizer)
    chex.assert_trees_all_close(nnx.jit(rates_of)(optimizer), rates, rtol=1e-6)
    inner = optimizer.opt_state.inner_state
    for state, given in ((optimizer, {}), (inner, {"b2": 0.9})):
        of_fields = learning_rates(nnx.state(state), 0.1, **given)
        both = map(jax.tree.leaves, (of_fields, rates))
        chex.assert_trees_all_close(*both, rtol=1e-6)
    # The biases start from zero, where their gradient is 1.
    np.testing.assert_allclose(rates.adaptive["bias"], np.full(3, 0.1), rtol=1e-6)
    chex.assert_shape(rates.bounded["kernel"][...], (2, 3))


def test_leaves_of_others_stay_out():
    others = {"a": None, "b": optax.MaskedNode()}
    count, *averages = trained()
    averages = [{**others, "w": average["w"]} for average in averages]
    rates = learning_rates(ScaleByAdamodState(count, *averages), 0.1)
    for tree, expected in zip(rates, learning_rates(trained(), 0.1), strict=True):
        chex.assert_trees_all_equal(tree, {**others, "w": expected["w"]})
    assert learning_rates(adamod(0.1).init({})) == ({}, {})


@pytest.mark.parametrize("convention", ["paper", "torch"])
def test_rates_that_are_alike(convention):
    """NaN before the first step, and 0 where the learning rate is."""
    fresh, schedule = adamod(0.1).init(PARAMS), SCHEDULES["cosine"]
    for state, alpha, rate in ((fresh, schedule, np.nan), (trained(), 0.0, 0.0)):
        rates = learning_rates(state, alpha, convention=convention)
        expected = jax.tree.map(lambda p, rate=rate: np.full_like(p, rate), PARAMS)
        chex.assert_trees_all_equal(rates, LearningRates(expected, expected))


def test_negative_learning_rate():
    """As of ascent: the rates are those of descent, with the other sign."""
    up = trained()._replace(bound=optax.tree.scale(-1, trained().bound))
    ascent = learning_rates(up, jnp.float32(-0.1))
    descent = learning_rates(trained(), 0.1)
    chex.assert_trees_all_close(ascent, optax.tree.scale(-1, descent), rtol=1e-6)
    held = held_by_bound(ascent), held_by_bound(descent)
    chex.assert_trees_all_close(*held, rtol=1e-6)
    assert held[0].share["b"] == 1.0


SETTINGS = dict(b1=0.75, b2=0.875, b3=0.5, eps=2**-10, eps_root=2**-7)


def test_injected_hyperparameters_are_used():
    """And are those of the last step; the state inside is like any other."""
    schedule = optax.linear_schedule(0.1, 0.3, 10)
    tx = optax.inject_hyperparams(adamod)(schedule, **SETTINGS, convention="torch")
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for _ in range(2):
        _, state = update(GRADIENTS, state)

    def rates(state, **given):
        alpha = state.hyperparams["learning_rate"]
        return learning_rates(state, alpha, convention="torch", **given)

    for alpha in (schedule, schedule(1)):
        given = dict(**SETTINGS, learning_rate=alpha, convention="torch")
        expected = learning_rates(state.inner_state, **given)
        for actual in (rates(state), jax.jit(rates)(state)):
            chex.assert_trees_all_close(actual, expected, rtol=5e-6)
    # One dictionary serves the optimizer and the rates, which do not depend on b3.
    chex.assert_trees_all_equal(rates(state, **{**SETTINGS, "b3": 0.9}), rates(state))


def test_what_is_not_injected_is_given():
    expected = learning_rates(trained(), 0.1, b2=0.9)
    inject = optax.inject_hyperparams(scale_by_adamod)
    state = with_trained(inject(bound_learning_rate=0.1, b2=0.9).init(PARAMS))
    chex.assert_trees_all_close(learning_rates(state), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^learning_rate is given as 0.2, but"):
        learning_rates(state, 0.2)
    inject = optax.inject_hyperparams(adamod, static_args=("b1", "b2", "eps"))
    state = with_trained(inject(0.1, b2=0.9).init(PARAMS))
    rates = learning_rates(state, state.hyperparams["learning_rate"], b2=0.9)
    chex.assert_trees_all_close(rates, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"holds a learning_rate.*adamod and adamodw"):
        learning_rates(state)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "given", [{"b1": 0.5}, {"b2": 0.98}, {"eps": 1e-6}, {"eps_root": 1e-9}], ids=str
)
def test_another_value_than_the_injected_one(given, jit):
    """Under jit any value is another one."""
    state = with_trained(optax.inject_hyperparams(adamod)(0.1).init(PARAMS))
    ((name, value),) = given.items()

    def rates(state):
        return learning_rates(state, state.hyperparams["learning_rate"], **given)

    message = rf"^{name} is given as {value}, but .*leave {name} out.*inner_state"
    with pytest.raises(ValueError, match=message):
        (jax.jit(rates) if jit else rates)(state)


def test_several_states_or_none():
    tx = optax.partition({0: adamod(0.1), 1: adamod(0.01)}, {"w": 0, "b": 1})
    state = with_trained(tx.init(PARAMS))
    with pytest.raises(ValueError, match="holds 2: pass one of opt_state") as error:
        learning_rates(state, 0.1)
    paths = re.findall(r"opt_state[^ ,]*\[0\](?=[,.]|$)", str(error.value))
    assert len(paths) == 2
    one = eval(paths[0], {"opt_state": state})  # what the message says to pass
    assert one is trained()

    adam = optax.chain(optax.adam(0.1)).init(PARAMS)
    types = ".*ScaleByAdamState", "dict", "NoneType", "float"
    for nothing, kind in zip((adam, PARAMS, None, 3.0), types, strict=True):
        with pytest.raises(ValueError, match=f"holds 0: it is made of {kind}"):
            learning_rates(nothing)


def test_a_stack_of_states():
    other = trained()._replace(nu=optax.tree.scale(2, trained().nu))
    state = jax.tree.map(lambda *x: jnp.stack(x), trained(), other)
    with pytest.raises(ValueError, match=r"stack of \(2,\) states.*jax.vmap"):
        learning_rates(state, 0.1)
    rates = jax.vmap(lambda state: learning_rates(state, 0.1))(state)
    second = jax.tree.map(lambda x: x[1], rates)
    chex.assert_trees_all_close(second, learning_rates(other, 0.1), rtol=1e-6)
    counts = jax.vmap(lambda x: log10_histogram(x, [-1, 0, 1]).counts)(rates.bounded)
    chex.assert_shape(counts, (2, 2))


def test_defaults_are_those_of_the_optimizer():
    ours = inspect.signature(learning_rates).parameters
    theirs = inspect.signature(scale_by_adamod).parameters
    names = list(ours)[2:]
    assert names == ["b1", "b2", "b3", "eps", "eps_root", "convention"]
    assert all(ours[name].default is None for name in ["learning_rate", *names])
    defaults = {name: theirs[name].default for name in names}
    chex.assert_trees_all_equal(
        learning_rates(trained()), learning_rates(trained(), 1.0, **defaults)
    )
    for f in (learning_rates, log10_histogram, held_by_bound):
        assert list(documented_arguments(f)) == list(inspect.signature(f).parameters)


def numpy_held(adaptive, bounded):
    held = bounded < adaptive
    factors = (adaptive / bounded)[held].astype(np.float64)
    share = held.sum() / (~np.isnan(adaptive)).sum()
    return np.float32(share), np.float32(np.exp(np.log(factors).mean()))


@pytest.mark.parametrize(("size", "dtype"), [(1, np.float64), (1001, np.float32)])
def test_what_the_bound_holds(size, dtype, x64):
    rng = np.random.default_rng(size)
    adaptive = rng.lognormal(sigma=3, size=(size, 7)).astype(dtype)
    bound = rng.lognormal(sigma=3, size=(size, 7)).astype(dtype)
    adaptive[0, :2], bound[0, :2] = (np.nan, 9.0), (1.0, 1.0)
    rates = LearningRates({"a": adaptive}, {"a": np.minimum(adaptive, bound)})
    held = jax.jit(held_by_bound)(jax.tree.map(jnp.asarray, rates))
    share, factor = numpy_held(adaptive, np.minimum(adaptive, bound))
    chex.assert_trees_all_close(tuple(held), ({"a": share}, {"a": factor}), rtol=2e-6)
    assert held.factor["a"].dtype == held.share["a"].dtype == np.float32


def test_nothing_to_hold_and_infinity():
    nan, inf = jnp.full(5, jnp.nan), jnp.full(5, jnp.inf)
    empty, one, two = jnp.zeros((0, 2)), jnp.asarray(1.0), jnp.full(5, 2.0)
    held = held_by_bound(LearningRates([nan, empty, one, inf], [nan, empty, one, two]))
    np.testing.assert_array_equal(held.share, [np.nan, np.nan, 0.0, 1.0])
    np.testing.assert_array_equal(held.factor, [np.nan, np.nan, np.nan, np.inf])


def test_more_coordinates_than_float32_counts():
    """Added one by one, 2**24 and 1 are 2**24."""
    n = 2**25
    adaptive = jnp.where(jnp.arange(n) % 4 == 0, 2.0, 1.0)
    held = jax.jit(held_by_bound)(LearningRates(adaptive, jnp.ones(n)))
    assert held == pytest.approx((0.25, 2.0), rel=1e-5)
