"""How programs are timed: in samples that are long enough, each warmed up."""

import math
import statistics
import time
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import trees
from benchmarks.optimizers import DONATED, step

SAMPLE_SECONDS = 5e-3  # a sample is of as many steps as take about this long


class Timed(Protocol):
    """Something that runs many times."""

    def run(self, times: int) -> None:
        """Returns when all is computed."""


class Update:
    """Updates of parameters by an Optax optimizer."""

    def __init__(self, tx: optax.GradientTransformation, tree: trees.Tree):
        self.gradients = {
            name: jnp.asarray(value) for name, value in gradients(tree).items()
        }
        self.params = jax.tree.map(jnp.zeros_like, self.gradients)
        self.opt_state = jax.jit(tx.init)(self.params)
        self.step = jax.jit(step(tx), donate_argnums=DONATED)

    def run(self, times: int) -> None:
        params, opt_state = self.params, self.opt_state
        for _ in range(times):
            params, opt_state = self.step(params, opt_state, self.gradients)
        self.params, self.opt_state = jax.block_until_ready((params, opt_state))


class Copy:
    """Reads and writes as many floats as there are parameters.

    With the sign flipped and in place: compilers drop a plain copy.
    """

    def __init__(self, tree: trees.Tree):
        self.x = jnp.zeros(trees.size(tree))
        self.negate = jax.jit(jnp.negative, donate_argnums=0)

    def run(self, times: int) -> None:
        for _ in range(times):
            self.x = self.negate(self.x)
        self.x.block_until_ready()


def gradients(tree: trees.Tree) -> dict[str, np.ndarray]:
    """Returns normally distributed values for each leaf."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(leaf.shape, dtype=np.float32).astype(leaf.dtype)
        for name, leaf in tree.items()
    }


def seconds(timed: Timed, times: int) -> float:
    """Returns the time of one of the given number of runs."""
    start = time.perf_counter()
    timed.run(times)
    return (time.perf_counter() - start) / times


def calibrated(timed: Timed) -> int:
    """Warms up; returns how many runs make a sample."""
    timed.run(2)
    return max(1, math.ceil(SAMPLE_SECONDS / seconds(timed, 2)))


def quartiles(values: list[float]) -> str:
    lower, _, upper = statistics.quantiles(values, n=4)
    return f"{lower:.2f} to {upper:.2f}"
