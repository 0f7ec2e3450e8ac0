"""Do the habits of Optax and of JAX work?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import (
    adamod,
    adamodw,
    scale_by_adamod,
)

QUICK = pytest.mark.usefixtures("quick_compilation")
PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.full(3, 0.5, np.float32),
}
GRADIENTS = jax.tree.map(lambda p: np.cos(5 * p), PARAMS)


def follow(tx, steps=4, params=PARAMS, gradients=GRADIENTS):
    """Returns parameters and state after some steps with constant gradients."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("factory", [adamod, adamodw])
def test_arguments_of_update(factory):
    """Of wrappers there are more, and without a decay parameters are not needed."""
    tx = factory(0.1)
    state = tx.init(PARAMS)
    expected = tx.update(GRADIENTS, state, PARAMS)
    actual = tx.update(GRADIENTS, state, PARAMS, value=1.0, unheard_of=None)
    chex.assert_trees_all_equal(actual, expected)
    if factory is adamod:
        chex.assert_trees_all_equal(tx.update(GRADIENTS, state), expected)
        return
    with pytest.raises(ValueError, match="params"):
        tx.update(GRADIENTS, state)


@QUICK
def test_injected_hyperparameters():
    schedule = optax.linear_schedule(0.0, 0.1, 3)
    settings = dict(b1=0.9, b2=0.999, b3=0.9, eps=1e-8)
    inject = optax.inject_hyperparams(adamodw)
    injected, state = follow(inject(schedule, **settings, mu_dtype="bfloat16"))
    # What float32 arrays make of Python floats: 1 - 0.999 is off by 1.3e-5.
    inexact = {k: float(np.float32(v)) for k, v in settings.items()}
    plain, expected = follow(adamodw(schedule, **inexact, mu_dtype="bfloat16"))
    chex.assert_trees_all_close(injected, plain, rtol=1e-6)
    for name in ("mu", "nu", "bound"):
        mine, theirs = (optax.tree.get(s, name) for s in (state.inner_state, expected))
        chex.assert_trees_all_equal_dtypes(mine, theirs)
        chex.assert_trees_all_close(mine, theirs, rtol=2e-6)
    assert state.hyperparams["b3"] == np.float32(0.9)


@QUICK
@pytest.mark.parametrize("b3", [0, 0.999])
def test_static_b3_is_exact(b3):
    inject = optax.inject_hyperparams(adamod, static_args=("b1", "b2", "b3", "eps"))
    injected, state = follow(inject(0.1, b3=b3))
    plain, expected = follow(adamod(0.1, b3=b3))
    chex.assert_trees_all_close(injected, plain, rtol=1e-5)
    bound, exact = (optax.tree.get(s, "bound") for s in (state, expected))
    assert (bound is None) == (exact is None) == (b3 == 0)
    chex.assert_trees_all_close(bound, exact, rtol=1e-6)


@QUICK
def test_restarted_schedules_warm_up():
    """Inside the schedule, or by the one count that inject_hyperparams has."""

    def restarted(tx, edit=lambda state: state):
        _, state = follow(tx, steps=20)
        updates, _ = jax.jit(tx.update)(GRADIENTS, edit(state), PARAMS)
        return np.abs(updates["b"])

    once = optax.cosine_decay_schedule(0.1, 20)
    expected = restarted(adamod(optax.join_schedules([once, once], [20]), b3=0.9))
    assert np.all(expected < 0.04)
    tx = optax.inject_hyperparams(adamod, static_args="b3")(once, b3=0.9)
    first = tx.init(PARAMS).hyperparams_states
    actual = restarted(tx, lambda state: state._replace(hyperparams_states=first))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    # What the page warns of: the schedule's own count alone.
    start = optax.ScaleByScheduleState(jnp.int32(0))
    unwarmed = restarted(adamod(once, b3=0.9), lambda state: (state[0], start))
    np.testing.assert_allclose(unwarmed, 0.1, rtol=1e-3)


