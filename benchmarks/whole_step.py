"""What a training step of a Llama of 7 billion parameters needs of one H100.

Forward, backward and update are one program, compiled without the GPU: its arguments,
its peak by XLA's figures, whether that fits. On a GPU ``--steps 10`` trains that many
steps too, on random tokens.

    pip install -e '.[examples]' --group compiled
    python -m benchmarks.whole_step
"""

import dataclasses
import functools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

# Without which JAX takes three quarters of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.stages import Compiled
from tqdm import tqdm

from benchmarks.common import llama, report, targets
from benchmarks.common.optimizers import (
    ADAM,
    ADAM_BFLOAT16,
    ADAMOD_7_BYTES,
    OPTIMIZERS,
    weights_dtype,
)
from examples.common.options import check_counts

MEMORY = 80e9  # bytes of one H100


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles whole training steps of Llama 2 7B for one H100, and trains on a GPU."""

    optimizers: tuple[str, ...] = (ADAM, ADAM_BFLOAT16, ADAMOD_7_BYTES)
    """Which of the optimizers."""
    tokens: int = 2048
    """Tokens of a step."""
    steps: int = 0
    """Steps to train on the device at hand, where the program fits."""
    small: bool = False
    """A model of 0.4 million parameters, compiled for the device at hand."""
    output: Path = report.RESULTS
    """Folder for the table."""

    def __post_init__(self) -> None:
        check_counts(self, "tokens")
        if self.steps < 0:
            raise ValueError(f"--steps must be at least 0, got {self.steps}.")
        if unknown := set(self.optimizers) - set(OPTIMIZERS):
            raise ValueError(
                f"--optimizers: {sorted(unknown)} unknown; there are {[*OPTIMIZERS]}."
            )

    @property
    def size(self) -> llama.Size:
        """Size of the model."""
        return llama.SMALL if self.small else llama.LLAMA_2_7B


def step(optimizer: str, options: Options) -> Any:
    """Returns the training step, which gives parameters, state and loss."""
    tx = OPTIMIZERS[optimizer]()
    loss_fn = functools.partial(llama.loss, heads=options.size.heads)

    def train(params, opt_state, tokens):
        loss, gradients = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(train, donate_argnums=(0, 1))


def arguments(optimizer: str, options: Options) -> tuple[Any, Any, Any]:
    """Returns the shapes of parameters, state and tokens."""
    params = llama.shapes(options.size, weights_dtype(optimizer))
    state = jax.eval_shape(OPTIMIZERS[optimizer]().init, params)
    return params, state, jax.ShapeDtypeStruct((1, options.tokens + 1), jnp.int32)


def peak(compiled: Compiled) -> int:
    """Returns the bytes of all that the program has in memory, by XLA's figures."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def compile_step(optimizer: str, options: Options) -> dict[str, Any]:
    """Compiles the step; returns a row of the table."""
    shapes = arguments(optimizer, options)
    start = time.process_time(), time.perf_counter()
    if options.small:
        compiled = step(optimizer, options).lower(*shapes).compile()
    else:
        h100 = targets.mesh("H100", "explicit")
        with targets.lowered_for(h100):
            lowered = step(optimizer, options).lower(*targets.on_one(shapes, h100))
        compiled = lowered.compile()
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    memory = compiled.memory_analysis()
    assert memory is not None
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes[0]))
    own = getattr(memory, "peak_memory_in_bytes", None)  # of newer versions of JAX
    return {
        "optimizer": optimizer,
        "weights": jnp.dtype(weights_dtype(optimizer)).name,
        "arguments, GB": memory.argument_size_in_bytes / 1e9,
        "temporaries, GB": memory.temp_size_in_bytes / 1e9,
        "peak, GB": peak(compiled) / 1e9,
        "bytes a parameter": peak(compiled) / parameters,
        "XLA's peak, GB": own and own / 1e9,
        "fits 80 GB": "yes" if peak(compiled) < MEMORY else "no",
        "compile, s": wall,
        "compile, s of CPU": cpu,
    }


def train(optimizer: str, options: Options) -> dict[str, Any]:
    """Trains on the device at hand, in a process whose device has held nothing yet."""
    shapes = arguments(optimizer, options)
    compiled = step(optimizer, options).lower(*shapes).compile()
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    if peak(compiled) > limit:
        return {"losses": "does not fit", "tokens/s": None, "device's peak, GB": None}
    initialised = functools.partial(
        llama.initialised, options.size, weights_dtype(optimizer)
    )
    params = jax.jit(initialised)(jax.random.key(0))
    opt_state = jax.jit(OPTIMIZERS[optimizer]().init)(params)
    losses, seconds = [], []
    for i in range(options.steps):
        tokens = jax.random.randint(
            jax.random.key(i), shapes[2].shape, 0, options.size.vocabulary
        )
        tokens.block_until_ready()
        start = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, tokens)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    # Initialising needs memory for random bits, but less than a step.
    stats = device.memory_stats()
    return {
        "losses": " ".join(f"{loss:.3f}" for loss in losses),
        "tokens/s": options.tokens / min(seconds),
        "device's peak, GB": stats["peak_bytes_in_use"] / 1e9 if stats else None,
    }


def main(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Returns a table with a row for each optimizer."""
    if not options.small:
        # This process alone: those that train have the GPU.
        jax.config.update("jax_platforms", "cpu")
    rows = [compile_step(x, options) for x in tqdm(options.optimizers, "compiling")]
    if options.steps:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for row in tqdm(rows, "training"):
                row |= pool.apply(train, (row["optimizer"], options))
    where = "the device at hand" if options.small else "one H100"
    size = sum(x.size for x in jax.tree.leaves(llama.shapes(options.size, "float32")))
    title = f"{size:,} parameters, 1 x {options.tokens:,} tokens, for {where}"
    notes = (
        "Arguments are what training holds between steps: weights, state and tokens. "
        "The peak is arguments and results, what is in the same place counted once, "
        "and temporaries, gradients among them; XLA's own figure stands beside it "
        "where JAX has one. Tokens a second are those of the fastest step.",
    )
    tables = {title: rows}
    print(report.save("whole_step", tables, options.output, notes=notes))
    return tables


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
