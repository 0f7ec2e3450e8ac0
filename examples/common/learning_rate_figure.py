"""Draws losses, and learning rates as one histogram per step."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#CC79A7", "#009E73")
LINES = ("-", "--", "-.", ":", "-")
SMOOTHED = 20  # steps, over which the drawn loss is averaged


def plot(
    runs: dict[str, list[list[float]]],
    rates: dict[str, np.ndarray],
    bins: np.ndarray,
    path: Path,
) -> None:
    """Draws three panels.

    Args:
      runs: Losses by optimizer, seed and step.
      rates: Of a run of two of the optimizers, coordinates by step and bin.
      bins: Edges of the bins, in powers of ten, a tenth of one apart.
      path: Where to save the figure.
    """
    figure, panels = plt.subplot_mosaic(
        [["losses", "losses"], ["first", "second"]],
        figsize=(8.3, 7.5),
        layout="constrained",
        height_ratios=(1.1, 1),
    )
    draw_losses(panels["losses"], runs)
    shares = {name: x / x.sum(axis=1, keepdims=True) for name, x in rates.items()}
    top = max(x.max() for x in shares.values())
    left, right = panels["first"], panels["second"]
    for axes, (name, share) in zip((left, right), shares.items(), strict=True):
        steps = 0.5 + np.arange(len(share) + 1)
        axes.pcolormesh(steps, 10.0**bins, share.T, cmap="magma_r", vmin=0, vmax=top)
        axes.set(yscale="log", xlabel="step", title=f"Learning rates of {name}")
    left.set_ylabel("learning rate, parameter per gradient")
    right.sharey(left)
    right.tick_params(labelleft=False)
    figure.colorbar(
        left.collections[0],
        ax=[left, right],
        location="bottom",
        aspect=50,
        format=PercentFormatter(1, decimals=0),
        label="share of the coordinates in each tenth of a decade of learning rate",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Returns the mean over the last ``SMOOTHED`` steps, or all steps so far."""
    total = np.pad(losses.cumsum(axis=1), ((0, 0), (SMOOTHED, 0)))
    counts = np.minimum(1 + np.arange(losses.shape[1]), SMOOTHED)
    return (total[:, SMOOTHED:] - total[:, :-SMOOTHED]) / counts


def draw_losses(axes: Axes, runs: dict[str, list[list[float]]]) -> None:
    """Draws the running mean loss over the seeds, and their range as a band."""
    for (name, losses), colour, line in zip(runs.items(), COLOURS, LINES, strict=True):
        curves = running_mean(np.asarray(losses))
        steps = 1 + np.arange(curves.shape[1])
        axes.plot(steps, curves.mean(axis=0), line, color=colour, label=name)
        axes.fill_between(
            steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0
        )
    axes.set(
        xlabel="step",
        ylabel=f"training loss, nats per byte\n(mean of the last {SMOOTHED} steps)",
        title="Post-LN Transformer, one learning rate, no warm-up unless named",
        ylim=(None, 4.5),
    )
    axes.margins(x=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
