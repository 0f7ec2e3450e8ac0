"""Does PPO learn from the episodes that it plays as its equations say?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.tasks import ppo
from experiments.tasks.ppo import COPIES, DECAY, DISCOUNT, ROLLOUT, Network, Play, Taken

LENGTH = 9  # steps of an episode


class Counting:
    """Episodes that end after nine steps, every other one by the clock."""

    def step(self, key, state, action):
        del key
        number, time = state
        time = time + 1
        done = time == LENGTH
        cut_off = done & (number % 2 == 1)
        seen = jnp.stack([time, number]).astype(jnp.float32)
        again = jnp.stack([0, number + 1]).astype(jnp.float32)
        state = jnp.where(done, number + 1, number), jnp.where(done, 0, time)
        reward = time.astype(jnp.float32) + action
        info = {"final_observation": seen}
        return (
            jnp.where(done, again, seen),
            state,
            reward,
            done & ~cut_off,
            cut_off,
            info,
        )


@pytest.fixture(scope="module")
def played():
    model = Network(2, 2, rngs=nnx.Rngs(0))
    nothing = jnp.zeros(COPIES, jnp.int32)
    start = Play((nothing, nothing), jnp.zeros((COPIES, 2)), jnp.zeros(COPIES))
    key = jax.random.key(1)
    return model, jax.jit(lambda: ppo.play(Counting(), model, start, key))()


def test_advantages_are_the_sum_of_later_surprises(played):
    model, (_, taken, _, _) = played
    value = np.asarray(model(taken.observation)[1])
    reward = np.asarray(taken.action) + np.arange(ROLLOUT)[:, None] % LENGTH + 1
    for start in range(0, ROLLOUT - LENGTH, LENGTH):
        number = start // LENGTH
        # The value of what would have been seen next, if the clock ended the episode.
        final = model(jnp.asarray([LENGTH, number], jnp.float32))[1]
        follows = [*value[start + 1 : start + LENGTH], (number % 2) * np.asarray(final)]
        steps = slice(start, start + LENGTH)
        surprise = [
            r + DISCOUNT * f - v
            for r, f, v in zip(reward[steps], follows, value[steps], strict=True)
        ]
        for t in range(LENGTH):
            expected = sum(
                (DISCOUNT * DECAY) ** later * x for later, x in enumerate(surprise[t:])
            )
            np.testing.assert_allclose(
                taken.advantage[start + t], expected, rtol=1e-4, atol=1e-4
            )
    np.testing.assert_allclose(taken.target, taken.advantage + value, rtol=1e-4)


def test_the_reward_is_that_of_whole_episodes(played):
    _, (_, taken, total, done) = played
    ends = np.arange(ROLLOUT) % LENGTH == LENGTH - 1
    np.testing.assert_array_equal(done, np.broadcast_to(ends[:, None], done.shape))
    for start in (0, LENGTH):
        end = start + LENGTH
        actions = np.asarray(taken.action)[start:end].sum(axis=0)
        np.testing.assert_allclose(total[end - 1], actions + LENGTH * (LENGTH + 1) / 2)


def batch_of(ratio, advantage):
    """Returns one batch of actions that became so many times as likely since."""
    model = Network(2, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((len(ratio), 2))
    log = jax.nn.log_softmax(model(x)[0])[:, 0]
    action = jnp.zeros(len(ratio), jnp.int32)
    return model, Taken(
        x, action, log - jnp.log(jnp.asarray(ratio)), jnp.asarray(advantage),
        model(x)[1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        ([1.0, 1.0], [1.0, -1.0], 0.0),
        ([2.0, 1.0], [1.0, -1.0], (1.2 - 1) / 2),  # a gain is clipped
        ([0.5, 1.0], [1.0, -1.0], (0.5 - 1) / 2),  # and a loss is not
        ([1.0, 2.0], [1.0, -1.0], (1 - 2) / 2),
        ([1.0, 0.5], [1.0, -1.0], (1 - 0.8) / 2),
    ],
)
def test_the_objective_is_clipped(ratio, advantage, expected):
    model, batch = batch_of(ratio, advantage)
    probabilities = jax.nn.softmax(model(batch.observation[0])[0])
    entropy = -jnp.sum(probabilities * jnp.log(probabilities))
    # The value is right, so its error is nothing.
    found = -ppo.loss(model, batch) - ppo.ENTROPY * entropy
    np.testing.assert_allclose(found, expected, atol=1e-5)
