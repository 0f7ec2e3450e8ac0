"""Trains the Post-LN Transformer with AdaMod's averages in float32 and in bfloat16.

    python -m experiments.low_precision --steps 600 --seeds 3

The last row rounds to nearest, which the library does not do: it is there to show why.
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.common.language_modelling import (
    FINAL,
    batches,
    final_loss,
    save_losses,
    train_model,
)
from examples.common.options import check_counts, check_decays, check_heads
from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer
from experiments.command import command
from optax_adamod import adamod

B2 = 0.98  # the usual one of Transformers
HEADS = 4
CONTEXT = 64
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares dtypes of AdaMod's averages."""

    steps: int = 600
    """Training steps of each run."""
    depth: int = 6
    """Transformer blocks."""
    width: int = 128
    """Features of each token, a multiple of 4, the number of heads."""
    learning_rate: float = 3e-3
    """AdaMod's learning rate, constant."""
    b3: float = 0.99
    """AdaMod's b3; its bound opens over about 1 / (1 - b3) steps."""
    seeds: int = 1
    """How often to repeat everything, from other weights and on other batches."""
    output: Path = Path("outputs/low_precision")
    """Folder for the table of losses."""
    text: Path = FOLDER
    """Folder whose .py files are the text."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "depth", "width", "seeds")
        if self.steps < FINAL:
            raise ValueError(
                f"--steps must be at least {FINAL}, over which the final loss is "
                f"averaged, got {self.steps}."
            )
        check_heads(self, HEADS)
        check_decays(self, "b3")
        if not self.learning_rate > 0:
            raise ValueError(
                f"--learning-rate must be positive, got {self.learning_rate}."
            )


def rounded_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps a transformation's float32 averages in bfloat16, rounded to nearest."""

    def init_fn(params: optax.Params) -> optax.OptState:
        return _cast(tx.init(params), jnp.float32, jnp.bfloat16)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        state = _cast(state, jnp.bfloat16, jnp.float32)
        updates, state = tx.update(updates, state, params)
        return updates, _cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformation(init_fn, update_fn)


def _cast(state: optax.OptState, old: Any, new: Any) -> optax.OptState:
    """Casts what has the dtype ``old``, and leaves counts alone."""
    return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, state)


Factory = Callable[[float, float], optax.GradientTransformation]


def adamod_of(**dtypes: Any) -> Factory:
    """Returns what makes AdaMod, from the learning rate and ``b3``."""
    return lambda learning_rate, b3: adamod(learning_rate, b2=B2, b3=b3, **dtypes)


MU_BOUND = {"mu_dtype": "bfloat16", "bound_dtype": "bfloat16"}
CASES: dict[str, Factory] = {
    "float32": adamod_of(),
    "bfloat16 mu and bound": adamod_of(**MU_BOUND),
    "bfloat16 mu, nu and bound": adamod_of(**MU_BOUND, nu_dtype="bfloat16"),
    "the same, rounded to nearest": lambda learning_rate, b3: rounded_to_nearest(
        adamod_of()(learning_rate, b3)
    ),
}


def bytes_per_parameter(tx: optax.GradientTransformation) -> int:
    state = tx.init(jnp.zeros(1024))
    averages = [optax.tree.get(state, name) for name in ("mu", "nu", "bound")]
    return sum(x.nbytes for x in jax.tree.leaves(averages)) // 1024


def main(options: Options) -> dict[str, list[list[float]]]:
    """Runs the comparison; returns the losses by case, seed and step."""
    text = load_text(options.text, at_least=BATCH * CONTEXT)
    options.output.mkdir(parents=True, exist_ok=True)
    optimizers = {
        name: create(options.learning_rate, options.b3)
        for name, create in CASES.items()
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for seed in range(options.seeds):
        for name, tx in optimizers.items():
            model = Transformer(
                options.depth, options.width, HEADS, CONTEXT, rngs=nnx.Rngs(seed)
            )
            windows = batches(text, seed, CONTEXT, BATCH)
            title = f"{name}, seed {seed}"
            runs[name].append(train_model(title, model, tx, windows, options.steps))
    print(
        "| averages | bytes a parameter | final loss, nats | lowest to highest seed |"
    )
    print("| --- | --- | --- | --- |")
    for name, losses in runs.items():
        size = bytes_per_parameter(optimizers[name])
        finals = [final_loss(x) for x in losses]
        print(
            f"| {name} | {size} | {statistics.fmean(finals):.3f} | {min(finals):.3f} "
            f"to {max(finals):.3f} |"
        )
    losses = options.output / "losses.csv"
    save_losses(runs, losses)
    print(f"losses of every step: {losses}")
    return runs


if __name__ == "__main__":
    command(main, Options, __doc__)
