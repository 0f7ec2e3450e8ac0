"""The report of the comparison: a table of each task, profiles, loss over rate."""

import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from examples.common.results import table
from experiments.comparison import (
    TUNED,
    Compared,
    Result,
    better,
    judge,
    ratio,
    results,
)
from experiments.contestants import B3, CONTESTANTS
from experiments.report import grouped, header
from experiments.training import History, Run

Results = Mapping[str, Result | None]
Groups = Mapping[str, Container[str]]  # of tasks, by what they have in common
NAME = "when_to_use"
ADAMOD = f"AdaMod, b3 {B3:g}"
NEXT = 1.01  # times as bad: so near counts as equal
TELLING = "post_ln_12"  # the task whose results are drawn by learning rate
WORST = 1.1  # times as bad as the best: as far as the profile is drawn
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
    for task, history in histories.items():
        compared = tasks[task]
        each = results(compared, history)
        best = best_of(compared, each)
        for name, x in each.items():
            found.setdefault(name, {})[task] = ratio_of(compared, best, x)
    return found


def chosen(
    histories: Mapping[str, History], keep: Callable[[Run], bool]
) -> dict[str, History]:
    """Returns those runs of every task that are kept."""
    found = {
        task: {run: rows for run, rows in history.items() if keep(run)}
        for task, history in histories.items()
    }
    return {task: history for task, history in found.items() if history}


def of_common_seeds(history: History) -> History:
    """Returns the runs of those seeds that every contestant has."""
    seeds = [
        {run.seed for runs in by_rate.values() for run in runs}
        for by_rate in grouped(history).values()
    ]
    common = set.intersection(*seeds)
    return {run: rows for run, rows in history.items() if run.seed in common}


def is_candidate(run: Run) -> bool:
    return CONTESTANTS[run.optimizer].candidate


