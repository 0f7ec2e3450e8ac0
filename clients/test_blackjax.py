"""Does BlackJAX's mean-field inference find a known distribution?"""

import blackjax
import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
MEAN, SCALE = jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])


def log_density(x):
    return -0.5 * jnp.sum(((x - MEAN) / SCALE) ** 2)


def infer(tx, steps, state=None):
    algorithm = blackjax.meanfield_vi(log_density, tx, num_samples=20)
    if state is None:
        state = algorithm.init(jnp.zeros(2))

    def step(state, key):
        state, info = algorithm.step(key, state)
        return state, (state.mu, info.elbo)

    return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), steps))


def test_a_known_posterior():
    tx, traces = counted(adamod(optax.cosine_decay_schedule(0.05, 800), b3=0.9))
    state, _ = infer(tx, 800)
    assert sum(traces) == 1
    np.testing.assert_allclose(state.mu, MEAN, atol=0.1)
    np.testing.assert_allclose(np.exp(state.rho), SCALE, rtol=0.1)
    mu, rho = learning_rates(state.opt_state, 0.05).bounded
    assert mu.shape == rho.shape == (2,)


def test_without_a_bound_it_is_adam():
    ours, adams = (infer(tx, 20)[1][0] for tx in (adamod(0.05, b3=0), optax.adam(0.05)))
    np.testing.assert_allclose(ours, adams, rtol=1e-3)


def test_a_run_goes_on_from_its_serialized_state():
    tx = adamod(0.05, b3=0.9)
    state, _ = infer(tx, 5)
    kept = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(infer(tx, 1)[0], kept)
    chex.assert_trees_all_equal(infer(tx, 5, restored), infer(tx, 5, state))
