"""When does a language model leave the unigram plateau, and does it fall back?"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from examples.common.results import table
from experiments.common.report import (
    budget,
    final_value,
    grouped,
    rates_of,
    save_figure,
)
from experiments.common.training import History, Row

LEFT = 0.25  # nats below the plateau: a run has left it
BACK = 0.1  # nats below the plateau: a run that had left it is back


def crossings(rows: Sequence[Row], plateau: float) -> list[int]:
    """Returns the steps at which the loss left the plateau, fell back, left again..."""
    steps: list[int] = []
    for row in rows:
        below = len(steps) % 2 == 1
        crossed = (
            not row["loss"] < plateau - BACK if below else row["loss"] < plateau - LEFT
        )
        if crossed:
            steps.append(int(row["step"]))
    return steps


def path_of(rows: Sequence[Row], plateau: float) -> str:
    """Returns the crossings in words."""
    steps = crossings(rows, plateau)
    words = ["never left"] if not steps else []
    for index, step in enumerate(steps):
        words.append(f"{'back' if index % 2 else 'left'} {step}")
    if math.isnan(rows[-1]["loss"]):
        words.append(f"diverged {int(rows[-1]['step'])}")
    return ", ".join(words)


def plateau_table(history: History, plateau: float, tokens: str) -> str:
    """Returns when each run left the plateau, and when it fell back to it."""
    rows = []
    for optimizer, by_rate in grouped(history).items():
        for rate, runs in by_rate.items():
            steps = int(history[runs[0]][-1]["step"])
            rows.append(
                {
                    "optimizer": optimizer,
                    "lr": f"{rate:g}",
                    "each seed": "; ".join(path_of(history[x], plateau) for x in runs),
                    "steps": budget(runs[0], steps),
                }
            )
    return (
        f"The plateau is at {plateau:.3f} nats, the entropy of single {tokens}. The "
        f"steps at which a run left it, and fell back to it:\n\n{table(rows)}"
    )


def draw_heat_map(history: History, plateau: float, final: int, path: Path) -> None:
    """Draws the final loss, and when the runs left the plateau for good.

    Each cell is the mean over seeds; ``final`` is the rows of which a loss is the mean.
    """
    groups = grouped(history)
    rates = rates_of(history)
    losses = np.full((len(groups), len(rates)), np.nan)
    notes = np.full(losses.shape, "", object)
    for i, by_rate in enumerate(groups.values()):
        for j, rate in enumerate(rates):
            runs = [history[run] for run in by_rate.get(rate, [])]
            if not runs:
                continue
            losses[i, j] = np.mean([final_value(rows, "loss", final) for rows in runs])
            paths = [crossings(rows, plateau) for rows in runs]
            away = [steps[-1] for steps in paths if len(steps) % 2]
            back = sum(len(steps) > 0 and len(steps) % 2 == 0 for steps in paths)
            never = sum(not steps for steps in paths)
            notes[i, j] = "\n".join(
                text
                for text in (
                    f"left at {np.mean(away):.0f}" if away else "",
                    f"{back} of {len(runs)} fell back" if back else "",
                    f"{never} of {len(runs)} never left" if never else "",
                )
                if text
            )
    lowest = np.nanmin(losses, initial=plateau)
    figure, axis = plt.subplots(
        figsize=(2.6 + 1.7 * len(rates), 1 + 0.8 * len(groups)), layout="constrained"
    )
    image = axis.imshow(
        losses, cmap="viridis_r", aspect="auto", vmin=lowest, vmax=plateau
    )
    for (i, j), note in np.ndenumerate(notes):
        shade = float(np.asarray(image.norm(losses[i, j])))
        loss = f"{losses[i, j]:.2f}" if losses[i, j] > 0 else "diverged"
        axis.text(
            j, i, f"{loss}\n{note}" if note else "", ha="center", va="center",
            fontsize="small", color="white" if shade > 0.5 else "black",
        )  # fmt: skip
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_xlabel("learning rate")
    figure.colorbar(image, label="final loss, nats per byte", extend="max")
    save_figure(figure, path)
