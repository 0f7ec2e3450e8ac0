"""Trains the Post-LN Transformer with averages in float32, bfloat16 and 8 bits.

    python -m experiments.low_precision --steps 600 --seeds 3

Two rows round to nearest, which the library does not do: they are there to show why.
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
from optax_adamod import Float8Array, adamod

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
    cases: tuple[str, ...] = ()
    """Which of the rows; all of them if none is named."""
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
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"--cases: {unknown} unknown; there are {[*CASES]}.")
        if not self.learning_rate > 0:
            raise ValueError(
                f"--learning-rate must be positive, got {self.learning_rate}."
            )


def rounded_to_nearest(
    tx: optax.GradientTransformation,
    narrow: Callable[[jax.Array, str], Any],
    widen: Callable[[Any], jax.Array],
) -> optax.GradientTransformation:
    """Keeps a transformation's float32 averages in another form between steps.

    Args:
      tx: The transformation.
      narrow: Returns the form of an array that belongs to a field, such as ``"mu"``.
      widen: Returns the array of a form.
    """

    def store(state: optax.OptState) -> optax.OptState:
        return jax.tree.map_with_path(
            lambda path, x: (
                narrow(x, "mu" if "mu" in jax.tree_util.keystr(path) else "")
                if x.dtype == jnp.float32
                else x
            ),
            state,
        )

    def load(state: optax.OptState) -> optax.OptState:
        return jax.tree.map(widen, state, is_leaf=lambda x: isinstance(x, Float8Array))

    def init_fn(params: optax.Params) -> optax.OptState:
        return store(tx.init(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(updates, load(state), params)
        return updates, store(state)

    return optax.GradientTransformation(init_fn, update_fn)


def bfloat16_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps averages in bfloat16, rounded to nearest."""

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return rounded_to_nearest(tx, lambda x, _: x.astype(jnp.bfloat16), widen)


def float8_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps averages in the library's 8 bits where it would, rounded to nearest."""

    def narrow(x: jax.Array, field: str) -> Any:
        if not x.ndim or x.shape[-1] % 128:
            return x
        return Float8Array.quantize(x, signed=field == "mu")

    def widen(x: Any) -> jax.Array:
        return x.dequantize() if isinstance(x, Float8Array) else x

    return rounded_to_nearest(tx, narrow, widen)


Factory = Callable[[float, float], optax.GradientTransformation]


def adamod_of(**dtypes: Any) -> Factory:
    """Returns what makes AdaMod, from the learning rate and ``b3``."""
    return lambda learning_rate, b3: adamod(learning_rate, b2=B2, b3=b3, **dtypes)


MU_BOUND = {"mu_dtype": "bfloat16", "bound_dtype": "bfloat16"}
FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}
CASES: dict[str, Factory] = {
    "float32": adamod_of(),
    "bfloat16 mu, nu and bound": adamod_of(**MU_BOUND, nu_dtype="bfloat16"),
    "8 bits": adamod_of(**FLOAT8),
    "8 bits, rounded to nearest": lambda learning_rate, b3: float8_to_nearest(
        adamod_of()(learning_rate, b3)
    ),
    "bfloat16 mu and bound": adamod_of(**MU_BOUND),
    "bfloat16, rounded to nearest": lambda learning_rate, b3: bfloat16_to_nearest(
        adamod_of()(learning_rate, b3)
    ),
}


def bytes_per_parameter(tx: optax.GradientTransformation, params: Any) -> float:
    """Returns the bytes of the averages of a model, for each of its parameters."""
    state = jax.eval_shape(tx.init, params)
    averages = [optax.tree.get(state, name) for name in ("mu", "nu", "bound")]
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(averages)]
    return sum(sizes) / optax.tree.size(params)


def main(options: Options) -> dict[str, list[list[float]]]:
    """Runs the comparison; returns the losses by case, seed and step."""
    text = load_text(options.text, at_least=BATCH * CONTEXT)
    options.output.mkdir(parents=True, exist_ok=True)
    optimizers = {
        name: create(options.learning_rate, options.b3)
        for name, create in CASES.items()
        if name in (options.cases or CASES)
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in optimizers}
    sizes: dict[str, float] = {}
    for seed in range(options.seeds):
        for name, tx in optimizers.items():
            model = Transformer(
                options.depth, options.width, HEADS, CONTEXT, rngs=nnx.Rngs(seed)
            )
            sizes[name] = bytes_per_parameter(tx, nnx.state(model, nnx.Param))
            windows = batches(text, seed, CONTEXT, BATCH)
            title = f"{name}, seed {seed}"
            runs[name].append(train_model(title, model, tx, windows, options.steps))
    print(
        "| averages | bytes a parameter | final loss, nats | lowest to highest seed |"
    )
    print("| --- | --- | --- | --- |")
    for name, losses in runs.items():
        finals = [final_loss(x) for x in losses]
        print(
            f"| {name} | {sizes[name]:.2f} | {statistics.fmean(finals):.3f} | "
            f"{min(finals):.3f} to {max(finals):.3f} |"
        )
    losses = options.output / "losses.csv"
    save_losses(runs, losses)
    print(f"losses of every step: {losses}")
    return runs


if __name__ == "__main__":
    command(main, Options, __doc__)
