"""Which optimizers train a Post-LN Transformer at which learning rates?

Adam, Adam with warm-up, RAdam, and AdaMod with two lengths of memory, at constant
learning rates, with no other change. Two rates and one seed by default; ``--whole`` is
the grid of four rates and three seeds:

    python -m experiments.learning_rate_sweep
    python -m experiments.learning_rate_sweep --whole
"""

import dataclasses
from pathlib import Path

import optax

from examples.common.options import check_counts, check_heads, check_rates
from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer
from experiments.command import command
from experiments.data.text import batches, unigram_entropy
from experiments.language_modelling import loss
from experiments.plateau import draw_heat_map, plateau_table
from experiments.report import report
from experiments.training import History, Run, Task, train_all
from optax_adamod import adamod

B2 = 0.98  # the usual one of Transformers
B3 = (0.99, 0.999)
HEADS = 4
WHOLE = {"rates": (1e-3, 3e-3, 1e-2, 3e-2), "seeds": 3}
ROW = 20  # steps whose mean loss is one row of the history
FINAL = 10  # rows of which the final loss is the mean


@dataclasses.dataclass(frozen=True)
class Options:
    """Sweeps the learning rate of optimizers of a Post-LN Transformer."""

    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates."""
    seeds: int = 1
    """How often to repeat everything, from other weights and on other batches."""
    whole: bool = False
    """The whole grid: rates 1e-3, 3e-3, 1e-2 and 3e-2, and 3 seeds."""
    steps: int = 3000
    """Training steps of each run: 30 horizons of b3 0.99, 3 of b3 0.999."""
    early: int = 800
    """An earlier step to report too: 8 horizons of b3 0.99, less than one of 0.999."""
    warmup: int = 300
    """Steps of Adam's linear warm-up."""
    depth: int = 12
    """Transformer blocks."""
    width: int = 32
    """Features of each token, a multiple of 4, the number of heads."""
    context: int = 16
    """Bytes that the model sees."""
    batch: int = 16
    """Windows of text in a batch."""
    variance: float | None = None
    """Initial variance of the layers that feed a residual sum, relative to the others;
    by default 1 / depth. Flax's own initialisation is 1."""
    text: Path = FOLDER
    """Folder whose .py files are the text."""
    output: Path = Path("outputs/learning_rate_sweep")
    """Folder for checkpoints, tables and figures; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        if self.whole:
            for name, value in WHOLE.items():
                object.__setattr__(self, name, value)
        check_counts(
            self, "seeds", "steps", "warmup", "depth", "width", "context", "batch"
        )
        if not 1 <= self.early <= self.steps:
            raise ValueError(
                f"--early must be at least 1 and at most --steps, {self.steps}, got "
                f"{self.early}."
            )
        check_heads(self, HEADS)
        check_rates(self)
        if self.variance is not None and not self.variance > 0:
            raise ValueError(f"--variance must be positive, got {self.variance}.")


def optimizers(
    learning_rate: float, warmup: int
) -> dict[str, optax.GradientTransformation]:
    schedule = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup)
    return {
        "Adam": optax.adam(learning_rate, b2=B2),
        f"Adam, {warmup} steps of warm-up": optax.adam(schedule, b2=B2),
        "RAdam": optax.radam(learning_rate, b2=B2),
        **{f"AdaMod, b3 {b3:g}": adamod(learning_rate, b2=B2, b3=b3) for b3 in B3},
    }


def runs_of(options: Options) -> list[Run]:
    memory = {f"AdaMod, b3 {b3:g}": b3 for b3 in B3}
    return [
        Run(name, transformation, rate, seed, memory.get(name))
        for rate in options.rates
        for name, transformation in optimizers(rate, options.warmup).items()
        for seed in range(options.seeds)
    ]


def main(options: Options) -> History:
    text = load_text(options.text, at_least=options.batch * options.context)
    task = Task(
        create_model=lambda rngs: Transformer(
            options.depth, options.width, HEADS, options.context, options.variance,
            rngs=rngs,
        ),
        loss=loss,
        batches=lambda seed: batches(text, options.context, seed, options.batch),
        steps=options.steps,
        row_every=ROW,
    )  # fmt: skip
    settings = dataclasses.asdict(options)
    for name in ("rates", "seeds", "whole", "early", "output"):
        del settings[name]
    history = train_all(task, runs_of(options), options.output / "runs", settings)
    plateau = unigram_entropy(text)
    report(
        "learning_rate_sweep", history, "loss", options.output,
        budgets=(options.early, options.steps), rows=FINAL,
        extra=[plateau_table(history, plateau, "bytes")],
    )  # fmt: skip
    draw_heat_map(history, plateau, FINAL, options.output / "heat_map.png")
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
