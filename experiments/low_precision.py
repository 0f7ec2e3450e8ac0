"""Trains with averages in float32, bfloat16 and 8 bits, and weights in bfloat16.

A Transformer on text or on words, a ResNet on digits, or a translator:

    python -m experiments.low_precision --task text

Two rows round to nearest, which the library does not do: they are there to show why.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from flax import nnx

from examples.common.options import check_counts, check_decays
from examples.common.results import table
from examples.common.stdlib_text import FOLDER
from experiments.command import command
from experiments.low_precision_tasks import TASKS
from experiments.nearest import bfloat16_to_nearest, float8_to_nearest
from experiments.report import report
from experiments.training import (
    History,
    Run,
    Task,
    in_bfloat16,
    initial_state,
    train_all,
)
from optax_adamod import adamod, round_updates_stochastically

B2 = 0.98  # the usual one of Transformers


def adamod_of(**dtypes: Any) -> Callable[[float, float], optax.GradientTransformation]:
    """Returns what makes AdaMod, from the learning rate and ``b3``."""
    return lambda learning_rate, b3: adamod(learning_rate, b2=B2, b3=b3, **dtypes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: how the averages are stored, and whether weights are in bfloat16."""

    create: Callable[[float, float], optax.GradientTransformation]
    bfloat16_weights: bool = False


MU_BOUND = {"mu_dtype": "bfloat16", "bound_dtype": "bfloat16"}
FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}
CASES = {
    "float32": Case(adamod_of()),
    "bfloat16": Case(adamod_of(**MU_BOUND, nu_dtype="bfloat16")),
    "8 bits": Case(adamod_of(**FLOAT8)),
    "8 bits, bfloat16 weights": Case(
        lambda learning_rate, b3: optax.chain(
            adamod_of(**FLOAT8)(learning_rate, b3), round_updates_stochastically()
        ),
        bfloat16_weights=True,
    ),
    "8 bits, rounded to nearest": Case(
        lambda learning_rate, b3: float8_to_nearest(adamod_of()(learning_rate, b3))
    ),
    "8 bits, bfloat16 nu": Case(adamod_of(**FLOAT8 | {"nu_dtype": "bfloat16"})),
    "bfloat16 mu and bound": Case(adamod_of(**MU_BOUND)),
    "bfloat16, rounded to nearest": Case(
        lambda learning_rate, b3: bfloat16_to_nearest(adamod_of()(learning_rate, b3))
    ),
}
SHOWN = tuple(CASES)[:5]


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares dtypes of AdaMod's averages, and of the weights."""

    task: Literal["text", "words", "digits", "translation"] = "text"
    """What is trained."""
    steps: int | None = None
    """Training steps of each run; by default 3,000 on text, and 600 elsewhere."""
    early: int | None = None
    """An earlier step to report too."""
    width: int = 128
    """Features, of which 8 bits need a multiple of 128."""
    learning_rate: float = 3e-3
    """AdaMod's learning rate, constant."""
    b3: float = 0.99
    """AdaMod's b3; its bound opens over about 1 / (1 - b3) steps."""
    seeds: int = 3
    """How often to repeat everything, from other weights and on other batches."""
    cases: tuple[str, ...] = SHOWN
    """Which of the rows."""
    output: Path = Path("outputs/low_precision")
    """Folder for checkpoints, tables and figures; a run that was stopped goes on."""
    text: Path = FOLDER
    """Folder whose .py files are the text."""

    def __post_init__(self) -> None:
        if self.steps is None:
            object.__setattr__(self, "steps", TASKS[self.task][1])
        check_counts(self, "steps", "width", "seeds")
        assert self.steps is not None
        if self.early is not None and not 1 <= self.early <= self.steps:
            raise ValueError(
                f"--early must be at least 1 and at most --steps, {self.steps}, got "
                f"{self.early}."
            )
        check_decays(self, "b3")
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"--cases: {unknown} unknown; there are {[*CASES]}.")
        if not self.learning_rate > 0:
            raise ValueError(
                f"--learning-rate must be positive, got {self.learning_rate}."
            )


def bytes_table(tasks: dict[str, Task], runs: dict[str, Run]) -> str:
    """Returns the bytes a parameter: of the averages, and of all that is trained.

    Args:
      tasks: By case.
      runs: One by case.
    """
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
    create, _ = TASKS[options.task]
    trained = create(options.text, options.steps, options.width)
    narrow = in_bfloat16(trained.task)
    output = options.output / options.task
    settings = dataclasses.asdict(options)
    for name in ("seeds", "cases", "early", "output"):
        del settings[name]
    history: History = {}
    tasks: dict[str, Task] = {}
    first: dict[str, Run] = {}
    for name in options.cases:
        case = CASES[name]
        tasks[name] = narrow if case.bfloat16_weights else trained.task
        tx = case.create(options.learning_rate, options.b3)
        runs = [
            Run(name, tx, options.learning_rate, seed, options.b3)
            for seed in range(options.seeds)
        ]
        first[name] = runs[0]
        history |= train_all(tasks[name], runs, output / "runs", settings)
    report(
        "low_precision", history, trained.metric, output,
        budgets=[x for x in (options.early, options.steps) if x is not None],
        rows=trained.rows,
        extra=[bytes_table(tasks, first)],
    )  # fmt: skip
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
