"""The report of the comparison: a table of each task, profiles, loss over rate."""

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from examples.common.results import table
from experiments.common.comparison import (
    TUNED,
    Compared,
    Result,
    judge,
    judged_by_rate,
    results,
)
from experiments.common.contestants import B3, CONTESTANTS
from experiments.common.report import header, save_figure, write_csv
from experiments.common.training import History

Ratios = Mapping[str, Mapping[str, float]]  # by contestant and task
Groups = Mapping[str, Container[str]]  # of tasks, by what they have in common
NAME = "when_to_use"
ADAMOD = f"AdaMod, b3 {B3:g}"
NEXT = 1.01  # times as bad: so near counts as equal
TELLING = "post_ln_12"  # the task whose results are drawn by learning rate
WORST = 1.1  # times as bad as the best: as far as the profile is drawn
STYLES = ("-", "--", "-.", ":")
COLUMNS = ("optimizer", "lr", "mean", "seeds", "good rates", "spike", "diverged")


def report_task(name: str, compared: Compared, history: History, folder: Path) -> None:
    """Writes and prints the table of a task."""
    text = f"# {name}\n\n{header(NAME, history)}\n\n{task_table(compared, history)}\n"
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}")


def task_table(compared: Compared, history: History) -> str:
    """Returns what every contestant came to, the best one first."""
    found = results(compared, history)
    ratios = ratios_of(compared, found)
    order = sorted(found, key=ratios.__getitem__)
    rows = [table_row(name, found[name]) for name in order]
    metric = compared.metric[:1].upper() + compared.metric[1:]
    return (
        f"{metric} at the best learning rate: the mean over seeds, the lowest and the "
        "highest. *Good rates* is the largest learning rate within 5 % of the best "
        "over the smallest. *Spike* is the highest loss over the running median, after "
        f"the first fifth.\n\n{table(rows)}"
    )


def table_row(name: str, x: Result | None) -> dict[str, str]:
    cells = (name, "", "none trains", "", "", "", "")
    if x is not None:
        mean = f"{x.mean:.3f}"
        if x.lowest != x.highest:
            mean += f" ({x.lowest:.3f} to {x.highest:.3f})"
        edge = ", the last tried" if x.at_edge else ""
        cells = (
            name, f"{x.rate:g}{edge}", mean, f"{x.seeds}", f"{x.width:.3g}",
            f"{x.spike:.2f}", f"{x.failed} of {x.runs}",
        )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))


def ratios_of(
    compared: Compared, found: Mapping[str, Result | None]
) -> dict[str, float]:
    """Returns by contestant how many times as bad it is as the best of a task."""
    means = {name: math.nan if x is None else x.mean for name, x in found.items()}
    fine = [x for x in means.values() if math.isfinite(x)]
    best = compared.better(fine) if fine else math.nan
    return {name: compared.ratio(best, mean) for name, mean in means.items()}


