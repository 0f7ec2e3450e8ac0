"""Do JAX's own transformations, jit, vmap, grad and donation, work on an update?"""

import functools

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
    scale_by_adamod,
)

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


@pytest.mark.parametrize(
    ("argument", "convention"),
    [(0, "paper"), (1, "torch")],
    ids=["learning_rate", "b3"],
)
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


@pytest.mark.parametrize("argument", ["learning_rate", "b1", "b2"])
def test_gradient_of_training_where_a_hyperparameter_is_zero(argument):
    """It exists, and is Adam's; with a bound, see test_limits.py."""

    def trained(make, x):
        tx = make(**{"learning_rate": 0.1, "eps_root": 1e-8, argument: x})
        params, state = jnp.zeros(3), tx.init(jnp.zeros(3))
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, updates)
        return loss(params)

    adam = jax.jit(jax.grad(functools.partial(trained, optax.adam)))(0.0)
    without_bound = functools.partial(adamod, b3=0.0)
    ours = jax.jit(jax.grad(functools.partial(trained, without_bound)))(0.0)
    assert abs(adam) > 1e-2
    chex.assert_trees_all_close(ours, adam, rtol=1e-4)


def test_update_of_a_closed_learning_rate_is_adams():
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.0})
    tx = scale_by_adamod(b3=0.9, bound_learning_rate=schedule)
    state = tx.init(TARGET)
    for share in (0.1, 0.19, 1.0, 1.0):  # of Adam's, which is the sign
        updates, state = tx.update(TARGET, state)
        chex.assert_trees_all_close(updates, share * jnp.sign(TARGET), rtol=1e-6)


@pytest.mark.parametrize("dtypes", [{}, {"nu_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("convention", ["paper", "torch"])
@pytest.mark.parametrize("b3", [0.0, 0.9])
def test_square_that_overflows_stops_its_coordinate_alone(b3, convention, dtypes):
    """As with ``optax.adam``, and no update is NaN."""
    tx, adam = adamod(0.1, b3=b3, convention=convention, **dtypes), optax.adam(0.1)
    state, adams = tx.init(TARGET), adam.init(TARGET)
    plain = tx.init(TARGET)
    for step in range(10):
        g = TARGET.at[0].set(3e19) if step == 3 else TARGET
        updates, state = tx.update(g, state)
        expected, plain = tx.update(TARGET, plain)
        chex.assert_trees_all_equal(updates[1:], expected[1:])
        theirs, adams = adam.update(g, adams)
        assert (theirs[0] == 0) == (updates[0] == 0) == (step >= 3)
    chex.assert_tree_all_finite((updates, optax.tree.get(state, "bound")))


def test_without_jit():
    with jax.disable_jit():
        tx = adamod(0.1, b3=0.5)
        updates, state = tx.update(2.0, tx.init(1.0))
        assert updates == pytest.approx(-0.05)
        held = held_by_bound(learning_rates(state, 0.1, eps=1e-8))
        assert held == (1.0, 2.0)


def test_no_infinity_on_the_way():
    """Under JAX's own checks, of what is computed outside jit too."""
    with jax.debug_infs(True), jax.debug_nans(True):
        for b1, b2, b3 in ((0.0, 0.0, 0.0), (0.9, 0.999, 0.999)):
            tx = adamod(0.1, b1=b1, b2=b2, b3=b3)
            updates, _ = tx.update(TARGET, tx.init(TARGET))
            assert np.all(updates * TARGET < 0)


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
