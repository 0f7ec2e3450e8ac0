"""What the optimizer costs in a whole training step: Adam beside AdaMod.

Training steps of a Transformer and of a ResNet-34, and the update of the same
parameters alone, take turns; the table gives the update's share, the ratio of whole
steps, and the memory that they need.

    pip install -e '.[examples]' --group bench && python -m benchmarks.train_step
"""

import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The device's peak is read in processes of their own, which share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

from benchmarks import report
from benchmarks.optimizers import ADAM, ADAMOD, ADAMOD_BFLOAT16, OPTIMIZERS
from benchmarks.timing import Update, calibrated, quartiles, seconds
from examples.common.resnet import ResNet
from examples.common.transformer import Transformer

CONTEXT = 64
COMPARED = (ADAM, ADAMOD, ADAMOD_BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Options:
    """Times whole training steps with Adam and with AdaMod, taking turns."""

    rounds: int = 15
    """Samples of each optimizer."""
    batch: int = 32
    """Examples in a batch."""
    name: str = "train_step"
    """Name of the files of results."""
    output: Path = report.RESULTS
    """Folder for the tables."""

    def __post_init__(self) -> None:
        for option in ("rounds", "batch"):
            if getattr(self, option) < 2:
                raise ValueError(
                    f"--{option} must be at least 2, got {getattr(self, option)}."
                )


def transformer(batch: int) -> tuple[nnx.Module, jax.Array, jax.Array]:
    """Returns a Post-LN Transformer of bytes, inputs and labels."""
    tokens = np.random.default_rng(0).integers(256, size=(batch, CONTEXT + 1))
    model = Transformer(6, 128, 4, CONTEXT, rngs=nnx.Rngs(0))
    return model, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])


def resnet34(batch: int) -> tuple[nnx.Module, jax.Array, jax.Array]:
    """Returns ResNet-34 for images of 32 by 32, inputs and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 32, 32, 3), dtype=np.float32)
    model = ResNet((3, 4, 6, 3), 64, 3, 10, rngs=nnx.Rngs(0))
    return model, jnp.asarray(images), jnp.asarray(rng.integers(10, size=batch))


MODELS: dict[str, Callable[[int], tuple[nnx.Module, jax.Array, jax.Array]]] = {
    "Transformer, 6 blocks of width 128": transformer,
    "ResNet-34 for images of 32 by 32": resnet34,
}


class Training:
    """Training steps on one batch."""

    def __init__(self, model: str, optimizer: str, batch: int):
        module, inputs, labels = MODELS[model](batch)
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        tx = OPTIMIZERS[optimizer]()

        def loss_fn(params, rest, inputs, labels):
            module = nnx.merge(graph, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                module(inputs), labels
            )
            return losses.mean(), nnx.state(module, nnx.Not(nnx.Param))

        def step(params, opt_state, rest, inputs, labels):
            gradients, rest = jax.grad(loss_fn, has_aux=True)(
                params, rest, inputs, labels
            )
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, rest

        self.state = params, jax.jit(tx.init)(params), rest
        self.batch = inputs, labels
        self.step = (
            jax.jit(step, donate_argnums=(0, 1, 2))
            .lower(*self.state, *self.batch)
            .compile()
        )

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


def device_peak(model: str, optimizer: str, batch: int) -> float | None:
    """Returns the device's own peak in MB, if it keeps one."""
    Training(model, optimizer, batch).run(2)
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e6 if stats else None


def compare(model: str, options: Options) -> list[dict[str, Any]]:
    """Returns a row for each optimizer."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [
            pool.apply(device_peak, (model, optimizer, options.batch))
            for optimizer in COMPARED
        ]
    trainings = [Training(model, optimizer, options.batch) for optimizer in COMPARED]
    updates = [Update(OPTIMIZERS[x](), trainings[0].parameters) for x in COMPARED]
    turns = [(x, calibrated(x)) for x in (*trainings, *updates)]
    samples: list[list[float]] = [[] for _ in turns]
    for _ in tqdm(range(options.rounds), model):
        for (x, times), sample in zip(turns, samples, strict=True):
            sample.append(seconds(x, times))
    rows = []
    for i, optimizer in enumerate(COMPARED):
        whole, update = samples[i], samples[i + len(COMPARED)]
        ratios = [own / adam for own, adam in zip(whole, samples[0], strict=True)]
        shares = [own / all_ for own, all_ in zip(update, whole, strict=True)]
        memory = trainings[i].step.memory_analysis()
        assert memory is not None
        rows.append(
            {
                "optimizer": optimizer,
                "step, ms": 1e3 * statistics.median(whole),
                "update alone, ms": 1e3 * statistics.median(update),
                "share of the step, %": 100 * statistics.median(shares),
                "of Adam's step": statistics.median(ratios),
                "quartiles": quartiles(ratios),
                "state, MB": sum(x.nbytes for x in jax.tree.leaves(trainings[i].state))
                / 1e6,
                "temporaries, MB": memory.temp_size_in_bytes / 1e6,
                "device's peak, MB": peaks[i],
            }
        )
    return rows


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table for each model."""
    tables = {model: compare(model, options) for model in MODELS}
    notes = (
        f"Batches of {options.batch}; medians of {options.rounds} samples. The state "
        "is all that training carries on: parameters, averages, batch statistics. No "
        "peak is given where the device keeps no statistics of its memory, as on CPU.",
    )
    print(report.save(options.name, tables, options.output, notes=notes))
    return tables


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
