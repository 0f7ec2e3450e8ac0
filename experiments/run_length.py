"""How far behind Adam does a short run end?

A Transformer of two blocks, which Adam trains without a warm-up, by Adam and AdaMod at
the same learning rates. Rates are constant, so one run shows all lengths up to its own:

    python -m experiments.run_length
"""

import dataclasses
from pathlib import Path

import optax

from examples.common.options import check_counts, check_rates
from examples.common.results import table
from experiments.common.command import command
from experiments.common.report import final_value, grouped, report, spread, until
from experiments.common.training import History, Run, train_all
from experiments.tasks import text
from experiments.tasks.text import B2
from optax_adamod import adamod

B3 = 0.99
DEPTH, WIDTH, BATCH = 2, 32, 16
HORIZONS = (0.5, 1, 2, 4, 8, 16)
ROW = 10  # steps whose mean loss is one row of the history
FINAL = 4  # rows of which the final loss is the mean


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares AdaMod with Adam over the length of a run."""

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates."""
    seeds: int = 3
    """How often to repeat everything, from other weights and on other batches."""
    output: Path = Path("outputs/run_length")
    """Folder for checkpoints and tables; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds")
        check_rates(self)


def behind(history: History, lengths: dict[float, int]) -> str:
    """Returns a table: AdaMod's loss less Adam's, by length and learning rate."""
    rows = []
    for horizons, steps in lengths.items():
        row = {"horizons": f"{horizons:g}", "steps": f"{steps:,}"}
        early = until(history, steps)
        of_adam, of_adamod = grouped(early).values()
        for rate, runs in of_adam.items():
            less = [
                final_value(early[ours], "loss", FINAL)
                - final_value(early[adam], "loss", FINAL)
                for adam, ours in zip(runs, of_adamod[rate], strict=True)
            ]
            row[f"lr {rate:g}"] = spread(less)
        rows.append(row)
    return (
        "AdaMod's loss less Adam's at the same learning rate and seed, over the length "
        f"of a run in units of 1 / (1 - b3):\n\n{table(rows)}"
    )


def main(options: Options) -> History:
    horizon = 1 / (1 - B3)
    lengths = {x: max(ROW, round(x * horizon / ROW) * ROW) for x in HORIZONS}
    steps = max(lengths.values())
    task = text.task_of(text.model_of(DEPTH, WIDTH), steps, ROW, BATCH)
    runs = [
        Run(name, transformation, rate, seed, b3)
        for rate in options.rates
        for name, transformation, b3 in (
            ("Adam", optax.adam(rate, b2=B2), None),
            ("AdaMod", adamod(rate, b2=B2, b3=B3), B3),
        )
        for seed in range(options.seeds)
    ]
    history = train_all(task, runs, options.output / "runs", {"b3": B3})
    report(
        "run_length", history, "loss", options.output,
        budgets=tuple(lengths.values()), rows=FINAL,
        extra=[behind(history, lengths)],
    )  # fmt: skip
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