def report_all(
    tasks: Mapping[str, Compared],
    histories: Mapping[str, History],
    folder: Path,
    groups: Groups,
) -> None:
    """Writes the tables of all tasks, what every run came to, and the figure."""
    every = {task: results(tasks[task], x) for task, x in histories.items()}
    ratios: dict[str, dict[str, float]] = {}
    for task, found in every.items():
        for name, x in ratios_of(tasks[task], found).items():
            ratios.setdefault(name, {})[task] = x
    runs = {run: x for history in histories.values() for run, x in history.items()}
    parts = [
        f"# {NAME}",
        header(NAME, runs),
        "Over all tasks that a contestant took part in. *Times as bad*: as the best "
        "contestant of the task, each at its own best learning rate, the geometric "
        f"mean; beside it of {', '.join(groups)} alone. *Near*: within 1 %. *AdaMod "
        "ahead, behind*: on how many tasks AdaMod with b3 0.99 is more than 1 % "
        "better, and worse. *Good rates*: the largest learning rate within 5 % of its "
        "best over the smallest, the geometric mean. *Spike*: times as high as the "
        "lowest of the task, the geometric mean.",
        table(summary_table(every, ratios, groups)),
        "Times as bad as the best contestant of the task:",
        table(ratios_table(ratios, [*histories])),
    ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n")
    write_csv(
        (
            {"task": task, "optimizer": run.optimizer}
            | {"learning_rate": run.learning_rate, "seed": run.seed}
            | judge(tasks[task], rows)._asdict()
            for task, history in histories.items()
            for run, rows in history.items()
        ),
        folder / f"{NAME}.csv",
    )
    draw(tasks, histories, ratios, folder / f"{NAME}.png")


def summary_table(
    every: Mapping[str, Mapping[str, Result | None]], ratios: Ratios, groups: Groups
) -> list[dict[str, str]]:
    """Returns for each contestant what it came to over all tasks, best first."""
    each: dict[str, list[Result]] = {name: [] for name in ratios}
    spikes: dict[str, list[float]] = {name: [] for name in ratios}
    for found in every.values():
        came = {name: x for name, x in found.items() if x is not None}
        lowest = min((x.spike for x in came.values()), default=0)
        for name, x in came.items():
            each[name].append(x)
            if lowest > 0:
                spikes[name].append(x.spike / lowest)
    return [
        {
            "optimizer": name,
            "tasks": f"{len(by_task)}",
            "times as bad": f"{geometric_mean(by_task.values()):.3f}",
            **{
                group: f"{geometric_mean(of_group):.3f}" if of_group else ""
                for group, names in groups.items()
                for of_group in [[r for x, r in by_task.items() if x in names]]
            },
            "worst": f"{max(by_task.values()):.3f}",
            "near the best": f"{sum(x <= NEXT for x in by_task.values())}",
            "AdaMod ahead, behind": ahead_and_behind(ratios, name),
            "good rates": f"{geometric_mean(x.width for x in each[name]):.1f}",
            "spike": f"{geometric_mean(spikes[name]):.2f}",
            "diverged": f"{sum(x.failed for x in each[name])} of "
            f"{sum(x.runs for x in each[name])}",
        }
        for name, by_task in sorted(
            ratios.items(),
            key=lambda item: (-len(item[1]), geometric_mean(item[1].values())),
        )
    ]


def ahead_and_behind(found: Ratios, rival: str) -> str:
    """Returns on how many tasks AdaMod with b3 0.99 is clearly better, and worse."""
    adamod = found.get(ADAMOD, {})
    if rival == ADAMOD or not adamod:
        return ""
    both = [(adamod[task], x) for task, x in found[rival].items() if task in adamod]
    ahead = sum(x > NEXT * mine for mine, x in both)
    behind = sum(mine > NEXT * x for mine, x in both)
    return f"{ahead}, {behind} of {len(both)}"


def ratios_table(found: Ratios, tasks: Sequence[str]) -> list[dict[str, str]]:
    """Returns a row for each task, a column for each contestant."""
    rows = [
        {"task": task}
        | {name: f"{x[task]:.3f}" if task in x else "" for name, x in found.items()}
        for task in tasks
    ]
    mean = {
        name: f"{geometric_mean(x.values()):.3f}" if len(x) == len(tasks) else ""
        for name, x in found.items()
    }
    return [*rows, {"task": "geometric mean"} | mean]


def geometric_mean(values: Any) -> float:
    """Returns the mean, infinite if one is; of nothing, NaN."""
    values = [*values]
    if math.inf in values:
        return math.inf
    return statistics.geometric_mean(values) if values else math.nan


def draw(
    tasks: Mapping[str, Compared],
    histories: Mapping[str, History],
    found: Ratios,
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
    save_figure(figure, path)


def style(name: str) -> dict[str, Any]:
    names = [*CONTESTANTS]
    index = names.index(name) if name in names else len(names)
    return {
        "color": f"C{index % 10}",
        "linestyle": STYLES[index // 10 % len(STYLES)],
        "linewidth": 3 if name == ADAMOD else 1.5,
    }


def draw_profile(axes: Axes, found: Ratios) -> None:
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
    for name, by_rate in judged_by_rate(compared, history).items():
        line = lines.setdefault(TUNED if CONTESTANTS[name].tuned else name, {})
        for rate, judged in by_rate.items():
            mean = statistics.fmean(x.value for x in judged)
            line[rate] = compared.better([mean, line.get(rate, mean)])
    for name, line in lines.items():
        rates = sorted(line)
        means = [line[rate] for rate in rates]
        axes.plot(rates, means, marker=".", label=name, **style(name))
    axes.set(xscale="log", xlabel="learning rate", ylabel=compared.metric)
