"""PPO in plain JAX on gymnax's environments, as tasks of the comparison.

They need the extra ``reinforcement``.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.common.comparison import Compared
from experiments.common.contestants import Schedule
from experiments.common.together import row_of
from experiments.common.training import History, Run, Task, assemble, initial_state
from experiments.tasks.steady import B2_OTHERS, WIDER, Size

COPIES = 10  # of the environment
ROLLOUT = 128  # steps of each copy, from one iteration to the next
EPOCHS, MINIBATCHES = 4, 5
ITERATION = EPOCHS * MINIBATCHES  # steps of the optimizer
DISCOUNT, DECAY = 0.99, 0.95  # of rewards, and of the estimate of advantages
CLIP, ENTROPY, VALUE = 0.2, 0.01, 0.5
HIDDEN = 32
SEEDS = 10


class Network(nnx.Module):
    """Returns the logits of actions, and the value of what is observed."""

    def __init__(self, inputs: int, actions: int, *, rngs: nnx.Rngs):
        self.policy = mlp(inputs, actions, rngs)
        self.value = mlp(inputs, 1, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.policy(x), self.value(x)[..., 0]


def mlp(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
    return nnx.Sequential(
        nnx.Linear(inputs, HIDDEN, rngs=rngs), jnp.tanh,
        nnx.Linear(HIDDEN, HIDDEN, rngs=rngs), jnp.tanh,
        nnx.Linear(HIDDEN, outputs, rngs=rngs),
    )  # fmt: skip


class Taken(NamedTuple):
    """Steps that were taken, and what is learned from them."""

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array  # of the action, then
    advantage: jax.Array
    target: jax.Array  # of the value


def loss(model: nnx.Module, batch: Any) -> jax.Array:
    """Returns the clipped objective, with the value's error and less the entropy."""
    assert isinstance(model, Network)
    logits, value = model(batch.observation)
    all_log = jax.nn.log_softmax(logits)
    log = jnp.take_along_axis(all_log, batch.action[..., None], -1)[..., 0]
    ratio = jnp.exp(log - batch.log_probability)
    advantage = batch.advantage - batch.advantage.mean()
    advantage /= batch.advantage.std() + 1e-8
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = jnp.minimum(ratio * advantage, clipped * advantage).mean()
    entropy = -(jnp.exp(all_log) * all_log).sum(-1).mean()
    return VALUE * jnp.square(value - batch.target).mean() - gain - ENTROPY * entropy


class Play(NamedTuple):
    """Where the copies of the environment are."""

    state: Any
    observation: jax.Array
    reward: jax.Array  # of the episode, so far


def play(
    environment: Any, model: Any, start: Play, key: jax.Array
) -> tuple[Play, Taken, jax.Array, jax.Array]:
    """Plays on; returns where it ends, what was learned, rewards and ends of episodes.

    The rewards are those of whole episodes, where they end.
    """

    def step(now: Play, key: jax.Array) -> tuple[Play, tuple[jax.Array, ...]]:
        of_action, of_step = jax.random.split(key)
        logits, value = model(now.observation)
        action = jax.random.categorical(of_action, logits)
        log = jax.nn.log_softmax(logits)
        log = jnp.take_along_axis(log, action[:, None], 1)[:, 0]
        keys = jax.random.split(of_step, COPIES)
        seen, state, reward, terminated, truncated, info = jax.vmap(environment.step)(
            keys, now.state, action
        )
        done = terminated | truncated
        # An episode that was cut off would have gone on, and has a value.
        follows = jnp.where(terminated, 0, model(info["final_observation"])[1])
        surprise = reward + DISCOUNT * follows - value
        total = now.reward + reward
        then = Play(state, seen, jnp.where(done, 0, total))
        return then, (now.observation, action, log, value, surprise, done, total)

    end, found = jax.lax.scan(step, start, jax.random.split(key, ROLLOUT))
    observation, action, log, value, surprise, done, total = found

    def back(later: jax.Array, x: tuple[jax.Array, jax.Array]) -> Any:
        advantage = x[0] + DISCOUNT * DECAY * jnp.where(x[1], 0, later)
        return advantage, advantage

    nothing = jnp.zeros(COPIES)
    _, advantage = jax.lax.scan(back, nothing, (surprise, done), reverse=True)
    taken = Taken(observation, action, log, advantage, value + advantage)
    return end, taken, total, done


