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

from examples.common.options import check_counts, check_rates
from experiments.common.command import command
from experiments.common.plateau import draw_heat_map, plateau_table
from experiments.common.report import report
from experiments.common.training import History, Run, train_all
from experiments.data.text import unigram_entropy
from experiments.tasks import text
from experiments.tasks.text import B2
from optax_adamod import adamod

B3 = (0.99, 0.999)
STEPS = 3000  # 30 horizons of b3 0.99, 3 of b3 0.999
EARLY = 800  # reported too: 8 horizons of b3 0.99, less than one of 0.999
WARMUP = 300
DEPTH, WIDTH, BATCH = 12, 32, 16
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
    variance: float | None = None
    """Initial variance of the layers that feed a residual sum, relative to the others;
    by default 1 / depth. Flax's own initialisation is 1."""
    output: Path = Path("outputs/learning_rate_sweep")
    """Folder for checkpoints and tables; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        if self.whole:
            for name, value in WHOLE.items():
                object.__setattr__(self, name, value)
        check_counts(self, "seeds")
        check_rates(self)
        if self.variance is not None and not self.variance > 0:
            raise ValueError(f"--variance must be positive, got {self.variance}.")


def runs_of(options: Options) -> list[Run]:
    runs = []
    for rate in options.rates:
        schedule = optax.linear_schedule(rate / WARMUP, rate, WARMUP)
        optimizers = [
            ("Adam", optax.adam(rate, b2=B2), None),
            (f"Adam, {WARMUP} steps of warm-up", optax.adam(schedule, b2=B2), None),
            ("RAdam", optax.radam(rate, b2=B2), None),
            *((f"AdaMod, b3 {b3:g}", adamod(rate, b2=B2, b3=b3), b3) for b3 in B3),
        ]
        runs += [
            Run(name, transformation, rate, seed, b3)
            for name, transformation, b3 in optimizers
            for seed in range(options.seeds)
        ]
    return runs


def main(options: Options) -> History:
    model = text.model_of(DEPTH, WIDTH, variance=options.variance)
    task = text.task_of(model, STEPS, ROW, BATCH)
    settings = {"steps": STEPS, "warmup": WARMUP, "variance": options.variance}
    history = train_all(task, runs_of(options), options.output / "runs", settings)
    plateau = unigram_entropy(text.python_text(BATCH))
    report(
        "learning_rate_sweep", history, "loss", options.output,
        budgets=(EARLY, STEPS), rows=FINAL,
        extra=[plateau_table(history, plateau, "bytes")],
    )  # fmt: skip
    draw_heat_map(history, plateau, FINAL, options.output / "heat_map.png")
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
