"""Trains with averages in float32, bfloat16 and 8 bits, and weights in bfloat16.

A Transformer on text or on words, a ResNet on digits, or a translator:

    python -m experiments.low_precision --task text

One row rounds to nearest, which the library does not do: it shows why.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from flax import nnx

from examples.common.options import check_counts
from examples.common.results import table
from experiments.common.command import command
from experiments.common.nearest import float8_to_nearest
from experiments.common.report import report
from experiments.common.training import (
    History,
    Run,
    Task,
    in_bfloat16,
    initial_state,
    train_all,
)
from experiments.tasks.low_precision import TASKS
from optax_adamod import adamod, round_updates_stochastically

LEARNING_RATE, B2, B3 = 3e-3, 0.98, 0.99


def adamod_in(name: str | None) -> optax.GradientTransformation:
    dtypes: dict[str, Any] = {
        f"{average}_dtype": name for average in ("mu", "nu", "bound")
    }
    return adamod(LEARNING_RATE, b2=B2, b3=B3, **dtypes)


# Under the exponential warm-up, which has no third average.
ADAM = optax.adam(lambda count: LEARNING_RATE * (1 - B3 ** (count + 1)), b2=B2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: the optimizer, and whether weights are in bfloat16."""

    tx: optax.GradientTransformation
    bfloat16_weights: bool = False


CASES = {
    "float32": Case(adamod_in(None)),
    "bfloat16": Case(adamod_in("bfloat16")),
    "8 bits": Case(adamod_in("float8")),
    "8 bits, bfloat16 weights": Case(
        optax.chain(adamod_in("float8"), round_updates_stochastically()),
        bfloat16_weights=True,
    ),
    "8 bits, rounded to nearest": Case(float8_to_nearest(adamod_in(None))),
    "Adam": Case(ADAM),
    "Adam, bfloat16 weights": Case(ADAM, bfloat16_weights=True),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares dtypes of AdaMod's averages, and of the weights."""

    task: Literal["text", "words", "digits", "translation"] = "text"
    """What is trained."""
    steps: int | None = None
    """Training steps of each run; by default 3,000 on text, and 600 elsewhere."""
    early: int | None = None
    """An earlier step to report too."""
    seeds: int = 3
    """How often to repeat everything, from other weights and on other batches."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which of the rows."""
    output: Path = Path("outputs/low_precision")
    """Folder for checkpoints and tables; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        if self.steps is None:
            object.__setattr__(self, "steps", TASKS[self.task].steps)
        check_counts(self, "steps", "seeds")
        assert self.steps is not None
        if self.early is not None and not 1 <= self.early <= self.steps:
            raise ValueError(
                f"--early must be at least 1 and at most --steps, {self.steps}, got "
                f"{self.early}."
            )
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"--cases: {unknown} unknown; there are {[*CASES]}.")


def bytes_table(tasks: dict[str, Task], runs: dict[str, Run]) -> str:
    """Returns the bytes a parameter of each case, and with weights and gradients."""
    rows = []
    for name, run in runs.items():
        state = nnx.eval_shape(
            lambda run=run, name=name: initial_state(tasks[name], run)
        )
        count = sum(x.size for x in jax.tree.leaves(state.params))
        averages = [
            optax.tree.get(state.opt_state, field) for field in ("mu", "nu", "bound")
        ]
        held, trained = (
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / count
            for tree in (averages, state.params)
        )
        # Gradients have the weights' dtype.
        total = held + 2 * trained
        rows.append(
            {"averages": name, "state": f"{held:.2f}", "in all": f"{total:.2f}"}
        )
    return (
        "Bytes a parameter, of the averages and, with weights and gradients, in all:"
        f"\n\n{table(rows)}"
    )


def main(options: Options) -> History:
    assert options.steps is not None
    trained = TASKS[options.task]
    wide = trained.create(options.steps)
    narrow = in_bfloat16(wide)
    output = options.output / options.task
    history: History = {}
    tasks: dict[str, Task] = {}
    first: dict[str, Run] = {}
    for name in options.cases:
        case = CASES[name]
        tasks[name], tx = narrow if case.bfloat16_weights else wide, case.tx
        runs = [Run(name, tx, LEARNING_RATE, seed, B3) for seed in range(options.seeds)]
        first[name] = runs[0]
        history |= train_all(
            tasks[name], runs, output / "runs", {"steps": options.steps}
        )
    report(
        "low_precision", history, trained.metric, output,
        budgets=[x for x in (options.early, options.steps) if x is not None],
        rows=trained.rows,
        extra=[bytes_table(tasks, first)],
    )  # fmt: skip
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
