"""Does a bound that starts with a coordinate's first gradient pay for late starters?

AdaMod as published averages rates of ``1 / eps`` while a coordinate's second moment is
exactly zero, so its bound does not hold once the gradients come. With the rule these
rates count as zero, and each coordinate warms up from its own first gradient. Both
beside rivals on tasks of late starters (:mod:`experiments.tasks.late`):

    python -m experiments.late_starters

One seed of all tasks comes first, then the next. A command that was stopped goes on.
"""

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from tqdm import tqdm

from examples.common.options import check_counts, check_heads
from examples.common.results import table
from experiments.common import contestants
from experiments.common.command import command
from experiments.common.contestants import (
    Contestant,
    Creates,
    Schedule,
    at_rate,
    create,
)
from experiments.common.report import (
    command_and_date,
    environment,
    save_figure,
    spread,
)
from experiments.common.together import go_on_together
from experiments.common.training import Run, Task, check_settings
from experiments.tasks.late import TASKS, Late, Size
from experiments.tasks.text import B2, HEADS

PUBLISHED, RULE = "AdaMod, published", "AdaMod, with the rule"
EXPONENTIAL = "Adam, exponential warm-up"
TUNED = "Adam, tuned linear warm-up"
LENGTHS = (1 / 12, 1 / 6, 1 / 3)  # of the run's, of the warm-ups of which one counts
BELOW = 0.25  # nats under the plateau, where a run counts as one that trains


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares AdaMod with and without the rule with its rivals."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks, in their order."""
    seeds: int = 5
    """How often to repeat every task, at most."""
    size: Size = dataclasses.field(default_factory=Size)
    output: Path = Path("experiments/results/late_starters")
    """Folder for runs, tables and the figure."""

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"--tasks: {unknown} unknown; there are {[*TASKS]}.")
        check_counts(self.size, "steps", "depth", "width", "pretraining")
        check_heads(self.size, HEADS)


class Key(NamedTuple):
    """Which run: a row of the file without its loss."""

    task: str
    optimizer: str
    learning_rate: float
    seed: int


Losses = dict[Key, float]
BySeed = dict[int, float]
Found = dict[str, list[BySeed]]  # of each optimizer, at each learning rate


def optimizers(late: Late) -> dict[str, Contestant]:
    """Returns who takes part; of the linear warm-ups the best one counts."""
    linear = {
        linear_name(n): Contestant(contestants.adam, contestants.linear(n), tuned=True)
        for n in lengths(late)
    }
    return {
        PUBLISHED: contestants.plain_adamod(late.b3, rule=False),
        RULE: contestants.plain_adamod(late.b3, rule=True),
        EXPONENTIAL: Contestant(contestants.adam, contestants.exponential(late.b3)),
        **linear,
        "RAdam": Contestant(contestants.radam),
        "Adam": Contestant(contestants.adam),
    }


def lengths(late: Late) -> list[int]:
    return [max(1, round(x * late.task.steps)) for x in LENGTHS]


def linear_name(steps: int) -> str:
    return f"Adam, linear warm-up over {steps}"