class Going(NamedTuple):
    """What an iteration changes."""

    params: Any
    opt_state: Any
    play: Play
    key: jax.Array


@functools.cache
def compiled_iteration(
    task: Task, environment: Any, update: optax.TransformUpdateFn
) -> Callable[[Going], tuple[Going, tuple[jax.Array, jax.Array]]]:
    """Returns the iteration of many runs: the losses, and the mean of episodes.

    The mean is NaN if no episode ended.
    """

    def minibatch(carry: tuple[Any, Any], batch: Any) -> Any:
        params, opt_state = carry
        value, gradients = jax.value_and_grad(
            lambda params: task.loss(assemble(task, params, {}), batch)
        )(params)
        updates, opt_state = update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def iteration(now: Going) -> tuple[Going, tuple[jax.Array, jax.Array]]:
        key, of_play, of_order = jax.random.split(now.key, 3)
        model = assemble(task, now.params, {})
        end, taken, total, done = play(environment, model, now.play, of_play)
        steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), taken)
        orders = [
            jax.random.permutation(x, ROLLOUT * COPIES).reshape(MINIBATCHES, -1)
            for x in jax.random.split(of_order, EPOCHS)
        ]
        batches = jax.tree.map(lambda x: x[jnp.concatenate(orders)], steps)
        (params, opt_state), losses = jax.lax.scan(
            minibatch, (now.params, now.opt_state), batches
        )
        mean = jnp.sum(total * done) / jnp.sum(done)
        return Going(params, opt_state, end, key), (losses, mean)

    return jax.jit(jax.vmap(iteration), donate_argnums=0)


def train(
    environment: Any,
    metric: str,
    sign: int,
    task: Task,
    runs: Sequence[Run],
    progress: tqdm,
) -> History:
    """Trains runs of one seed, as ``go_on_together`` does."""
    (update,) = {run.transformation.update for run in runs}
    starts = []
    for run in runs:
        params, _, opt_state = initial_state(task, run)
        key, of_start = jax.random.split(jax.random.key(run.seed))
        keys = jax.random.split(of_start, COPIES)
        observation, state = jax.vmap(environment.reset)(keys)
        there = Play(state, observation, jnp.zeros(COPIES))
        starts.append(Going(params, opt_state, there, key))
    now = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    iteration = compiled_iteration(task, environment, update)
    history: History = {run: [] for run in runs}
    start = time.perf_counter()
    for step in range(ITERATION, task.steps + 1, ITERATION):
        now, (losses, means) = iteration(now)
        losses, means = jax.device_get((losses, means))
        progress.update(len(runs) * ITERATION)
        seconds = (time.perf_counter() - start) / len(runs)
        for index, (run, rows) in enumerate(history.items()):
            if rows and math.isnan(rows[-1]["loss"]):
                continue
            row = row_of(step, np.asarray(losses[index]), seconds)
            if math.isfinite(means[index]) and math.isfinite(row["loss"]):
                row[metric] = sign * float(means[index])
            history[run].append(row)
    return history


def played(size: Size, name: str, metric: str, sign: int) -> Compared:
    """Returns PPO on an environment; all after the first quarter counts."""
    try:
        import gymnax
    except ImportError as error:
        raise ValueError(
            f"{name} is gymnax's, which pip install -e '.[reinforcement]' installs."
        ) from error
    environment, params = gymnax.make(name)
    (inputs,) = environment.observation_space(params).shape
    steps = max(4, size.steps // ITERATION) * ITERATION
    task = Task(
        create_model=lambda rngs: Network(inputs, environment.num_actions, rngs=rngs),
        loss=loss,
        batches=lambda seed: (),  # noqa: ARG005, it plays instead
        steps=steps,
        row_every=ITERATION,
    )
    return Compared(
        task, Schedule(B2_OTHERS), ((steps // 4, steps),), metric,
        higher_is_better=sign > 0, rates=WIDER, seeds=SEEDS,
        train=functools.partial(train, environment, metric, sign),
    )  # fmt: skip


TASKS: dict[str, Callable[[Size], Compared]] = {
    "cart_pole": lambda size: played(size, "CartPole-v1", "mean reward", 1),
    # Rewards are -1 until it swings up.
    "acrobot": lambda size: played(size, "Acrobot-v1", "mean steps", -1),
}
