"""Does Optimistix, which turns closures into pytrees, find a minimum?"""

import io

import chex
import equinox as eqx
import jax.numpy as jnp
import optax
import optimistix as optx
import pytest

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
START = {"x": jnp.asarray(-0.5), "y": jnp.asarray(0.5)}


def rosenbrock(point, args):
    del args
    return (1 - point["x"]) ** 2 + 100 * (point["y"] - point["x"] ** 2) ** 2


def minimise(tx, tolerance, steps, start=START):
    solver = optx.OptaxMinimiser(tx, rtol=tolerance, atol=tolerance)
    return optx.minimise(rosenbrock, solver, start, max_steps=steps, throw=False)


def test_the_minimum_of_rosenbrocks_function():
    tx, traces = counted(adamod(optax.cosine_decay_schedule(0.1, 5000), b3=0.9))
    solution = minimise(tx, 0.0, 5000)
    chex.assert_trees_all_close(solution.value, {"x": 1.0, "y": 1.0}, rtol=1e-2)
    plain, expected = counted(optax.adam(0.05))
    minimise(plain, 0.0, 5000)
    assert len(traces) == len(expected)
    rates = learning_rates(solution.state.opt_state, 0.1)
    assert rates.bounded.keys() == START.keys()


def test_without_a_bound_it_is_adam():
    chex.assert_trees_all_close(
        minimise(adamod(0.05, b3=0), 0.0, 50).value,
        minimise(optax.adam(0.05), 0.0, 50).value,
        rtol=1e-4,
    )


def test_the_state_is_serialised():
    state = minimise(adamod(0.05, b3=0.9), 0.0, 20).state
    like = minimise(adamod(0.05, b3=0.9), 0.0, 1).state
    kept = io.BytesIO()
    eqx.tree_serialise_leaves(kept, state)
    kept.seek(0)
    chex.assert_trees_all_equal(eqx.tree_deserialise_leaves(kept, like), state)


def test_tolerances_of_adam_stop_it_at_once():
    """Its first step is 1 - b3 of Adam's, and so must the tolerances be."""
    start = {"x": jnp.asarray(-1.2), "y": jnp.asarray(1.0)}  # where the loss is 24.2

    def loss_and_steps(tx, tolerance):
        solution = minimise(tx, tolerance, 20_000, start)
        return rosenbrock(solution.value, None), solution.stats["num_steps"]

    loss, steps = loss_and_steps(optax.adam(1e-2), 1e-3)
    assert steps > 10
    assert loss < 5
    linear = optax.linear_schedule(1e-5, 1e-2, 1000)
    for warmed in (adamod(1e-2), optax.adam(linear)):
        loss, steps = loss_and_steps(warmed, 1e-3)
        assert steps == 2
        assert loss > 24
    loss, steps = loss_and_steps(adamod(1e-2), 1e-6)
    assert steps > 1000
    assert loss < 1e-6
