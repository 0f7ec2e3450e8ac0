"""Runs of one optimizer at several learning rates, trained side by side.

One program steps them all, which is faster than one after the other where models are
small. Each draws the batches that it would draw alone.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.common.training import (
    Batch,
    History,
    Row,
    Run,
    Task,
    TrainState,
    assemble,
    initial_state,
    loss_and_rest,
)

Key = tuple[str, float, int]  # optimizer, learning rate, seed
Trains = Callable[[Task, Sequence[Run], tqdm], History]


def key_of(run: Run) -> Key:
    return run.optimizer, run.learning_rate, run.seed


def train_together(
    task: Task, runs: Sequence[Run], path: Path, progress: tqdm, train: Trains
) -> History:
    """Trains the runs that the file has not, and adds them to it, seed by seed.

    A crash costs the runs of one seed that were under way, a minute or two of work.

    Args:
      task: What is trained.
      runs: By one optimizer, of which all share one function ``update``.
      path: The file, a line for each run that is finished.
      progress: Counts the steps of all runs.
      train: Trains runs of one seed.

    Returns:
      The history of every run, as :func:`experiments.common.training.train` has it.
    """
    for seed in sorted({run.seed for run in runs}):
        done = read(path)
        of_seed = [run for run in runs if run.seed == seed]
        missing = [run for run in of_seed if key_of(run) not in done]
        before = progress.n
        if missing:
            progress.set_description(f"{missing[0].optimizer}, seed {seed}")
            found = train(task, missing, progress)
            write(path, done | {key_of(run): rows for run, rows in found.items()})
        progress.update(before + len(of_seed) * task.steps - progress.n)
    done = read(path)
    return {run: done[key_of(run)] for run in runs}


def finished_so_far(runs: Sequence[Run], path: Path) -> History:
    """Returns the history of those runs that the file has."""
    done = read(path)
    return {run: done[key_of(run)] for run in runs if key_of(run) in done}


def read(path: Path) -> dict[Key, list[Row]]:
    """Returns the rows of every run in the file."""
    if not path.exists():
        return {}
    found: dict[Key, list[Row]] = {}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        key = (run["optimizer"], run["learning_rate"], run["seed"])
        columns: dict[str, list[float | None]] = run["rows"]
        found[key] = [
            {name: x for name, x in zip(columns, row, strict=True) if x is not None}
            for row in zip(*columns.values(), strict=True)
        ]
    return found


def write(path: Path, done: Mapping[Key, Sequence[Row]]) -> None:
    """Replaces the file by one with all those runs."""
    lines = []
    for (optimizer, rate, seed), rows in done.items():
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [rounded(row.get(name)) for row in rows] for name in names}
        run = {"optimizer": optimizer, "learning_rate": rate, "seed": seed}
        lines.append(json.dumps(run | {"rows": columns}, separators=(",", ":")))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(f"{line}\n" for line in lines))
    whole.replace(path)


def rounded(value: float | None) -> float | None:
    """Returns five significant digits of a number."""
    if value is None or float(value).is_integer():
        return value
    return float(f"{value:.5g}")


def go_on_together(task: Task, runs: Sequence[Run], progress: tqdm) -> History:
    """Trains runs of one seed from their beginning to their end."""
    (seed,) = {run.seed for run in runs}
    (update,) = {run.transformation.update for run in runs}
    batches = batches_of(task, seed)
    gradients, apply = compiled_gradients(task), compiled_update(update)
    states = [initial_state(task, run) for run in runs]
    state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    history: History = {run: [] for run in runs}
    losses: list[jax.Array] = []
    start = time.perf_counter()
    for step in range(1, task.steps + 1):
        batch = batches[step - 1]
        (loss, rest), updates = gradients(state.params, state.rest, batch)
        params, opt_state = apply(updates, state.opt_state, state.params)
        state = TrainState(params, rest, opt_state)
        losses.append(loss)
        progress.update(len(runs))
        if step % task.row_every and step < task.steps:
            continue
        since = np.stack(jax.device_get(losses))
        losses.clear()
        seconds = (time.perf_counter() - start) / len(runs)
        for index, (run, rows) in enumerate(history.items()):
            if rows and math.isnan(rows[-1]["loss"]):
                continue
            row = row_of(step, since[:, index], seconds)
            if step == task.steps and math.isfinite(row["loss"]):
                mine = jax.tree.map(lambda x, i=index: x[i], state)
                row |= task.evaluate(assemble(task, mine.params, mine.rest))
            history[run].append(row)
    return history


def row_of(step: int, losses: np.ndarray, seconds: float) -> Row:
    """Returns the row of one run, whose loss is NaN if one was not finite."""
    mean = float(losses.mean())
    row = {"step": step, "loss": mean if math.isfinite(mean) else math.nan}
    if math.isfinite(mean):
        row["highest loss"] = float(losses.max())
    return row | {"seconds": seconds}


@functools.lru_cache(maxsize=3)
def batches_of(task: Task, seed: int) -> list[Batch]:
    """Returns the batches of all steps, drawn once for all optimizers."""
    batches = task.batches(seed)
    return [batches[step] for step in range(task.steps)]


@functools.cache
def compiled_gradients(task: Task) -> Callable[..., Any]:
    """Returns the losses, what is no parameter, and the gradients, of many runs."""
    one = jax.value_and_grad(loss_and_rest(task), has_aux=True)
    return jax.jit(jax.vmap(one, in_axes=(0, 0, None)))


@functools.cache
def compiled_update(update: optax.TransformUpdateFn) -> Callable[..., Any]:
    """Returns what updates the parameters and states of many runs."""

    def one(updates: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = update(updates, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(jax.vmap(one), donate_argnums=(1, 2))