def report_all(
    tasks: Mapping[str, Compared],
    histories: Mapping[str, History],
    folder: Path,
    groups: Groups,
) -> None:
    """Writes the tables of all tasks, and the figure."""
    runs = {run: x for history in histories.values() for run, x in history.items()}
    parts = [f"# {NAME}", header(NAME, runs)]
    main = chosen(histories, lambda run: not is_candidate(run))
    if main:
        summary = summary_table(tasks, main, groups)
        found = ratios(tasks, main)
        parts += [
            "Over all tasks that a contestant took part in. *Times as bad*: as the "
            "best contestant of the task, each at its own best learning rate, the "
            f"geometric mean; beside it of {', '.join(groups)} alone. *Near*: within "
            "1 %. *AdaMod ahead, behind*: on how many tasks AdaMod with b3 0.99 is "
            "more than 1 % better, and worse. *Good rates*: the largest learning rate "
            "within 5 % of "
            "its best over the smallest, the geometric mean. *Spike*: times as high "
            "as the lowest of the task, the geometric mean.",
            table(summary),
            "Times as bad as the best contestant of the task:",
            table(ratios_table(found, [*main])),
        ]
        draw(tasks, main, found, folder / f"{NAME}.png")
    tried = [
        task for task, history in histories.items() if any(map(is_candidate, history))
    ]
    if tried:
        alike = {task: of_common_seeds(histories[task]) for task in tried}
        parts += [
            "With the other bounds, from the seeds that all have:",
            table(ratios_table(ratios(tasks, alike), tried)),
        ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n")


def summary_table(
    tasks: Mapping[str, Compared], histories: Mapping[str, History], groups: Groups
) -> list[dict[str, str]]:
    """Returns for each contestant what it came to over all tasks, best first."""
    found = ratios(tasks, histories)
    each: dict[str, list[Result]] = {name: [] for name in found}
    spikes: dict[str, list[float]] = {name: [] for name in found}
    for task, history in histories.items():
        came = {
            name: x
            for name, x in results(tasks[task], history).items()
            if x is not None
        }
        lowest = min((x.spike for x in came.values()), default=0)
        for name, x in came.items():
            each[name].append(x)
            if lowest > 0:
                spikes[name].append(x.spike / lowest)
    return [
        {
            "optimizer": name,
            "tasks": f"{len(by_task)}",
            "times as bad": f"{mean_ratio(by_task):.3f}",
            **{
                group: f"{mean_ratio(of_group):.3f}" if of_group else ""
                for group, names in groups.items()
                for of_group in [{x: r for x, r in by_task.items() if x in names}]
            },
            "worst": f"{max(by_task.values()):.3f}",
            "near the best": f"{sum(x <= NEXT for x in by_task.values())}",
            "AdaMod ahead, behind": ahead_and_behind(found, name),
            "good rates": f"{geometric_mean([x.width for x in each[name]]):.1f}",
            "spike": f"{geometric_mean(spikes[name]):.2f}",
            "diverged": f"{sum(x.failed for x in each[name])} of "
            f"{sum(x.runs for x in each[name])}",
        }
        for name, by_task in sorted(
            found.items(), key=lambda item: (-len(item[1]), mean_ratio(item[1]))
        )
    ]


def ahead_and_behind(found: Mapping[str, Mapping[str, float]], rival: str) -> str:
    """Returns on how many tasks AdaMod with b3 0.99 is clearly better, and worse."""
    adamod = found.get(ADAMOD, {})
    if rival == ADAMOD or not adamod:
        return ""
    both = [(adamod[task], x) for task, x in found[rival].items() if task in adamod]
    ahead = sum(x > NEXT * mine for mine, x in both)
    behind = sum(mine > NEXT * x for mine, x in both)
    return f"{ahead}, {behind} of {len(both)}"


def ratios_table(
    found: Mapping[str, Mapping[str, float]], tasks: Sequence[str]
) -> list[dict[str, str]]:
    """Returns a row for each task, a column for each contestant."""
    rows = [
        {"task": task}
        | {name: f"{x[task]:.3f}" if task in x else "" for name, x in found.items()}
        for task in tasks
    ]
    everywhere = [name for name, x in found.items() if len(x) == len(tasks)]
    mean = {
        name: f"{mean_ratio(found[name]):.3f}" if name in everywhere else ""
        for name in found
    }
    return [*rows, {"task": "geometric mean"} | mean]


def mean_ratio(by_task: Mapping[str, float]) -> float:
    return geometric_mean([*by_task.values()])


def geometric_mean(values: Sequence[float]) -> float:
    """Returns the mean, infinite if one is; of nothing, NaN."""
    if math.inf in values:
        return math.inf
    return statistics.geometric_mean(values) if values else math.nan


def draw(
    tasks: Mapping[str, Compared],
    histories: Mapping[str, History],
    found: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Draws the profile over all tasks, and one task's results by rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    # Only who took part everywhere has a profile.
    draw_profile(
        left, {name: x for name, x in found.items() if len(x) == len(histories)}
    )
    shown = TELLING if TELLING in histories else next(iter(histories))
    draw_rates(right, tasks[shown], histories[shown])
    right.set_title(shown)
    labelled = {
        label: handle
        for axes in (left, right)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [*labelled.values()], [*labelled], loc="outside lower center", ncols=3,
        fontsize="small",
    )  # fmt: skip
    figure.savefig(path, dpi=100)
    plt.close(figure)


def style(name: str) -> dict[str, Any]:
    names = [*CONTESTANTS]
    index = names.index(name) if name in names else len(names)
    return {
        "color": f"C{index % 10}",
        "linestyle": STYLES[index // 10 % len(STYLES)],
        "linewidth": 3 if name == ADAMOD else 1.5,
    }


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
    """Draws the mean result of each over the learning rate, the best of the tuned."""
    lines: dict[str, dict[float, float]] = {}
    for name, by_rate in grouped(history).items():
        line = lines.setdefault(TUNED if CONTESTANTS[name].tuned else name, {})
        for rate, runs in by_rate.items():
            values = [judge(compared, history[run]).value for run in runs]
            mean = statistics.fmean(values)
            line[rate] = better(compared, [mean, line.get(rate, mean)])
    for name, line in lines.items():
        rates = sorted(line)
        means = [line[rate] for rate in rates]
        axes.plot(rates, means, marker=".", label=name, **style(name))
    axes.set(xscale="log", xlabel="learning rate", ylabel=compared.metric)
