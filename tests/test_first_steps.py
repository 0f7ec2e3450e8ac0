"""Where do AdaMod's small first steps surprise, and does each way out work?

The page docs/limits.md has these figures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from optax_adamod import adamod


def run(step, carry, length):
    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=length))(carry)


def after_lookahead(fast, *, reset_state=True):
    """Loss after 3,000 steps on a quadratic, synchronised every 10."""
    solver = optax.lookahead(fast, 10, 0.5, reset_state=reset_state)
    params = optax.LookaheadParams.init_synced(jnp.array([-1.0, 1.0]))

    def loss_fn(x):
        return jnp.sum(jnp.array([1.0, 10.0]) * x**2)

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(loss_fn)(params.fast)
        updates, state = solver.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = run(step, (params, solver.init(params)), 3000)
    return loss_fn(params.slow)


def test_lookahead_that_resets_the_state_never_lets_the_bound_open():
    assert after_lookahead(optax.adam(1e-2)) < 1e-6
    assert after_lookahead(adamod(1e-2)) > 5
    assert after_lookahead(adamod(1e-2), reset_state=False) < 1e-12
    assert after_lookahead(adamod(1e-2, b3=0)) < 1e-6


def farthest(adversary):
    """How far SAM's adversary goes under a constant gradient, in one period of 5."""
    solver = contrib.sam(
        optax.sgd(0.0), optax.chain(contrib.normalize(), adversary), sync_period=5
    )

    def step(carry, _):
        params, state = carry
        updates, state = solver.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.abs(params)

    start = jnp.zeros(()), solver.init(jnp.zeros(()))
    return run(step, start, 5)[1].max()


def test_sams_adversary_starts_anew_in_each_period():
    for adversary in (optax.adam(0.03), optax.sgd(0.03), adamod(0.03, b3=0)):
        np.testing.assert_allclose(farthest(adversary), 0.12, rtol=1e-3)
    # Of 4 steps, 0.03 * (0.001 + 0.002 + 0.003 + 0.004) in all.
    np.testing.assert_allclose(farthest(adamod(0.03)), 3e-4, rtol=0.01)


def after_inner_loops(inner):
    """Loss of what 200 outer steps learn as the start of inner loops, as in MAML.

    A task is the square of the distance from its centre; the best start is the mean of
    the centres, 2, and its loss after an inner loop depends on how far that goes.
    """

    def adapted(start, centre):
        def step(carry, _):
            x, state = carry
            updates, state = inner.update(2 * (x - centre), state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (start, inner.init(start)), length=5)
        return (x - centre) ** 2

    def loss_fn(start):
        return jnp.mean(jax.vmap(adapted, (None, 0))(start, jnp.array([1.0, 3.0])))

    outer = optax.adam(0.05)

    def step(carry, _):
        start, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(start)
        updates, state = outer.update(gradient, state)
        return (optax.apply_updates(start, updates), state), loss

    return run(step, (jnp.zeros(()), outer.init(jnp.zeros(()))), 201)[1][-1]


def test_inner_loops_start_anew():
    """Here 5 steps of 0.2 cross the whole distance of 1, and AdaMod's do not."""
    settings = dict(eps_root=1e-8)  # to differentiate through
    assert after_inner_loops(optax.adam(0.2, **settings)) < 0.05
    assert after_inner_loops(adamod(0.2, **settings)) > 0.95
    assert after_inner_loops(adamod(0.2, b3=0, **settings)) < 0.05


def on_plateaus(tx, steps=8000, **settings):
    """Losses and scales, over 10 seeds, of a noisy linear regression."""
    solver = optax.chain(
        tx, contrib.reduce_on_plateau(factor=0.5, accumulation_size=20, **settings)
    )

    def of_seed(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        inputs = jax.random.normal(keys[0], (200, 20))
        noise = 0.1 * jax.random.normal(keys[2], (200,))
        outputs = inputs @ jax.random.normal(keys[1], (20,)) + noise

        def loss_fn(params, batch):
            return jnp.mean((inputs[batch] @ params - outputs[batch]) ** 2)

        def step(carry, i):
            params, state = carry
            batch = jax.random.randint(jax.random.fold_in(keys[3], i), (16,), 0, 200)
            loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = solver.update(gradients, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.zeros(20), solver.init(jnp.zeros(20))
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return loss_fn(params, jnp.arange(200)), optax.tree.get(state, "scale")

    return jax.jit(jax.vmap(of_seed))(jnp.arange(10))


@pytest.mark.slow
def test_a_plateau_shorter_than_the_warm_up_ends_some_runs():
    """``patience=5`` is 100 steps, a tenth of the bound's horizon."""
    warmed_up = optax.adam(lambda count: 1e-2 * (1 - 0.999 ** (count + 1)))
    lost = []
    for tx in (optax.adam(1e-2), adamod(1e-2), warmed_up):
        losses, scales = on_plateaus(tx, patience=5)
        lost.append(int(np.sum(losses > 1)))
        # Where only noise is left no loss falls, and nothing limits the scale.
        assert np.all(scales < 1e-12)
    assert lost[0] == 0
    assert 0 < lost[1] == lost[2] < 5


@pytest.mark.slow
def test_patience_of_a_horizon_or_a_least_scale_saves_all_runs():
    for settings in (dict(patience=50), dict(patience=5, min_scale=0.1)):
        losses, _ = on_plateaus(adamod(1e-2), **settings)
        assert np.all(losses < 0.02)


def test_steps_are_optimizer_steps_under_multi_steps():
    """4 gradients make one step, so the bound takes 4 times as many batches to open."""
    gradient = jnp.ones(())

    def after(batches, b3, every=1):
        tx = optax.MultiSteps(adamod(0.1, b3=b3), every)

        def step(state, _):
            return tx.update(gradient, state, gradient)[1], None

        state, _ = run(step, tx.init(gradient), batches)
        return optax.tree.get(state, "bound")

    np.testing.assert_allclose(after(40, 0.9, 4), after(10, 0.9), rtol=1e-6)
    each = after(40, 0.9)
    assert after(40, 0.9, 4) < 0.7 * each
    # The way out: the same horizon in batches.
    np.testing.assert_allclose(after(40, 0.9**4, 4), each, rtol=1e-5)
