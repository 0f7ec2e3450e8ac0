"""Are the contestants the optimizers, warm-ups and bounds that their names say?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.contestants import (
    CONTESTANTS,
    Schedule,
    at_rate,
    create,
    forgetful,
    scale_by_plain_adamod,
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


def waking(steps=60, first=20):
    """Coordinates whose gradient is zero at first, now and then, always, and never."""
    gradients = np.random.default_rng(0).normal(size=(steps, 4)).astype(np.float32)
    gradients[:first, 0] = 0
    gradients[::3, 1] = 0
    gradients[:, 3] = 0
    return gradients


def oracle(gradients, *, rule, b1, b2, b3, eps=1e-8):
    """Algorithm 1 in float64, with or without the rule, per learning rate."""
    m = v = s = np.zeros(gradients.shape[1])
    updates = []
    for t, g in enumerate(gradients.astype(np.float64), 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        eta = 1 / (np.sqrt(v / (1 - b2**t)) + eps)
        s = b3 * s + (1 - b3) * (np.where(v > 0, eta, 0) if rule else eta)
        updates.append(np.minimum(eta, s) * m / (1 - b1**t))
    return np.stack(updates)


@pytest.mark.parametrize("name", ["library", "published", "rule"])
def test_adamod_is_algorithm_1_with_and_without_the_rule(name):
    gradients, settings = waking(), dict(b1=0.9, b2=B2, b3=0.99)
    tx = scale_by_plain_adamod(**settings, eps=1e-8, rule=name == "rule")
    if name == "library":
        tx = optax.chain(adamod(1.0, **settings), optax.scale(-1))
    state, updates = tx.init(jnp.zeros(4)), []
    update = jax.jit(tx.update)
    for g in gradients:
        found, state = update(jnp.asarray(g), state)
        updates.append(found)
    expected = oracle(gradients, rule=name == "rule", **settings)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-8)


def test_one_compiled_step_for_all_rates():
    creates = create(CONTESTANTS["AdaMod, b3 0.99"], Schedule(B2))
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
