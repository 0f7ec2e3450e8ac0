"""A task of the comparison of optimizers, and how a run of it is judged."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from experiments.common.contestants import CONTESTANTS, Schedule
from experiments.common.report import grouped
from experiments.common.together import Trains, go_on_together
from experiments.common.training import History, Row, Task

Spans = Sequence[tuple[int, int]]  # steps from and up to, counted from 0

GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
NEAR = 0.05  # of the best: a learning rate so near to it is a good one
SETTLED = 0.2  # of the budget, after which a spike is a spike
TUNED = "Adam, tuned linear warm-up"  # the best of several lengths
MEDIAN = 8  # rows, over whose losses a spike rises


@dataclasses.dataclass(frozen=True)
class Compared:
    """A task with all that contestants share.

    Attributes:
      task: What is trained.
      schedule: How.
      counted: Spans of steps; the mean of the metric over their rows is the result.
      metric: The column that counts.
      higher_is_better: Of the metric.
      rates: The learning rates of every contestant.
      left_out: Spans of steps whose losses are another task's, which count for nothing.
      seeds: Of the final stage.
      train: Trains runs of one seed.
    """

    task: Task
    schedule: Schedule
    counted: Spans
    metric: str = "loss"
    higher_is_better: bool = False
    rates: tuple[float, ...] = GRID
    left_out: Spans = ()
    seeds: int = 3
    train: Trains = go_on_together

    def contestants(self) -> list[str]:
        """Returns who takes part: who warms up at every jump, if there are jumps."""
        jumps = self.schedule.since_jump is not None
        return [name for name, x in CONTESTANTS.items() if jumps or not x.at_jumps]

    def better(self, values: Iterable[float]) -> float:
        return max(values) if self.higher_is_better else min(values)

    def ratio(self, best: float, value: float) -> float:
        """Returns how many times as bad a value is as the best, 1 or more."""
        if not math.isfinite(value):
            return math.inf
        return best / value if self.higher_is_better else value / best


class Judged(NamedTuple):
    """What a run came to; NaN if it diverged."""

    value: float
    spike: float  # the highest loss over the running median, after the first fifth


def inside(row: Row, spans: Spans) -> bool:
    """Whether the last step of a row is one of the spans', which count from 0."""
    return any(start < row["step"] <= end for start, end in spans)


def judge(compared: Compared, rows: Sequence[Row]) -> Judged:
    """Returns the result of one run."""
    if math.isnan(rows[-1]["loss"]):
        return Judged(math.nan, math.nan)
    rows = [row for row in rows if not inside(row, compared.left_out)]
    found = [
        row[compared.metric]
        for row in rows
        if compared.metric in row and inside(row, compared.counted)
    ]
    rises = [0.0]
    for index, row in enumerate(rows):
        before = [x["loss"] for x in rows[max(0, index - MEDIAN) : index]]
        if before and row["step"] > SETTLED * compared.task.steps:
            rises.append(row["highest loss"] - statistics.median(before))
    return Judged(statistics.fmean(found), max(rises))


class Result(NamedTuple):
    """What a contestant came to on a task, at its best learning rate."""

    rate: float
    mean: float
    lowest: float
    highest: float
    seeds: int
    width: float  # the largest good learning rate over the smallest
    spike: float  # of all seeds at the best learning rate
    failed: int  # runs, at any learning rate
    runs: int
    at_edge: bool  # the best learning rate is the grid's first or last


def result(compared: Compared, by_rate: Mapping[float, list[Judged]]) -> Result | None:
    """Returns the result of a contestant, None if every learning rate failed.

    A learning rate at which a seed diverged has no mean. Among those that have one,
    those with the most seeds compete for the best.
    """
    means = {
        rate: statistics.fmean(x.value for x in judged)
        for rate, judged in by_rate.items()
        if all(math.isfinite(x.value) for x in judged)
    }
    everyone = [x for judged in by_rate.values() for x in judged]
    failed = sum(not math.isfinite(x.value) for x in everyone)
    if not means:
        return None
    most = max(len(by_rate[rate]) for rate in means)
    competing = {r: mean for r, mean in means.items() if len(by_rate[r]) == most}
    best = compared.better(competing.values())
    rate = next(r for r, mean in competing.items() if mean == best)
    good = [r for r, mean in means.items() if compared.ratio(best, mean) <= 1 + NEAR]
    values = [x.value for x in by_rate[rate]]
    return Result(
        rate, best, min(values), max(values), most, max(good) / min(good),
        max(x.spike for x in by_rate[rate]), failed, len(everyone),
        rate in (min(compared.rates), max(compared.rates)),
    )  # fmt: skip


def judged_by_rate(
    compared: Compared, history: History
) -> dict[str, dict[float, list[Judged]]]:
    """Returns what every run came to, by contestant and learning rate."""
    return {
        name: {
            rate: [judge(compared, history[run]) for run in runs]
            for rate, runs in by_rate.items()
        }
        for name, by_rate in grouped(history).items()
    }


def results(compared: Compared, history: History) -> dict[str, Result | None]:
    """Returns the result of every contestant, the best of the tuned warm-ups as one."""
    found = {
        name: result(compared, x)
        for name, x in judged_by_rate(compared, history).items()
    }
    tuned = [found.pop(name) for name in [*found] if CONTESTANTS[name].tuned]
    if tuned:
        fine = [x for x in tuned if x is not None]
        best = compared.better([x.mean for x in fine]) if fine else None
        found[TUNED] = next((x for x in fine if x.mean == best), None)
    return found


def best_rates(
    compared: Compared, history: History, contestant: str, count: int = 3
) -> list[float]:
    """Returns the learning rates at which the first seed did best, best first.

    What diverged comes last, so that all contestants have as many.
    """
    values = {
        run.learning_rate: judge(compared, rows).value
        for run, rows in history.items()
        if run.optimizer == contestant and run.seed == 0
    }
    sign = -1 if compared.higher_is_better else 1
    order = sorted(
        values, key=lambda r: sign * values[r] if values[r] == values[r] else math.inf
    )
    return order[:count]
