"""Where do AdaMod's small first steps surprise, and does each way out work?

The page docs/limits.md has these figures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from optax_adamod import adamod, adamodw


def after_lookahead(fast, *, reset_state):
    """Loss after 3,000 steps on a quadratic, synchronised every 10."""
    solver = optax.lookahead(
        fast, sync_period=10, slow_step_size=0.5, reset_state=reset_state
    )
    params = optax.LookaheadParams.init_synced(jnp.array([-1.0, 1.0]))

    def loss_fn(x):
        return jnp.sum(jnp.array([1.0, 10.0]) * x**2)

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(loss_fn)(params.fast)
        updates, state = solver.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, solver.init(params)
    (params, _), _ = jax.lax.scan(step, start, None, length=3000)
    return loss_fn(params.slow)


def test_lookahead_that_resets_the_state_never_lets_the_bound_open():
    assert after_lookahead(optax.adam(1e-2), reset_state=True) < 1e-6
    assert after_lookahead(adamod(1e-2), reset_state=True) > 5
    assert after_lookahead(adamod(1e-2), reset_state=False) < 1e-12
    assert after_lookahead(adamod(1e-2, b3=0), reset_state=True) < 1e-6


def farthest(adversary):
    """How far SAM's adversary goes under a constant gradient, in one period of 5."""
    solver = contrib.sam(
        optax.sgd(0.0), optax.chain(contrib.normalize(), adversary), sync_period=5
    )
    params = start = jnp.zeros(())
    state, distances = solver.init(params), []
    for _ in range(5):
        updates, state = solver.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        distances.append(abs(params - start))
    return max(distances)


def test_sams_adversary_starts_anew_in_each_period():
    np.testing.assert_allclose(farthest(optax.adam(0.03)), 0.12, rtol=1e-3)
    # Of 4 steps, 0.03 * (0.001 + 0.002 + 0.003 + 0.004) in all.
    np.testing.assert_allclose(farthest(adamod(0.03)), 3e-4, rtol=0.01)
    for way_out in (optax.sgd(0.03), adamod(0.03, b3=0)):
        np.testing.assert_allclose(farthest(way_out), 0.12, rtol=1e-3)


def after_inner_loops(inner, steps=5):
    """Loss of what 200 outer steps learn as the start of inner loops, as in MAML.

    A task is the square of the distance from its centre; the best start is the mean of
    the centres, 2, and its loss after an inner loop depends on how far that goes.
    """
    centres = jnp.array([1.0, 3.0])

    def adapted(start, centre):
        state, x = inner.init(start), start
        for _ in range(steps):
            updates, state = inner.update(2 * (x - centre), state, x)
            x = optax.apply_updates(x, updates)
        return (x - centre) ** 2

    def loss_fn(start):
        return jnp.mean(jax.vmap(adapted, (None, 0))(start, centres))

    outer = optax.adam(0.05)
    start, state = jnp.zeros(()), outer.init(jnp.zeros(()))

    @jax.jit
    def step(start, state):
        updates, state = outer.update(jax.grad(loss_fn)(start), state)
        return optax.apply_updates(start, updates), state

    for _ in range(200):
        start, state = step(start, state)
    return loss_fn(start)


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

        params = jnp.zeros(20)
        start = params, solver.init(params)
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return loss_fn(params, jnp.arange(200)), optax.tree.get(state, "scale")

    return jax.jit(jax.vmap(of_seed))(jnp.arange(10))


@pytest.fixture(scope="module")
def impatient():
    """``patience=5`` is 100 steps, a tenth of the bound's horizon."""
    warmed_up = optax.adam(lambda count: 1e-2 * (1 - 0.999 ** (count + 1)))
    optimizers = {"Adam": optax.adam(1e-2), "AdaMod": adamod(1e-2), "warmed": warmed_up}
    return {name: on_plateaus(tx, patience=5) for name, tx in optimizers.items()}


@pytest.mark.slow
def test_the_scale_sinks_without_end_for_adam_too(impatient):
    """Where only noise is left no loss falls, and nothing limits the scale."""
    for _, scales in impatient.values():
        assert np.all(scales < 1e-12)


@pytest.mark.slow
def test_a_plateau_shorter_than_the_warm_up_ends_some_runs(impatient):
    """Those of Adam under the exponential warm-up, too."""
    lost = {name: int(np.sum(losses > 1)) for name, (losses, _) in impatient.items()}
    assert lost["Adam"] == 0
    assert 0 < lost["AdaMod"] == lost["warmed"] < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [dict(patience=50), dict(patience=5, min_scale=0.1)],
    ids=["patience", "min_scale"],
)
def test_patience_of_a_horizon_or_a_least_scale_saves_all_runs(settings):
    losses, _ = on_plateaus(adamod(1e-2), **settings)
    assert np.all(losses < 0.02)


def test_steps_are_optimizer_steps_under_multi_steps():
    """4 gradients make one step, so the bound takes 4 times as many batches to open."""
    gradient = jnp.ones(())

    def bound(tx, batches):
        def step(state, _):
            return tx.update(gradient, state, gradient)[1], None

        state, _ = jax.lax.scan(step, tx.init(gradient), None, length=batches)
        return optax.tree.get(state, "bound")

    every_fourth = optax.MultiSteps(adamod(0.1, b3=0.9), 4)
    np.testing.assert_allclose(
        bound(every_fourth, 40), bound(adamod(0.1, b3=0.9), 10), rtol=1e-6
    )
    assert bound(every_fourth, 40) < 0.7 * bound(adamod(0.1, b3=0.9), 40)
    # The way out: the same horizon in batches.
    shorter = optax.MultiSteps(adamod(0.1, b3=0.9**4), 4)
    np.testing.assert_allclose(
        bound(shorter, 40), bound(adamod(0.1, b3=0.9), 40), rtol=1e-5
    )


def test_adamodw_needs_the_parameters():
    tx, params = adamodw(0.1), jnp.ones(3)
    state = tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state)
    updates, _ = tx.update(params, state, params)
    assert np.all(updates < 0)
