"""What the optimizer costs in a whole training step: Adam beside AdaMod.

Training steps of a Transformer, of a ResNet-34 or of GPT-2 small, their gradients
alone, and the update of the same parameters alone take turns. The table gives the
update's share, what it adds to the gradients in one program, the ratio of whole steps,
and the memory that they need.

    pip install -e '.[examples]' --group bench && python -m benchmarks.train_step
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# The device's peak is read in processes of their own, which share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

from benchmarks.common import gpt2, report, trees
from benchmarks.common.optimizers import (
    ADAM,
    ADAMOD,
    ADAMOD_BFLOAT16,
    ADAMOD_FLOAT8,
    OPTIMIZERS,
    updates_of,
    weights_dtype,
)
from benchmarks.common.timing import (
    Update,
    a_process,
    calibrated,
    device_peak,
    quartiles,
    seconds,
)
from examples.common.resnet import ResNet
from examples.common.transformer import Transformer

CONTEXT = 64
COMPARED = (ADAM, ADAMOD, ADAMOD_BFLOAT16, ADAMOD_FLOAT8)


@dataclasses.dataclass(frozen=True)
class Options:
    """Times whole training steps with Adam and with AdaMod, taking turns."""

    rounds: int = 15
    """Samples of each optimizer."""
    batch: int = 32
    """Examples in a batch."""
    models: tuple[str, ...] = ("Transformer", "ResNet-34")
    """Which of Transformer, ResNet-34, GPT-2 small and, for a trial, GPT-2 tiny."""
    optimizers: tuple[str, ...] = COMPARED
    """Which optimizers beside Adam; those for bfloat16 weights have them."""
    name: str = "train_step"
    """Name of the files of results."""
    output: Path = report.RESULTS
    """Folder for the tables."""

    def __post_init__(self) -> None:
        for option, known in (("models", MODELS), ("optimizers", OPTIMIZERS)):
            if unknown := set(getattr(self, option)) - set(known):
                raise ValueError(
                    f"--{option}: {sorted(unknown)} unknown; there are {[*known]}."
                )
        for option in ("rounds", "batch"):
            if getattr(self, option) < 2:
                raise ValueError(
                    f"--{option} must be at least 2, got {getattr(self, option)}."
                )


class Problem(NamedTuple):
    """What is trained: the loss is of parameters, the rest and a batch."""

    params: Any
    rest: Any
    loss: Callable[..., tuple[jax.Array, Any]]  # and the new rest
    batch: tuple[jax.Array, ...]


def of_module(module: nnx.Module, *batch: jax.Array) -> Problem:
    """Returns the training of a classifier, of inputs and labels."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, rest, inputs, labels):
        module: Any = nnx.merge(graph, params, rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(module(inputs), labels)
        return losses.mean(), nnx.state(module, nnx.Not(nnx.Param))

    return Problem(params, rest, loss, batch)


def transformer(batch: int) -> Problem:
    """Returns a Post-LN Transformer of bytes: 6 blocks of width 128, 100 leaves."""
    tokens = np.random.default_rng(0).integers(256, size=(batch, CONTEXT + 1))
    model = Transformer(6, 128, 4, CONTEXT, rngs=nnx.Rngs(0))
    return of_module(model, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


def resnet34(batch: int) -> Problem:
    """Returns ResNet-34 for images of 32 by 32."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 32, 32, 3), dtype=np.float32)
    model = ResNet((3, 4, 6, 3), 64, 3, 10, rngs=nnx.Rngs(0))
    labels = rng.integers(10, size=batch)
    return of_module(model, jnp.asarray(images), jnp.asarray(labels))


def gpt2_of(tree: Callable[[], trees.Tree], context: int, batch: int) -> Problem:
    """Returns GPT-2, on random tokens."""
    shapes = tree()
    vocabulary = shapes["tokens"].shape[0]
    tokens = jax.random.randint(jax.random.key(0), (batch, context + 1), 0, vocabulary)
    return Problem(
        gpt2.initialised(shapes),
        {},
        lambda params, rest, tokens: (gpt2.loss(params, tokens), rest),
        (tokens,),
    )


TINY = functools.partial(trees.gpt2, 1, 64, 256)
MODELS: dict[str, Callable[[int], Problem]] = {
    "Transformer": transformer,
    "ResNet-34": resnet34,
    "GPT-2 small": functools.partial(gpt2_of, trees.gpt2_small, 1024),
    "GPT-2 tiny": functools.partial(gpt2_of, TINY, 32),
}


class Training:
    """Training steps on one batch; without an optimizer their gradients alone."""

    def __init__(self, model: str, optimizer: str | None, batch: int):
        params, rest, loss, self.batch = MODELS[model](batch)
        dtype = weights_dtype(optimizer or ADAM)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        tx = OPTIMIZERS[optimizer or ADAM]()

        def step(params, opt_state, rest, *batch):
            gradients, rest = jax.grad(loss, has_aux=True)(params, rest, *batch)
            if optimizer is None:  # written where the last ones were
                return params, gradients, rest
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, rest

        init = tx.init if optimizer else functools.partial(jax.tree.map, jnp.zeros_like)
        self.state = params, jax.jit(init)(params), rest
        start = time.perf_counter()
        self.step = (
            jax.jit(step, donate_argnums=(0, 1, 2))
            .lower(*self.state, *self.batch)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - start

    def run(self, times: int) -> None:
        """Trains that many steps; returns when all is computed."""
        for _ in range(times):
            self.state = self.step(*self.state, *self.batch)
        jax.block_until_ready(self.state)

    @property
    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the parameters."""
        leaves = jax.tree.leaves(self.state[0])
        return {
            f"leaf{i}": jax.ShapeDtypeStruct(x.shape, x.dtype)
            for i, x in enumerate(leaves)
        }


def peak_of(model: str, optimizer: str, batch: int) -> float | None:
    """Returns the device's own peak in MB, if it keeps one."""
    Training(model, optimizer, batch).run(2)
    peak = device_peak()
    return peak and peak / 1e6


def compare(model: str, options: Options) -> list[dict[str, Any]]:
    """Returns a row for each optimizer."""
    compared = [ADAM, *(x for x in options.optimizers if x != ADAM)]
    peaks = []
    for optimizer in compared:
        with a_process() as run:
            peaks.append(run(peak_of, model, optimizer, options.batch))
    trainings = [Training(model, optimizer, options.batch) for optimizer in compared]
    updates = [
        Update(updates_of(x), training.parameters)
        for x, training in zip(compared, trainings, strict=True)
    ]
    gradients = Training(model, None, options.batch)
    turns = [(x, calibrated(x)) for x in (*trainings, *updates, gradients)]
    samples: list[list[float]] = [[] for _ in turns]
    for _ in tqdm(range(options.rounds), model):
        for (x, times), sample in zip(turns, samples, strict=True):
            sample.append(seconds(x, times))
    rows = []
    for i, optimizer in enumerate(compared):
        whole, update = samples[i], samples[i + len(compared)]
        added = [all_ - rest for all_, rest in zip(whole, samples[-1], strict=True)]
        ratios = [own / adam for own, adam in zip(whole, samples[0], strict=True)]
        shares = [own / all_ for own, all_ in zip(update, whole, strict=True)]
        memory = trainings[i].step.memory_analysis()
        assert memory is not None
        rows.append(
            {
                "optimizer": optimizer,
                "step, ms": 1e3 * statistics.median(whole),
                "update alone, ms": 1e3 * statistics.median(update),
                "update in the step, ms": 1e3 * statistics.median(added),
                "share of the step, %": 100 * statistics.median(shares),
                "of Adam's step": statistics.median(ratios),
                "quartiles": quartiles(ratios),
                "state, MB": sum(x.nbytes for x in jax.tree.leaves(trainings[i].state))
                / 1e6,
                "temporaries, MB": memory.temp_size_in_bytes / 1e6,
                "device's peak, MB": peaks[i],
                "compile, s": trainings[i].compile_seconds,
            }
        )
    return rows


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table for each model."""
    notes = (
        f"Batches of {options.batch}; medians of {options.rounds} samples. The state "
        "is all that training carries on: parameters, averages, batch statistics. No "
        "peak is given where the device keeps no statistics of its memory, as on CPU. "
        "The update in the step is what a step takes longer than its gradients alone.",
    )
    tables, text = {}, ""
    for model in options.models:
        tables[model] = compare(model, options)
        text = report.save(options.name, tables, options.output, notes=notes)
    print(text)
    return tables


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
