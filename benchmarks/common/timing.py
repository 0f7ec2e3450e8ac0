"""How programs are timed: in samples that are long enough, each warmed up."""

import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from benchmarks.common import trees
from benchmarks.common.optimizers import DONATED, Updates

SAMPLE_SECONDS = 5e-3  # a sample is of as many steps as take about this long


class Timed(Protocol):
    """Something that runs many times."""

    def run(self, times: int) -> None:
        """Returns when all is computed."""


class Update:
    """Updates of parameters by an optimizer of JAX.

    Attributes:
      gradients: One for each leaf, of its dtype; those that are given are shared.
      compile_seconds: What lowering and compiling took, tracing included.
    """

    def __init__(self, optimizer: Updates, tree: trees.Tree, given: Any | None = None):
        values: Any = gradients(tree) if given is None else given
        self.gradients = {
            name: values[name].astype(leaf.dtype) for name, leaf in tree.items()
        }
        self.params = jax.tree.map(jnp.zeros_like, self.gradients)
        self.opt_state = jax.jit(optimizer.init)(self.params)
        jitted = jax.jit(optimizer.step, donate_argnums=DONATED)
        start = time.perf_counter()
        lowered = jitted.lower(self.params, self.opt_state, self.gradients)
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self, times: int) -> None:
        params, opt_state = self.params, self.opt_state
        for _ in range(times):
            params, opt_state = self.step(params, opt_state, self.gradients)
        self.params, self.opt_state = jax.block_until_ready((params, opt_state))

    def peak(self) -> int | None:
        """Returns the most bytes that the device has held, if it keeps count."""
        return device_peak()


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


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def gradients(tree: trees.Tree) -> dict[str, jax.Array]:
    """Returns normally distributed values for each leaf, made on the device."""
    return {
        name: _normal(seed, leaf.shape, leaf.dtype)
        for seed, (name, leaf) in enumerate(tree.items())
    }


def device_peak() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


Runs = Callable[..., Any]


@contextlib.contextmanager
def a_process() -> Iterator[Runs]:
    """Yields what runs functions in a process of its own, one after the other.

    There the device has held nothing before, and who crashes is told apart.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@contextlib.contextmanager
def this_process() -> Iterator[Runs]:
    yield lambda function, *arguments: function(*arguments)


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
