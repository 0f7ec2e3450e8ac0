"""Made-up runs and their rows, shared by the tests."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.training import Run, Task


def run_of(name="Adam", rate=0.1, seed=0, b3=None, transformation=None):
    return Run(name, transformation or optax.identity(), rate, seed, b3)


def rows_of(*losses, every=10):
    return [
        {"step": every * (i + 1), "loss": x, "highest loss": x + 0.25, "seconds": i + 1}
        for i, x in enumerate(losses)
    ]


class Model(nnx.Module):
    """Has all kinds of state: parameters, statistics, and a generator."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.List([nnx.Linear(4, 1, rngs=rngs)])

    def __call__(self, x):
        return self.out[0](self.dropout(self.norm(self.hidden(x))))


class Batches:
    """Fails to give the batch of one step, once."""

    def __init__(self, seed, fails_at=None):
        self.seed, self.fails_at = seed, fails_at

    def __getitem__(self, step):
        if step == self.fails_at:
            raise KeyboardInterrupt
        return {"x": np.random.default_rng((self.seed, step)).normal(size=(8, 3))}


def squares(model, batch):
    return jnp.mean(jnp.square(model(batch["x"]) - 1))


def task_of(loss=squares, fails_at=None, **changes):
    return Task(
        **{
            "create_model": Model,
            "loss": loss,
            "batches": lambda seed: Batches(seed, fails_at),
            "steps": 10,
            "row_every": 2,
            "evaluate": lambda model: {"norm": float(jnp.sum(model.norm.mean[...]))},
        }
        | changes
    )


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
