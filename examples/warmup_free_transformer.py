"""Trains a Post-LN Transformer with Adam, Adam with warm-up, RAdam and AdaMod.

The two warm-ups are those that Ma & Yarats propose (arXiv 1910.04209), for they need no
tuning either: linear, over 2 / (1 - b2) steps, and exponential, with AdaMod's b3. It
draws their losses, and the learning rates that Adam and AdaMod used with seed 0.

The text is the source of Python's own standard library, so that nothing has to be
downloaded. Each optimizer starts from the same weights and sees the same batches.

    python -m examples.warmup_free_transformer --steps 400 --seeds 3
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx

from examples.common.language_modelling import (
    FINAL,
    batches,
    final_loss,
    save_losses,
    train_model,
)
from examples.common.learning_rate_figure import plot
from examples.common.options import check_counts, check_heads
from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer
from optax_adamod import ScaleByAdamodState, adamod, learning_rates, log10_histogram

CONTEXT = 32
BATCH = 16
HEADS = 4
B2 = 0.98  # the usual one of Transformers
BINS = np.linspace(-4, 6, 101)  # of the learning rates, in powers of ten


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares optimizers on a Post-LN Transformer without learning-rate warm-up."""

    steps: int = 400
    """Training steps of each run."""
    depth: int = 6
    """Transformer blocks."""
    width: int = 64
    """Features of each token, a multiple of 4, the number of heads."""
    learning_rate: float = 6e-3
    """Learning rate of every optimizer, constant but for Adam's warm-up."""
    b3: float = 0.99
    """AdaMod's b3; its bound opens over about 1 / (1 - b3) steps."""
    seeds: int = 1
    """How often to repeat the comparison, from other weights and on other batches."""
    output: Path = Path("outputs/warmup_free_transformer")
    """Folder for the figure and the table of losses."""
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
        if not self.learning_rate > 0:
            raise ValueError(
                f"--learning-rate must be positive, got {self.learning_rate}."
            )
        if not 0 <= self.b3 < 1:
            raise ValueError(f"--b3 must be in [0, 1), got {self.b3}.")


def optimizers(options: Options) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers to compare, by their names in the figure."""
    learning_rate = options.learning_rate
    b3 = options.b3
    warmup = round(2 / (1 - B2))

    def linear(count: Any) -> jax.Array:
        return learning_rate * jnp.minimum(1.0, (count + 1) / warmup)

    def exponential(count: Any) -> jax.Array:
        return learning_rate * (1 - b3 ** (count + 1))

    return {
        "Adam": optax.adam(learning_rate, b2=B2),
        f"Adam, linear warm-up over {warmup} steps": optax.adam(linear, b2=B2),
        f"Adam, exponential warm-up, b3 {b3:g}": optax.adam(exponential, b2=B2),
        "RAdam": optax.radam(learning_rate, b2=B2),
        f"AdaMod, b3 {b3:g}": adamod(learning_rate, b2=B2, b3=b3),
    }


@jax.jit
def count_rates(opt_state: Any, learning_rate: float) -> jax.Array:
    """Counts the coordinates by the learning rate that Adam or AdaMod last used.

    The first bin and the last hold what is beyond them; no gradient yet is no count.
    """
    state = opt_state[0]
    if isinstance(state, optax.ScaleByAdamState):  # AdaMod without a bound
        bound = jax.tree.map(lambda v: jnp.full_like(v, jnp.inf), state.nu)
        state = ScaleByAdamodState(state.count, state.mu, state.nu, bound)
    rates = jax.tree.leaves(learning_rates(state, learning_rate, b2=B2).bounded)
    # Counted as one array, which compiles faster than a hundred.
    counted = log10_histogram(jnp.concatenate([x.ravel() for x in rates]), BINS)
    return counted.counts.at[0].add(counted.below).at[-1].add(counted.above)


def train(
    name: str,
    tx: optax.GradientTransformation,
    text: np.ndarray,
    seed: int,
    options: Options,
    counts: list[np.ndarray] | None = None,
) -> list[float]:
    """Returns the loss of every step; appends the learning rates' to ``counts``."""
    model = Transformer(
        options.depth, options.width, HEADS, CONTEXT, rngs=nnx.Rngs(seed)
    )
    windows = batches(text, seed, CONTEXT, BATCH)

    def count(opt_state: optax.OptState) -> None:
        if counts is not None:
            counts.append(np.asarray(count_rates(opt_state, options.learning_rate)))

    return train_model(
        f"{name}, seed {seed}", model, tx, windows, options.steps, after_step=count
    )


def table(runs: dict[str, list[list[float]]], seconds: dict[str, float]) -> str:
    """Returns a Markdown table with a row for each optimizer."""
    rows = ["| optimizer | final loss, nats | lowest to highest seed | seconds a run |"]
    rows.append("| --- | --- | --- | --- |")
    for name, losses in runs.items():
        finals = [final_loss(x) for x in losses]
        rows.append(
            f"| {name} | {statistics.fmean(finals):.2f} | {min(finals):.2f} to "
            f"{max(finals):.2f} | {seconds[name] / len(losses):.0f} |"
        )
    return "\n".join(rows)


def main(options: Options) -> dict[str, list[list[float]]]:
    """Runs the comparison; returns the losses by optimizer, seed and step."""
    text = load_text(options.text, at_least=BATCH * CONTEXT)
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{len(text):,} bytes of text, on {jax.devices()[0].device_kind}")
    compared = optimizers(options)  # once, for each is compiled for itself
    runs: dict[str, list[list[float]]] = {name: [] for name in compared}
    adam, *_, ours = runs
    rates: dict[str, list[np.ndarray]] = {adam: [], ours: []}
    seconds = dict.fromkeys(runs, 0.0)
    for seed in range(options.seeds):
        for name, tx in compared.items():
            start = time.perf_counter()
            counts = rates.get(name) if seed == 0 else None
            runs[name].append(train(name, tx, text, seed, options, counts))
            seconds[name] += time.perf_counter() - start
    figure, losses = options.output / "losses.png", options.output / "losses.csv"
    plot(runs, {name: np.asarray(x) for name, x in rates.items()}, BINS, figure)
    save_losses(runs, losses)
    print(table(runs, seconds))
    print(f"figure: {figure}\nlosses of every step: {losses}")
    return runs


if __name__ == "__main__":
    matplotlib.use("Agg")
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
