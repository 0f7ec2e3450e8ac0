"""When does AdaMod's bound pay, beside Adam under warm-ups that need no third average?

AdaMod and its rivals (:mod:`experiments.common.contestants`) on steady tasks
(:mod:`experiments.tasks.steady`), on tasks that change on the way
(:mod:`experiments.tasks.changing`) and with PPO (:mod:`experiments.tasks.ppo`). The
first stage trains every contestant at every learning rate, from one seed; the final one
trains each at its best three from all seeds:

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

from tqdm import tqdm

from examples.common.options import check_counts
from experiments.common.command import command
from experiments.common.comparison import Compared, best_rates
from experiments.common.comparison_report import report_all, report_task
from experiments.common.contestants import CONTESTANTS, Creates, at_rate, create
from experiments.common.together import finished_so_far, train_together
from experiments.common.training import History, Run, check_settings
from experiments.tasks import changing, ppo, steady
from experiments.tasks.steady import Size

GROUPS = {
    "steady tasks": steady.TASKS,
    "tasks that change": changing.TASKS,
    "games": ppo.TASKS,
}
TASKS = steady.TASKS | changing.TASKS | ppo.TASKS


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares AdaMod with its rivals, on many tasks."""

    stage: Literal["first", "final", "report"] = "first"
    """First: all learning rates, one seed. Final: that, and the best three learning
    rates of each contestant with all seeds. Report: what is finished, without more."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks, in their order."""
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    """Which optimizers, in their order."""
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
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json", dataclasses.asdict(options.size))
    path = folder / "runs.jsonl"
    seeds = range(compared.seeds)
    history: History = {}
    for name in compared.contestants():
        if name not in options.contestants:
            continue
        creates = create(CONTESTANTS[name], compared.schedule)
        first = runs_of(name, creates, compared.rates, seeds[:1])
        every = runs_of(name, creates, compared.rates, seeds)
        if options.stage != "report":
            found = train(compared, first, path)
            if options.stage == "final":
                best = best_rates(compared, found, name)
                train(compared, [x for x in every if x.learning_rate in best], path)
        history |= finished_so_far(every, path)
    return history


def train(compared: Compared, runs: list[Run], path: Path) -> History:
    """Trains runs of one contestant, unless the file has them."""
    steps = len(runs) * compared.task.steps
    with tqdm(total=steps, unit="step", mininterval=5) as progress:
        return train_together(compared.task, runs, path, progress, compared.train)


def main(options: Options) -> dict[str, History]:
    histories: dict[str, History] = {}
    tasks: dict[str, Compared] = {}
    for name in options.tasks:
        compared = TASKS[name](options.size)
        output = options.output / name
        history = train_task(compared, options, output)
        if history:
            tasks[name], histories[name] = compared, history
            report_task(name, compared, history, output)
            report_all(tasks, histories, options.output, GROUPS)
    return histories


if __name__ == "__main__":
    command(main, Options, __doc__)
