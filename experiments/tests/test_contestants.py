"""Are the contestants the optimizers, warm-ups and bounds that their names say?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.contestants import (
    B3,
    CONTESTANTS,
    SLACKS,
    Schedule,
    at_rate,
    create,
    forgetful,
)
from experiments.other_bounds import (
    growing,
    lag_corrected,
    matched_b3,
    scale_by_bounded_adam,
    shared,
    slack,
    steps_to_open,
)
from optax_adamod import adamod

B2 = 0.98
PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
SHRINK = 0.995  # so that rates rise, and a bound binds


def gradients_of(step, scale=1.0):
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), PARAMS
    )


def updates_of(tx, steps=60, shrink=SHRINK):
    """Returns the updates of every step, the gradients shrinking."""
    state, found = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients_of(step, shrink**step), state, PARAMS)
        found.append(updates)
    return found


def contestant(name, rate=1e-3, schedule=None):
    return at_rate(create(CONTESTANTS[name], schedule or Schedule(B2)), rate)


def rate_of(step):
    return 1e-3 * (1 + jnp.sin(jnp.asarray(step, jnp.float32) / 5))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Adam", optax.adam(1e-3, b2=B2)),
        ("RAdam", optax.radam(1e-3, b2=B2)),
        ("AMSGrad", optax.amsgrad(1e-3, b2=B2)),
        ("AdaMod, b3 0.99", adamod(1e-3, b2=B2, b3=0.99)),
        ("AdaMod, b3 0.999", adamod(1e-3, b2=B2, b3=0.999)),
        (
            "Adam, linear warm-up over 50",
            optax.adam(optax.linear_schedule(1e-3 / 50, 1e-3, 49), b2=B2),
        ),
        (
            "Adam, linear warm-up over 2/(1-b2)",
            optax.adam(optax.linear_schedule(1e-3 / 100, 1e-3, 99), b2=B2),
        ),
        (
            "Adam, exponential warm-up, b2",
            optax.adam(lambda count: 1e-3 * (1 - 0.98 ** (count + 1)), b2=B2),
        ),
        (
            "Adam, exponential warm-up, b3 0.99",
            optax.adam(lambda count: 1e-3 * (1 - 0.99 ** (count + 1)), b2=B2),
        ),
    ],
)
def test_is_its_name(name, expected):
    chex.assert_trees_all_close(
        updates_of(contestant(name)), updates_of(expected), rtol=1e-4, atol=1e-9
    )


def test_all_differ():
    """Each two of them go apart, but for the warm-up at jumps where nothing jumps."""
    found = {
        name: np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(updates_of(contestant(name)))]
        )
        for name, x in CONTESTANTS.items()
        if not x.at_jumps
    }
    for name, updates in found.items():
        assert np.isfinite(updates).all(), name
        for other, others in found.items():
            if name != other:
                assert np.abs(updates - others).max() > 1e-6, (name, other)


def test_without_slack_is_adamod():
    """Under a learning rate that rises, falls and stops."""
    mine = optax.chain(
        scale_by_bounded_adam(slack(1, B3), B2, rate_of),
        optax.scale_by_learning_rate(rate_of),
    )
    expected = adamod(rate_of, b2=B2, b3=B3)
    chex.assert_trees_all_close(
        updates_of(mine), updates_of(expected), rtol=1e-4, atol=1e-9
    )


def test_a_rate_of_zero_is_a_step_of_zero():
    for bound in (slack(2, B3), shared(B3, rows=True), lag_corrected(B3)):
        tx = scale_by_bounded_adam(bound, B2, lambda count: 0.0)
        for updates in updates_of(tx, steps=3):
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


def opened(bound, steps, steady=3.0):
    """Returns the bound over steady rates, at every step."""
    eta, found = jnp.full((2, 3), steady), []
    state = bound.init(eta)
    for count in range(1, steps + 1):
        state, limit = bound.limit(state, eta, jnp.asarray(count))
        found.append(limit / steady)
    return np.asarray(found)[:, 0, 0]


@pytest.mark.parametrize("c", SLACKS)
def test_slack_opens_when_it_says(c):
    steps = steps_to_open(c, B3)
    found = opened(slack(c, B3), int(steps) + 2)
    assert found[int(steps) - 1] < 1 <= found[int(steps)]


@pytest.mark.parametrize("c", SLACKS)
def test_the_control_holds_back_as_much(c):
    held = np.maximum(0, 1 - opened(slack(c, B3), 300)).sum()
    control = (1 - opened(slack(1, matched_b3(c, B3)), 1000)).sum()
    # Sums over steps, of which the integrals are equal.
    assert control == pytest.approx(held, abs=0.6)
    assert matched_b3(c, B3) < B3


def test_a_lag_is_corrected():
    """Of rates that rise steadily, a double average has no lag in the end."""
    bound, plain = lag_corrected(0.9), slack(1, 0.9)
    state, other = bound.init(jnp.zeros(1)), plain.init(jnp.zeros(1))
    for count in range(1, 301):
        eta = jnp.full(1, float(count))
        state, limit = bound.limit(state, eta, jnp.asarray(count))
        other, lagging = plain.limit(other, eta, jnp.asarray(count))
    np.testing.assert_allclose(limit, eta, rtol=1e-4)
    np.testing.assert_allclose(lagging, eta - 9, rtol=1e-3)


def test_a_fall_is_not_corrected():
    bound = lag_corrected(0.9)
    state = bound.init(jnp.zeros(1))
    for count in range(1, 200):
        eta = jnp.full(1, 1.0 if count < 100 else 1e-3)
        state, limit = bound.limit(state, eta, jnp.asarray(count))
        assert limit[0] > 0


def test_a_horizon_grows():
    """What one step adds to the bound is less, the later it comes."""
    bound = growing(30, 1 / 8)
    for count, horizon in ((1, 30.125), (800, 130)):
        _, limit = bound.limit(jnp.zeros(1), jnp.ones(1), jnp.asarray(count))
        np.testing.assert_allclose(limit, 1 / horizon, rtol=1e-6)


@pytest.mark.parametrize("rows", [True, False])
def test_shared_bounds_keep_proportions(rows):
    bound = shared(B3, rows=rows)
    eta = jnp.asarray([[1.0, 2.0], [4.0, 8.0]])
    state = bound.init(eta)
    assert state.size == (2 if rows else 1)
    for count in range(1, 70):
        state, limit = bound.limit(state, eta, jnp.asarray(count))
    np.testing.assert_allclose(limit / eta, 1 - B3**69, rtol=1e-4)
    # The first row's rates are ten times as large: its bound holds back only them.
    jumped = eta * jnp.asarray([[10.0], [1.0]])
    _, limit = bound.limit(state, jumped, jnp.asarray(70))
    factors = np.asarray(limit / jumped)
    np.testing.assert_allclose(factors[:, 0], factors[:, 1], rtol=1e-6)
    if rows:
        assert factors[0, 0] < 0.2 < 0.5 < factors[1, 0]
    else:
        assert factors[0, 0] == factors[1, 0] < 0.5


def test_one_compiled_step_for_all_rates():
    creates = create(CONTESTANTS["AdaMod, slack 2"], Schedule(B2))
    first, second = at_rate(creates, 1e-3), at_rate(creates, 2e-3)
    assert first.update is second.update
    for a, b in zip(updates_of(first), updates_of(second), strict=True):
        chex.assert_trees_all_close(jax.tree.map(lambda x: 2 * x, a), b, rtol=1e-5)


def test_weight_decay_and_shape():
    schedule = Schedule(B2, lambda count: jnp.where(count < 5, 1.0, 0.1), None, 0.5)
    expected = optax.adamw(
        optax.piecewise_constant_schedule(1e-3, {5: 0.1}), b2=B2, weight_decay=0.5
    )
    chex.assert_trees_all_close(
        updates_of(contestant("Adam", schedule=schedule)), updates_of(expected),
        rtol=1e-4, atol=1e-9,
    )  # fmt: skip


def test_warm_up_at_every_jump():
    schedule = Schedule(B2, since_jump=lambda count: count % 30)
    adam = updates_of(contestant("Adam", schedule=schedule))
    warm = updates_of(
        contestant("Adam, linear warm-up at every jump", schedule=schedule)
    )
    factors = [float(a["b"][0] / b["b"][0]) for a, b in zip(warm, adam, strict=True)]
    expected = [(step % 30 + 1) / 100 for step in range(60)]
    np.testing.assert_allclose(factors, expected, rtol=1e-4)


def test_a_lost_state_begins_again():
    tx = optax.adam(1e-3)
    found = updates_of(forgetful(tx, 40))
    chex.assert_trees_all_equal(found[:40], updates_of(tx)[:40])
    state = tx.init(PARAMS)
    for step in range(40, 60):
        expected, state = tx.update(gradients_of(step, SHRINK**step), state, PARAMS)
        chex.assert_trees_all_close(found[step], expected, rtol=1e-4, atol=1e-9)
