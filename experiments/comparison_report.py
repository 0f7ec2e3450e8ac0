"""The report of the comparison: a table of each task, profiles, loss over rate."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from examples.common.results import table
from experiments.comparison import (
    Compared,
    Result,
    better,
    judge,
    ratio,
    results,
)
from experiments.contestants import CONTESTANTS
from experiments.report import grouped, header
from experiments.training import History

Results = Mapping[str, Result | None]
NAME = "when_to_use"
WORST = 1.2  # times as bad as the best: as far as the profile is drawn
STYLES = ("-", "--", "-.", ":")


def report_task(name: str, compared: Compared, history: History, folder: Path) -> None:
    """Writes and prints the table of a task."""
    text = f"# {name}\n\n{header(NAME, history)}\n\n{task_table(compared, history)}\n"
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}")


def task_table(compared: Compared, history: History) -> str:
    """Returns what every contestant came to, the best one first."""
    found = results(compared, history)
    best = best_of(compared, found)
    rows = [
        table_row(name, x)
        for name, x in sorted(
            found.items(), key=lambda item: ratio_of(compared, best, item[1])
        )
    ]
    metric = compared.metric[:1].upper() + compared.metric[1:]
    return (
        f"{metric} at the best learning rate: the mean over seeds, the lowest and the "
        "highest. *Good rates* is the largest learning rate within 5 % of the best "
        "over the smallest. *Spike* is the highest loss over the running median, after "
        f"the first fifth.\n\n{table(rows)}"
    )


def table_row(name: str, x: Result | None) -> dict[str, str]:
    if x is None:
        return dict(
            zip(COLUMNS, (name, "", "none trains", "", "", "", ""), strict=True)
        )
    mean = f"{x.mean:.3f}"
    if x.lowest != x.highest:
        mean += f" ({x.lowest:.3f} to {x.highest:.3f})"
    edge = ", the last tried" if x.at_edge else ""
    cells = (
        name, f"{x.rate:g}{edge}", mean, f"{x.seeds}", f"{x.width:.3g}",
        f"{x.spike:.2f}", f"{x.failed} of {x.runs}",
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))


COLUMNS = ("optimizer", "lr", "mean", "seeds", "good rates", "spike", "diverged")


def best_of(compared: Compared, found: Results) -> float:
    means = [x.mean for x in found.values() if x is not None]
    return better(compared, means) if means else math.nan


def ratio_of(compared: Compared, best: float, x: Result | None) -> float:
    return math.inf if x is None else ratio(compared, best, x.mean)


def ratios(
    tasks: Mapping[str, Compared], histories: Mapping[str, History]
) -> dict[str, dict[str, float]]:
    """Returns by contestant and task how many times as bad it is as the best."""
    found: dict[str, dict[str, float]] = {}
    for task, compared in tasks.items():
        each = results(compared, histories[task])
        best = best_of(compared, each)
        for name, x in each.items():
            found.setdefault(name, {})[task] = ratio_of(compared, best, x)
    return found


def report_all(
    tasks: Mapping[str, Compared], histories: Mapping[str, History], folder: Path
) -> None:
    """Writes the table of all tasks, and the figure."""
    found = ratios(tasks, histories)
    # Only who took part everywhere has a profile.
    everywhere = {name: x for name, x in found.items() if len(x) == len(tasks)}
    rows = [
        {"optimizer": name}
        | {task: f"{x[task]:.3f}" if task in x else "" for task in tasks}
        | {"geometric mean": f"{mean_ratio(x):.3f}" if name in everywhere else ""}
        for name, x in found.items()
    ]
    rows.sort(key=lambda row: row["geometric mean"] or "~")
    runs = {
        run: rows for history in histories.values() for run, rows in history.items()
    }
    text = (
        f"# {NAME}\n\n{header(NAME, runs)}\n\nHow many times as bad as the best of all "
        f"contestants, at its own best learning rate:\n\n{table(rows)}\n"
    )
    (folder / f"{NAME}.md").write_text(text)
    draw(tasks, histories, everywhere, folder / f"{NAME}.png")


def mean_ratio(by_task: Mapping[str, float]) -> float:
    values = [*by_task.values()]
    return statistics.geometric_mean(values) if math.inf not in values else math.inf


def draw(
    tasks: Mapping[str, Compared],
    histories: Mapping[str, History],
    found: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Draws the profile over all tasks, and the first task's results by rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    draw_profile(left, found)
    first = next(iter(tasks))
    draw_rates(right, tasks[first], histories[first])
    right.set_title(first)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def style(name: str) -> dict[str, Any]:
    names = [*CONTESTANTS]
    index = names.index(name) if name in names else len(names)
    return {"color": f"C{index % 10}", "linestyle": STYLES[index // 10 % len(STYLES)]}


def draw_profile(axes: Axes, found: Mapping[str, Mapping[str, float]]) -> None:
    """Draws the share of tasks on which each is within a factor of the best."""
    factors = np.geomspace(1, WORST, 300)
    for name, by_task in found.items():
        values = np.array([*by_task.values()])
        share = (values[None] <= factors[:, None]).mean(axis=1)
        axes.plot(factors, share, label=name, **style(name))
    axes.set(
        xlabel="factor of the best", ylabel="share of the tasks", xlim=(1, WORST),
        title="Performance profile",
    )  # fmt: skip


def draw_rates(axes: Axes, compared: Compared, history: History) -> None:
    """Draws the mean result of each over the learning rate."""
    for name, by_rate in grouped(history).items():
        rates = sorted(by_rate)
        means = [
            statistics.fmean(judge(compared, history[run]).value for run in by_rate[r])
            for r in rates
        ]
        axes.plot(rates, means, marker=".", label=name, **style(name))
    axes.set(xscale="log", xlabel="learning rate", ylabel=compared.metric)
