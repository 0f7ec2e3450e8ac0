"""Does PPO learn under vmap, over seeds and traced learning rates?"""

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
CONTEXTS, ACTIONS, BATCH, EPOCHS = 4, 5, 64, 4
SEEDS = jax.random.split(jax.random.key(0), 3)
RATES = jnp.array([0.03, 0.1])


def surrogate(logits, batch):
    """The clipped objective of PPO, with an entropy bonus."""
    context, action, advantage, old = batch
    log_probabilities = jax.nn.log_softmax(logits)[context]
    new = jnp.take_along_axis(log_probabilities, action[:, None], 1)[:, 0]
    ratio = jnp.exp(new - old)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=1)
    gain = jnp.minimum(ratio * advantage, clipped * advantage)
    return -jnp.mean(gain + 0.01 * entropy)


def train(make, key, learning_rate, iterations, carry=None):
    """Learns which of the actions is rewarded in each context."""
    tx = make(learning_rate)
    if carry is None:
        params = {"logits": jnp.zeros((CONTEXTS, ACTIONS))}
        carry = params, tx.init(params)

    def epoch(carry, batch):
        params, state = carry
        gradients = jax.grad(lambda p: surrogate(p["logits"], batch))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def iteration(carry, key):
        logits = carry[0]["logits"]
        of_context, of_action = jax.random.split(key)
        context = jax.random.randint(of_context, (BATCH,), 0, CONTEXTS)
        action = jax.random.categorical(of_action, logits[context])
        reward = (action == context).astype(jnp.float32)
        old = jax.nn.log_softmax(logits)[context, action]
        batch = context, action, reward - reward.mean(), old
        carry = jax.lax.fori_loop(0, EPOCHS, lambda _, c: epoch(c, batch), carry)
        return carry, reward.mean()

    return jax.lax.scan(iteration, carry, jax.random.split(key, iterations))


def train_all(make, iterations, carry=None):
    """Returns the last states and the rewards, by learning rates and seeds."""

    def one(key, learning_rate, carry):
        return train(make, key, learning_rate, iterations, carry)

    axis = None if carry is None else 0
    over_seeds = jax.vmap(one, (0, None, axis))
    return jax.jit(jax.vmap(over_seeds, (None, 0, axis)))(SEEDS, RATES, carry)


def test_every_seed_learns_at_every_rate():
    traces = []

    def make(learning_rate):
        tx, counts = counted(adamod(learning_rate, b3=0.9))
        traces.append(counts)
        return tx

    (_, state), rewards = train_all(make, 150)
    assert rewards.shape == (2, 3, 150)
    assert np.all(np.mean(rewards[:, :, :5], axis=2) < 0.45)
    assert np.all(np.mean(rewards[:, :, -20:], axis=2) > 0.9)
    assert [sum(counts) for counts in traces] == [1]
    assert np.all(optax.tree.get(state, "count") == 150 * EPOCHS)
    rates = jax.vmap(jax.vmap(learning_rates, (0, None)))(state, RATES)
    assert rates.bounded["logits"].shape == (2, 3, CONTEXTS, ACTIONS)


def test_without_a_bound_it_is_adam():
    ours, adams = (
        train_all(make, 5)[0][0]
        for make in (lambda rate: adamod(rate, b3=0), optax.adam)
    )
    chex.assert_trees_all_close(ours, adams, rtol=1e-3, atol=1e-5)


def test_runs_go_on_from_their_serialized_states():
    def make(learning_rate):
        return adamod(learning_rate, b3=0.9)

    carry, _ = train_all(make, 3)
    like = jax.tree.map(jnp.zeros_like, carry)
    kept = flax.serialization.to_bytes(carry)
    restored = flax.serialization.from_bytes(like, kept)
    chex.assert_trees_all_equal(train_all(make, 3, restored), train_all(make, 3, carry))
