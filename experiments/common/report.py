"""The report of an experiment: final values as CSV, a table in Markdown, figures."""

import csv
import datetime
import io
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from examples.common.results import machine, table, versions
from experiments.common.training import History, Row, Run

PACKAGES = ("jax", "optax", "flax", "numpy")
COLORS = 256  # of a figure, whose file is a third as large with a palette


def report(
    name: str,
    history: History,
    metric: str,
    folder: Path,
    *,
    budgets: Sequence[int] = (),
    rows: int = 1,
    extra: Sequence[str] = (),
) -> None:
    """Prints the table, and writes ``name.md`` and ``name.csv``.

    Args:
      name: Name of the experiment.
      history: The rows of every run.
      metric: The column that counts.
      folder: Where the files go.
      budgets: Steps at which to report; by default the last.
      rows: The last rows of which a final value is the mean.
      extra: Markdown that follows the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    budgets = budgets or [max(int(x[-1]["step"]) for x in history.values())]
    early = [until(history, steps) for steps in budgets]
    finals = [row for x in early for row in final_rows(x, metric, rows)]
    write_csv(finals, folder / f"{name}.csv")
    tables = [final_table(x, metric, rows) for x in early]
    text = "\n\n".join([header(name, history), *tables, *extra])
    (folder / f"{name}.md").write_text(f"# {name}\n\n{text}\n")
    print(f"\n{text}\n\nwritten: {folder / name}.md and .csv")


def header(name: str, history: History) -> str:
    """Returns what is needed to run it again: command, date, machine, versions."""
    minutes = sum(rows[-1]["seconds"] for rows in history.values()) / 60
    return f"{command_and_date(name)}, {minutes:.0f} minutes; {environment()}."


def command_and_date(name: str) -> str:
    command = shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])
    return f"`{command}`, {datetime.datetime.now(datetime.UTC).date().isoformat()}"


def environment(*packages: str) -> str:
    """Returns the machine and the versions, also of packages beside the usual."""
    used = versions((*PACKAGES, *packages)).items()
    return f"{machine()}; {', '.join(f'{name} {version}' for name, version in used)}"


def grouped(history: History) -> dict[str, dict[float, list[Run]]]:
    """Returns the runs by optimizer and learning rate."""
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in history:
        groups.setdefault(run.optimizer, {}).setdefault(run.learning_rate, []).append(
            run
        )
    return groups


def rates_of(history: History) -> list[float]:
    return sorted({run.learning_rate for run in history})


def until(history: History, step: int) -> History:
    """Returns the history as it was after the given step."""
    return {
        run: [x for x in rows if x["step"] <= step] for run, rows in history.items()
    }


def final_value(rows: Sequence[Row], metric: str, last: int) -> float:
    """Returns the mean of the metric over the last rows; of a diverged run, NaN."""
    if math.isnan(rows[-1]["loss"]):
        return math.nan
    return statistics.fmean(row[metric] for row in rows[-last:])


def final_table(history: History, metric: str, last: int) -> str:
    """Returns the metric at the end: mean, lowest and highest seed.

    Beside it the budget, for AdaMod in horizons of its bound.
    """
    rows = []
    for optimizer, by_rate in grouped(history).items():
        row = {"optimizer": optimizer}
        for rate in rates_of(history):
            values = [
                final_value(history[x], metric, last) for x in by_rate.get(rate, [])
            ]
            row[f"lr {rate:g}"] = spread(values) if values else ""
        runs = [run for runs in by_rate.values() for run in runs]
        row["steps"] = budget(runs[0], max(int(history[x][-1]["step"]) for x in runs))
        rows.append(row)
    seeds = len({run.seed for run in history})
    steps = max(int(x[-1]["step"]) for x in history.values())
    among = f", mean (lowest to highest) of {seeds} seeds" if seeds > 1 else ""
    title = metric[:1].upper() + metric[1:]
    return f"{title} after {steps:,} steps{among}:\n\n{table(rows)}"


def spread(values: Sequence[float]) -> str:
    """Returns mean, lowest and highest; a run that is NaN makes them no secret."""
    finite = [x for x in values if math.isfinite(x)]
    failed = len(values) - len(finite)
    text = f"{failed} of {len(values)} diverged" if failed else ""
    if not finite:
        return text
    shown = f"{statistics.fmean(finite):.3f}"
    if len(values) > 1:
        shown += f" ({min(finite):.3f} to {max(finite):.3f})"
    return f"{shown}, {text}" if text else shown


def budget(run: Run, steps: int) -> str:
    """Returns the steps, for AdaMod with the horizon of its bound, 1 / (1 - b3)."""
    if run.b3 is None:
        return f"{steps:,}"
    horizon = 1 / (1 - run.b3)
    return f"{steps:,}, {steps / horizon:.1f} horizons of {horizon:,.0f}"


def final_rows(history: History, metric: str, last: int) -> list[dict[str, Any]]:
    """Returns a row for each run: its last one, with the final value of the metric."""
    return [
        {
            "optimizer": run.optimizer,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            **rows[-1],
            metric: final_value(rows, metric, last),
        }
        for run, rows in history.items()
    ]


def write_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes the rows, numbers with five digits."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n"
        )
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()}
            )


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure with few colors, and closes it."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=100, format="png")
    plt.close(figure)
    image = Image.open(whole).convert("RGB")
    image.quantize(COLORS, Image.Quantize.MEDIANCUT).save(path, optimize=True)
