"""Are steps finite and bounded where learning rates and gradients are extreme?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import (
    adamod,
    adamodw,
    held_by_bound,
    learning_rates,
    log10_histogram,
    scale_by_adamod,
)

CONVENTIONS = pytest.mark.parametrize("convention", ["paper", "torch"])


def steps_of(tx):
    """Returns what runs gradients, shape (steps, ...): updates and the last state."""

    def body(state, g):
        updates, state = tx.update(g, state, g)
        return state, updates

    @jax.jit
    def run(gradients):
        state, updates = jax.lax.scan(body, tx.init(gradients[0]), gradients)
        return updates, state

    return run


def steps(tx, gradients):
    return steps_of(tx)(gradients)


@CONVENTIONS
def test_linear_decays_of_any_length_end_with_their_smallest_step(convention):
    """36 of these 2,999 lengths end below zero, by a rounding error."""
    lengths = np.arange(2, 3001)
    peak = np.float32(3e-4)
    slopes = peak / lengths.astype(np.float32)
    last_rates = peak - lengths.astype(np.float32) * slopes
    assert np.sum(last_rates < 0) == 36

    def last_update(length, slope, last_rate):
        def schedule(count):
            return jnp.where(count == length, last_rate, peak - count * slope)

        def body(count, carry):
            state, last = carry
            updates, state = tx.update(jnp.float32(1), state)
            return state, jnp.where(count == length, updates, last)

        tx = adamod(schedule, convention=convention)
        start = tx.init(jnp.float32(0)), jnp.float32(0)
        return jax.lax.fori_loop(0, 3001, body, start)[1]

    last = jax.jit(jax.vmap(last_update))(lengths, slopes, last_rates)
    assert np.all(np.abs(last) <= 1.001 * np.abs(last_rates))
    assert np.all(np.sign(last) == -np.sign(last_rates))


@pytest.mark.parametrize(
    ("how", "factory", "convention"),
    [
        ("number", adamodw, "torch"),
        ("schedule", adamod, "torch"),
        ("injected", adamodw, "torch"),
        ("traced", adamod, "paper"),
    ],
)
def test_a_negative_learning_rate_ascends_and_is_bounded_alike(
    factory, how, convention
):
    """Constant: the same steps the other way."""
    gradients = jnp.asarray([[1.0, -2.0], [0.5, 3.0], [1e-3, -1.0], [2.0, 0.1]])

    def run(learning_rate):
        make = factory
        if how == "injected":
            make = optax.inject_hyperparams(factory, static_args=("b3", "convention"))
        if how == "schedule":
            learning_rate = optax.constant_schedule(learning_rate)
        return steps(make(learning_rate, b3=0.9, convention=convention), gradients)

    if how == "traced":
        run = jax.jit(run)
    (up, state), (down, _) = run(-0.1), run(0.1)
    if factory is adamodw:  # whose decay turns with the learning rate too
        assert np.all(up != 0)
    chex.assert_trees_all_close(up, -down, rtol=1e-6)
    adam, _ = steps(adamod(-0.1, b3=0.0, convention=convention), gradients)
    assert np.all(np.abs(up[0]) < 0.2 * np.abs(adam[0]))
    rates = learning_rates(state, -0.1, convention=convention)
    assert np.all(rates.bounded < 0)
    assert np.all(np.abs(rates.bounded) <= np.abs(rates.adaptive))


@CONVENTIONS
@pytest.mark.parametrize("first", [0.1, -0.1])
def test_a_change_of_sign_turns_the_step_at_once(first, convention):
    """To a magnitude that neither Adam's rate nor the bound's memory exceeds."""
    schedule = optax.join_schedules([lambda _: first, lambda _: -1e-6 * first], [20])
    tx = adamod(schedule, b3=0.9, convention=convention)
    updates, _ = steps(tx, jnp.ones((40, 3)))
    assert np.all(np.sign(updates[:20]) == -np.sign(first))
    assert np.all(np.sign(updates[20:]) == np.sign(first))
    assert np.all(np.abs(updates[20:]) <= 1.001e-7)


@pytest.mark.parametrize(
    ("dtype", "b", "convention"),
    [
        ("float32", 0.9, "paper"),
        ("float32", 0.9, "torch"),
        ("float32", 0.0, "torch"),
        ("bfloat16", 0.9, "paper"),
        ("bfloat16", 0.3, "torch"),
        ("complex64", 0.9, "torch"),
        ("complex64", 0.0, "paper"),
    ],
)
def test_the_largest_gradients_make_nothing_nan(dtype, b, convention):
    """Differences and Nesterov's sums of them are larger than any float."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (30, 64))
    if dtype == "complex64":
        signs = signs + 1j * rng.choice([-1.0, 1.0], (30, 64))
    for nesterov in (False, True) if convention == "paper" else (False,):
        run = steps_of(
            scale_by_adamod(b, 0.9, b, nesterov=nesterov, convention=convention)
        )
        for size in (3e38, float(jnp.finfo(dtype).max)):
            updates, state = run(jnp.asarray(size * signs, dtype))
            assert np.all(updates == 0)  # as with Adam, for their squares are infinite
            chex.assert_tree_all_finite((state.mu, state.bound))


@pytest.mark.parametrize("size", [7e5, 3e38])
def test_gradients_that_float16_does_not_hold(size):
    """``mu`` keeps the largest number that it can, and training goes on."""
    gradients = jnp.asarray([[-size], *[[1.0]] * 200])
    updates, state = steps(scale_by_adamod(mu_dtype="float16"), gradients)
    chex.assert_tree_all_finite((updates, state.mu))
    assert state.mu[0] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("learning_rate", [0.1, -0.1])
def test_rates_that_are_infinite_for_a_step(learning_rate):
    """Without eps, where a coordinate had no gradient: it goes on either way."""
    tx = optax.chain(adamod(learning_rate, b3=0.9, eps=0.0), optax.zero_nans())
    updates, _ = steps(tx, jnp.asarray([[0.0], *[[1.0]] * 9]))
    assert np.all(updates[0] == 0)
    assert np.all(updates[1:] * np.sign(learning_rate) < -0.05)


@CONVENTIONS
def test_the_rate_holds_as_far_as_the_square(convention):
    """1.8e19 is the root of the largest float32."""
    gradients = jnp.full((300, 4), 1.8e19)
    tx = scale_by_adamod(b3=0.9, convention=convention)
    updates, _ = steps(tx, gradients)
    chex.assert_trees_all_close(updates[-1], jnp.ones(4), rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "averages", "convention"),
    [
        ("float32", "bfloat16", "paper"),
        ("bfloat16", None, "torch"),
        ("bfloat16", "bfloat16", "paper"),
        ("float16", "bfloat16", "torch"),
        ("complex64", None, "paper"),
        ("complex64", "bfloat16", "torch"),
    ],
)
def test_strict_promotion_of_dtypes(dtype, averages, convention):
    params = {"w": jnp.full((2, 3), 0.5, dtype), "b": jnp.ones(2)}
    schedule = optax.linear_schedule(0.1, 0.0, 10)

    def train():
        tx = adamodw(
            schedule,
            mu_dtype=averages,
            nu_dtype=averages,
            bound_dtype=averages,
            convention=convention,
        )
        state = tx.init(params)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(params, state, params)
        rates = learning_rates(state, schedule, convention=convention)
        log10_histogram(rates.bounded, [-3, 0, 3])
        return updates, state, rates, held_by_bound(rates)

    with jax.numpy_dtype_promotion("strict"):
        strict = train()
    chex.assert_trees_all_equal(strict, train())