def read(path: Path) -> Losses:
    """Returns the final loss of every run in the file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            Key(task, optimizer, float(rate), int(seed)): float(loss)
            for task, optimizer, rate, seed, loss in list(csv.reader(file))[1:]
        }


def add(path: Path, losses: Losses) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow([*Key._fields, "loss"])
        writer.writerows([*key, f"{loss:.5g}"] for key, loss in losses.items())


def final_losses(
    task: Task, creates: Creates, rates: Sequence[float], seed: int, progress: tqdm
) -> list[float]:
    """Returns the mean loss of the last steps at each rate, NaN of what diverged."""
    runs = [Run("", at_rate(creates, rate), rate, seed) for rate in rates]
    history = go_on_together(task, runs, progress)
    return [rows[-1]["loss"] for rows in history.values()]


def best_length(late: Late, name: str, losses: Losses) -> str | None:
    """Returns which linear warm-up was best for the first seed, once all are known."""
    found = {}
    for linear in map(linear_name, lengths(late)):
        values = [losses.get(Key(name, linear, rate, 0)) for rate in late.rates]
        if None in values:
            return None
        found[linear] = min(x if x == x else math.inf for x in values if x is not None)
    return min(found, key=found.__getitem__)


def missing(
    tasks: dict[str, Late], seeds: int, path: Path
) -> Iterator[tuple[str, str, int, list[float]]]:
    """Yields task, optimizer, seed and rates of what no row has, seed by seed.

    The first seed chooses the length of the linear warm-up, and the others train that.
    """
    for seed in range(seeds):
        for name, late in tasks.items():
            for optimizer, contestant in optimizers(late).items():
                losses = read(path)
                chosen = best_length(late, name, losses)
                if seed > 0 and contestant.tuned and optimizer != chosen:
                    continue
                rates = [
                    x for x in late.rates if Key(name, optimizer, x, seed) not in losses
                ]
                if seed < late.seeds and rates:
                    yield name, optimizer, seed, rates


def main(options: Options) -> Losses:
    options.output.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(options.size)
    check_settings(options.output / "settings.json", settings)
    path = options.output / "late_starters.csv"
    tasks = {name: TASKS[name](options.size) for name in options.tasks}
    everyone = {
        (name, optimizer): create(contestant, Schedule(B2))
        for name, late in tasks.items()
        for optimizer, contestant in optimizers(late).items()
    }
    with tqdm(unit="step", mininterval=5) as progress:
        for name, optimizer, seed, rates in missing(tasks, options.seeds, path):
            progress.set_description(f"{name}, {optimizer}, seed {seed}")
            task, creates = tasks[name].task, everyone[name, optimizer]
            found = final_losses(task, creates, rates, seed, progress)
            keys = [Key(name, optimizer, rate, seed) for rate in rates]
            add(path, dict(zip(keys, found, strict=True)))
    losses = read(path)
    report(tasks, losses, options.output)
    return losses


def by_optimizer(name: str, late: Late, losses: Losses) -> Found:
    """Returns the losses on a task, of the linear warm-ups those of the best."""
    chosen = best_length(late, name, losses)
    found = {}
    for optimizer, contestant in optimizers(late).items():
        values = [
            {key.seed: x for key, x in losses.items() if key[:3] == run}
            for run in ((name, optimizer, rate) for rate in late.rates)
        ]
        if all(values) and (not contestant.tuned or optimizer == chosen):
            found[TUNED if contestant.tuned else optimizer] = values
    return found


def trains(late: Late, losses: Iterable[float]) -> int:
    return sum(x < late.plateau - BELOW for x in losses)  # NaN is not


def best_rate(values: Sequence[BySeed]) -> int:
    """Returns the index of the learning rate whose mean is lowest, or 0 if all fail."""
    means = [statistics.fmean(x.values()) for x in values]
    return min(range(len(means)), key=lambda i: (math.isnan(means[i]), means[i]))


def of_seeds(values: Sequence[BySeed], other: Sequence[BySeed]) -> list[BySeed]:
    """Returns the losses of those seeds that the other has too."""
    return [
        {seed: x for seed, x in mine.items() if seed in theirs}
        for mine, theirs in zip(values, other, strict=True)
    ]


def task_table(late: Late, found: Found) -> str:
    rows = []
    for optimizer, values in found.items():
        best = best_rate(values)
        row = {
            "optimizer": optimizer,
            "best lr": f"{late.rates[best]:g}",
            "loss at it": spread([*values[best].values()]),
            "seeds": f"{len(values[best])}",
        }
        for rate, x in zip(late.rates, values, strict=True):
            mean, train = statistics.fmean(x.values()), trains(late, x.values())
            row[f"lr {rate:g}"] = f"{mean:.3f}, {train} of {len(x)}"
        rows.append(row)
    return table(rows)


def against_published(late: Late, values: list[BySeed], published: Found) -> str:
    """Returns how many percent worse than the published bound, and the share."""
    if PUBLISHED not in published or not values:
        return ""
    mine, theirs = (
        of_seeds(values, published[PUBLISHED]),
        of_seeds(published[PUBLISHED], values),
    )
    best, other = (statistics.fmean(x[best_rate(x)].values()) for x in (mine, theirs))
    every = [x for by_seed in mine for x in by_seed.values()]
    share = trains(late, every) / len(every)
    return f"{100 * (best / other - 1):+.2f} %, {share:.0%}"


def summary(tasks: dict[str, Late], found: dict[str, Found]) -> str:
    """Returns a row for each task: how far behind the published bound each is."""
    names = dict.fromkeys(name for x in found.values() for name in x)
    return table(
        [
            {"task": task}
            | {x: against_published(tasks[task], by.get(x, []), by) for x in names}
            for task, by in found.items()
        ]
    )


def report(tasks: dict[str, Late], losses: Losses, folder: Path) -> None:
    """Writes and prints a table of each task and one of all; draws the figure."""
    found = {name: by_optimizer(name, late, losses) for name, late in tasks.items()}
    found = {name: x for name, x in found.items() if x}
    if not found:
        return
    parts = [
        "# late_starters",
        f"{command_and_date('late_starters')}; {environment()}.",
        "How much higher the mean loss is than that of the published bound, each at "
        "its own best learning rate, of the seeds that both have; and the share of "
        "these runs that train, at all learning rates. A run trains if its loss ends "
        f"{BELOW} nats below the plateau, which is the entropy of single tokens.",
        summary(tasks, found),
    ]
    for name, by_name in found.items():
        late = tasks[name]
        about = (
            f"{late.task.steps} steps, b3 {late.b3:g}, plateau {late.plateau:.3f} "
            "nats. At the best learning rate the mean loss (lowest to highest seed); "
            "at each the mean loss and how many runs train."
        )
        parts += [f"## {name}", about, task_table(late, by_name)]
    text = "\n\n".join(parts) + "\n"
    (folder / "late_starters.md").write_text(text)
    print(f"\n{text}")
    draw(tasks, found, folder / "late_starters.png")


def draw(tasks: dict[str, Late], found: dict[str, Found], path: Path) -> None:
    """Draws the loss over the learning rate: median and range of the seeds."""
    columns = min(4, len(found))
    figure, axes = plt.subplots(
        -(-len(found) // columns), columns, figsize=(3.4 * columns, 6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (name, by_name) in zip(axes.flat, found.items(), strict=False):
        for index, (optimizer, values) in enumerate(by_name.items()):
            rates, color = tasks[name].rates, f"C{index}"
            lowest, median, highest = (
                [f(x.values()) for x in values] for f in (min, statistics.median, max)
            )
            axis.plot(rates, median, marker=".", color=color, label=optimizer)
            axis.fill_between(rates, lowest, highest, color=color, alpha=0.12)
        axis.set(xscale="log", title=name, xlabel="learning rate", ylabel="loss")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    command(main, Options, __doc__)
