"""When does AdaMod's bound pay, beside Adam under warm-ups that need no third average?

Seven rivals, AdaMod and other bounds (:mod:`experiments.contestants`) on steady tasks
(:mod:`experiments.compared_tasks`) and on tasks that change on the way
(:mod:`experiments.changing_tasks`). The first stage trains every contestant at every
learning rate, from one seed; the final one trains each at its best three from three:

    python -m experiments.when_to_use --stage first
    python -m experiments.when_to_use --stage final
    python -m experiments.when_to_use --stage report

The last reports what is finished so far. A run that was stopped goes on. Two processes
may share a folder if they have no task in common.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from examples.common.options import check_counts
from experiments import changing_tasks, compared_tasks
from experiments.command import command
from experiments.compared_tasks import Size
from experiments.comparison import Compared, best_rates
from experiments.comparison_report import report_all, report_task
from experiments.contestants import CONTESTANTS, Creates, at_rate, create
from experiments.training import History, Run, done_so_far, train_all

TASKS = compared_tasks.TASKS | changing_tasks.TASKS


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares AdaMod with rivals and with other bounds, on many tasks."""

    stage: Literal["first", "final", "report"] = "first"
    """First: all learning rates, one seed. Final: that, and the best three learning
    rates of each contestant with all seeds. Report: what is finished, without more."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks, in their order."""
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    """Which optimizers, in their order."""
    rates: tuple[float, ...] = ()
    """Learning rates, by default those of each task."""
    size: Size = dataclasses.field(default_factory=Size)
    output: Path = Path("outputs/when_to_use")
    """Folder for checkpoints, tables and figures, with a folder for each task."""

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("contestants", CONTESTANTS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"--{name}: {unknown} unknown; there are {[*known]}.")
        check_counts(self.size, "unit", "width")


def runs_of(
    name: str, creates: Creates, rates: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """Returns the runs of a contestant."""
    b3 = CONTESTANTS[name].b3
    return [
        Run(name, at_rate(creates, rate), rate, seed, b3)
        for rate in rates
        for seed in seeds
    ]


def train_task(compared: Compared, options: Options, folder: Path) -> History:
    """Trains what the stage asks for, and returns all that is finished."""
    settings = dataclasses.asdict(options.size)
    seeds = range(compared.seeds)
    history: History = {}
    for name in compared.contestants():
        if name not in options.contestants:
            continue
        creates = create(CONTESTANTS[name], compared.schedule)
        first = runs_of(name, creates, compared.rates, seeds[:1])
        every = runs_of(name, creates, compared.rates, seeds)
        if options.stage != "report":
            found = train_all(compared.task, first, folder, settings)
            if options.stage == "final":
                best = best_rates(compared, found, name)
                more = [run for run in every if run.learning_rate in best]
                train_all(compared.task, more, folder, settings)
        history |= done_so_far(compared.task, every, folder)
    return history


def main(options: Options) -> dict[str, History]:
    histories: dict[str, History] = {}
    tasks: dict[str, Compared] = {}
    for name in options.tasks:
        compared = TASKS[name](options.size)
        if options.rates:
            compared = dataclasses.replace(compared, rates=options.rates)
        output = options.output / name
        history = train_task(compared, options, output / "runs")
        if history:
            tasks[name], histories[name] = compared, history
            report_task(name, compared, history, output)
            report_all(tasks, histories, options.output)
    return histories


if __name__ == "__main__":
    command(main, Options, __doc__)
