"""Does a network in Haiku learn a function?"""

import pickle

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
X = np.linspace(-2.0, 2.0, 64, dtype=np.float32)[:, None]
Y = np.sin(3 * X)


def train(tx, steps, carry=None):
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([32, 32, 1], activation=jnp.tanh)(x))
    )
    if carry is None:
        params = network.init(jax.random.key(0), X)
        carry = params, tx.init(params)

    def loss(params):
        return jnp.mean((network.apply(params, X) - Y) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return value, (optax.apply_updates(params, updates), state)

    losses = []
    for _ in range(steps):
        value, carry = step(*carry)
        losses.append(float(value))
    return losses, carry


def test_it_learns_a_sine():
    tx, traces = counted(adamod(0.01, b3=0.9))
    losses, (params, state) = train(tx, 500)
    assert sum(traces) == 1
    assert losses[-1] < 2e-3 < 0.1 < losses[0]
    assert learning_rates(state, 0.01).bounded.keys() == params.keys()


def test_without_a_bound_it_is_adam():
    ours, adams = (train(tx, 20)[0] for tx in (adamod(0.01, b3=0), optax.adam(0.01)))
    np.testing.assert_allclose(ours, adams, rtol=1e-3)


def test_a_run_goes_on_from_its_pickle():
    tx = adamod(0.01, b3=0.9, mu_dtype="bfloat16")
    _, carry = train(tx, 5)
    restored = pickle.loads(pickle.dumps(jax.device_get(carry)))
    chex.assert_trees_all_equal(restored, carry)
    assert train(tx, 5, restored)[0] == train(tx, 5, carry)[0]
