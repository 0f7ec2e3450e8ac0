"""Does an evolution strategy of evosax find a minimum?"""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evosax.algorithms import Open_ES

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
TARGET = jnp.array([1.0, -2.0, 0.5, 3.0])


def evolve(tx, steps, state=None):
    strategy = Open_ES(
        population_size=64, solution=jnp.zeros(4), optimizer=tx,
        std_schedule=optax.constant_schedule(0.1),
    )  # fmt: skip
    params = strategy.default_params
    if state is None:
        state = strategy.init(jax.random.key(0), jnp.zeros(4), params)

    def generation(state, key):
        ask, tell = jax.random.split(key)
        population, state = strategy.ask(ask, state, params)
        fitness = jnp.sum((population - TARGET) ** 2, axis=1)
        state, _ = strategy.tell(tell, population, fitness, state, params)
        return state, state.mean

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(generation, jax.tree.map(jnp.asarray, state), keys)


def test_the_minimum_of_a_parabola():
    tx, traces = counted(adamod(optax.cosine_decay_schedule(0.1, 400), b3=0.9))
    state, _ = evolve(tx, 400)
    np.testing.assert_allclose(state.mean, TARGET, atol=0.05)
    plain, expected = counted(optax.adam(0.1))
    evolve(plain, 400)
    assert len(traces) == len(expected)
    assert learning_rates(state.opt_state, 0.1).bounded.shape == (4,)


def test_without_a_bound_it_is_adam():
    ours, adams = (evolve(tx, 10)[1] for tx in (adamod(0.1, b3=0), optax.adam(0.1)))
    np.testing.assert_allclose(ours, adams, rtol=1e-3)


def test_a_run_goes_on_from_its_serialized_state():
    tx = adamod(0.1, b3=0.9)
    state, _ = evolve(tx, 5)
    kept = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(evolve(tx, 1)[0], kept)
    chex.assert_trees_all_equal(evolve(tx, 5, restored), evolve(tx, 5, state))