def test_leaves_that_are_left_out():
    params = {**PARAMS, "steps": np.int32(3)}
    gradients = {**GRADIENTS, "steps": np.int32(0)}
    rule = scale_by_adamod()
    tx = optax.masked(rule, {"w": True, "b": False, "steps": False})
    state = tx.init(params)
    assert isinstance(state.inner_state.mu["b"], optax.MaskedNode)
    updates, _ = tx.update(gradients, state, params)
    alone, _ = rule.update({"w": GRADIENTS["w"]}, rule.init({"w": PARAMS["w"]}))
    chex.assert_trees_all_equal(updates, gradients | alone)


@QUICK
def test_non_finite_gradients_propagate_as_in_adam():
    gradients = {**GRADIENTS, "b": np.asarray([1.0, np.nan, np.inf], np.float32)}
    for tx in (adamod(0.1), optax.adam(0.1)):
        after, _ = follow(tx, gradients=gradients)
        assert np.isnan(after["b"]).tolist() == [False, True, True]
        assert np.all(np.isfinite(after["w"]))


@QUICK
def test_state_is_found_and_mapped():
    tx = optax.chain(optax.clip(1.0), adamodw(0.1))
    state = follow(tx, steps=1)[1]
    assert optax.tree.get(state, "count") == 1
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "bound"), PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    for name in ("mu", "nu", "bound"):
        found = optax.tree.get(state, name)
        twice = optax.tree.get(doubled, name)
        chex.assert_trees_all_equal(twice, optax.tree.scale(2, found))
    assert optax.tree.get(doubled, "count") == 1


def test_no_infinity_on_the_way():
    """Under JAX's own checks, of what is computed outside jit too."""
    gradients = jnp.asarray([1.0, -2.0, 3.0])
    with jax.debug_infs(True), jax.debug_nans(True):
        for b1, b2, b3 in ((0.0, 0.0, 0.0), (0.9, 0.999, 0.999)):
            tx = adamod(0.1, b1=b1, b2=b2, b3=b3)
            updates, _ = tx.update(gradients, tx.init(gradients))
            assert np.all(updates * gradients < 0)


def test_traced_hyperparameters():
    """A traced b takes the form of the average that its value asks for."""
    gradients = jnp.asarray([1.0, -1e-3, 1e3])

    @jax.jit
    def two_steps(b1, b2, b3, eps, eps_root, alpha):
        tx = scale_by_adamod(b1, b2, b3, eps, eps_root, bound_learning_rate=alpha)
        _, state = tx.update(1e4 * gradients, tx.init(gradients))
        return tx.update(gradients, state)

    for decays in ((0.9, 0.999, 0.99), (0.1, 0.2, 0.3), (0.0, 0.0, 0.0)):
        numbers = [float(np.float32(x)) for x in (*decays, 1e-8, 1e-6, 0.1)]
        *settings, alpha = numbers
        tx = scale_by_adamod(*settings, bound_learning_rate=alpha)
        _, state = tx.update(1e4 * gradients, tx.init(gradients))
        expected, state = tx.update(gradients, state)
        update, traced_state = two_steps(*numbers)
        chex.assert_trees_all_close(update, expected, rtol=2e-6)
        if state.bound is None:  # b3 is the Python number 0
            traced_state = traced_state._replace(bound=None)
        chex.assert_trees_all_close(traced_state, state, rtol=2e-6)


def test_donated_buffers_are_reused():
    tx = adamodw(0.1)
    params = {"w": jnp.ones((256, 256)), "b": jnp.ones(256)}

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients)
    compiled = lowered.compile()
    donated = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == donated
    assert memory.temp_size_in_bytes < params["b"].nbytes
    new_params, _ = compiled(params, state, gradients)
    assert params["w"].is_deleted()
    chex.assert_tree_all_finite(new_params)
