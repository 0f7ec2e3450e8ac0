"""Do JAX's own transformations, jit, vmap, grad and donation, work on an update?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod, adamodw, scale_by_adamod

TARGET = jnp.asarray([1.0, -2.0, 3.0])


def loss(params):
    return jnp.sum((params - TARGET) ** 2)


def after_four_steps(learning_rate, b3, convention="paper"):
    tx = adamod(learning_rate, b3=b3, eps_root=1e-8, convention=convention)
    params = jnp.zeros(3)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return loss(params)


def test_one_trace_whatever_the_values():
    tx = scale_by_adamod(bound_learning_rate=optax.cosine_decay_schedule(0.1, 10))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    params, state = TARGET, tx.init(TARGET)
    for step in range(5):
        updates, state = update(step * params, state, params)
        params = optax.apply_updates(params, updates)
    assert state.count == 5


@pytest.mark.parametrize("convention", ["paper", "torch"])
def test_vmap_over_an_ensemble(convention):
    tx = adamod(0.1, b3=0.9, convention=convention)
    params = jnp.stack([TARGET, -TARGET, 0.1 * TARGET, jnp.zeros(3)])
    gradients = jnp.cos(params)
    state = jax.vmap(tx.init)(params)
    updates, state = jax.vmap(tx.update)(gradients, state)
    chex.assert_shape(optax.tree.get(state, "count"), (4,))
    for i in range(4):
        expected, expected_state = tx.update(gradients[i], tx.init(params[i]))
        chex.assert_trees_all_close(updates[i], expected, rtol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], state), expected_state, rtol=1e-6
        )


@pytest.mark.parametrize("convention", ["paper", "torch"])
@pytest.mark.parametrize("argument", [0, 1], ids=["learning_rate", "b3"])
def test_gradient_of_training(argument, convention, x64):
    """Against central differences, in 64 bits."""
    at = [0.1, 0.7]

    def f(x):
        return after_four_steps(*at[:argument], x, *at[argument + 1 :], convention)

    h = 1e-6
    numeric = (f(at[argument] + h) - f(at[argument] - h)) / (2 * h)
    analytic = jax.jit(jax.grad(f))(at[argument])
    assert abs(analytic) > 1e-2
    chex.assert_trees_all_close(analytic, numeric, rtol=1e-6)


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
        chex.assert_trees_all_close(
            two_steps(*numbers), tx.update(gradients, state), rtol=2e-6
        )


def test_donated_buffers_are_reused():
    tx = adamodw(0.1)
    params = {"w": jnp.ones((256, 256)), "b": jnp.ones(256)}

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()
    )
    donated = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == donated
    assert memory.temp_size_in_bytes < params["b"].nbytes
    new_params, _ = compiled(params, state, gradients)
    assert params["w"].is_deleted()
    chex.assert_tree_all_finite(new_params)
