"""The one training loop of the experiments: jitted, with checkpoints, resumed."""

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

Batch = Mapping[str, np.ndarray]
Row = dict[str, float]
SAVE_EVERY = 60  # seconds; a crash costs no more, and what it takes to the next row


class Batches(Protocol):
    """The batch of every step, from 0 without end: a ``grain.MapDataset`` is one."""

    def __getitem__(self, step: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, the same for every optimizer.

    Attributes:
      create_model: Makes the model; its generators are seeded by the run's seed.
      loss: The training loss of a batch, a scalar; jitted with its gradient.
      batches: By seed, so that a resumed run sees what it would have seen.
      steps: Training steps of a run, its budget.
      row_every: Steps from one row of a run's history to the next.
      evaluate: What each row records of the model beside its training loss, by name.
      evaluate_every: Steps from one evaluation to the next, a multiple of
        ``row_every``, which it is by default. The last row is always evaluated.
    """

    create_model: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[nnx.Module, Batch], jax.Array]
    batches: Callable[[int], Batches]
    steps: int
    row_every: int
    evaluate: Callable[[nnx.Module], dict[str, float]] = lambda model: {}  # noqa: ARG005
    evaluate_every: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One optimizer at one learning rate, from one seed."""

    optimizer: str
    transformation: optax.GradientTransformation
    learning_rate: float
    seed: int
    b3: float | None = None  # of AdaMod; the horizon of its bound is 1 / (1 - b3) steps

    def __str__(self) -> str:
        return f"{self.optimizer}, lr {self.learning_rate:g}, seed {self.seed}"


History = dict[Run, list[Row]]


class TrainState(NamedTuple):
    """What a step changes, in dictionaries: JAX takes them apart faster than states."""

    params: dict[Any, Any]
    rest: dict[Any, Any]  # statistics of batch normalisation, generators of dropout
    opt_state: Any


def train_all(
    task: Task, runs: Sequence[Run], folder: Path, settings: Mapping[str, Any]
) -> History:
    """Trains all runs, each in a folder; what is done already is not done again.

    The settings are what shapes a run beside its optimizer, learning rate and seed; a
    folder that holds runs with others is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json", settings)
    with tqdm(total=len(runs) * task.steps, unit="step") as progress:
        return {run: train(task, run, folder, progress) for run in runs}


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Keeps runs of different settings out of one folder, where they would be mixed."""
    new = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(new, indent=1) + "\n")
        whole.replace(path)  # there or not, after a crash, and never half of it
        return
    old = json.loads(path.read_text())
    changed = [
        f"{name} {old.get(name)!r}, now {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds runs with other settings: {'; '.join(changed)}. "
            f"Give another folder with --output, or delete that one."
        )


def train(task: Task, run: Run, folder: Path, progress: tqdm) -> list[Row]:
    """Trains one run, from its last checkpoint if there is one.

    Rows have ``step``, ``seconds``, ``loss`` and ``highest loss`` (the mean and the
    largest since the row before) and what ``task.evaluate`` gave. The last is at
    ``task.steps``, or where the loss was no longer finite, as it then stays.
    """
    progress.set_description(str(run))
    before = progress.n
    path = path_of(run, folder)
    options = ocp.CheckpointManagerOptions(1)
    with ocp.CheckpointManager(path, options=options) as manager:
        rows = restore_rows(manager)
        if not finished(task, rows):
            state = restore_state(manager, initial_state(task, run))
            go_on(task, run, state, rows, manager, progress)
    progress.update(before + task.steps - progress.n)
    return rows


def path_of(run: Run, folder: Path) -> Path:
    """Returns where the checkpoints of a run are."""
    return (folder / re.sub(r"[^\w.]+", "_", str(run))).absolute()


def finished(task: Task, rows: Sequence[Row]) -> bool:
    if not rows:
        return False
    return rows[-1]["step"] == task.steps or math.isnan(rows[-1]["loss"])


def go_on(
    task: Task,
    run: Run,
    state: TrainState,
    rows: list[Row],
    manager: ocp.CheckpointManager,
    progress: tqdm,
) -> None:
    """Trains from the state after the last row, appends rows, and saves."""
    step = int(rows[-1]["step"]) if rows else 0
    progress.update(step)
    batches = task.batches(run.seed)
    train_step = compiled_step(task, run.transformation.update)
    losses: list[jax.Array] = []
    start = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
    saved = time.perf_counter()
    while not finished(task, rows):
        state, loss = train_step(state, batches[step])
        losses.append(loss)
        step += 1
        progress.update()
        if step % task.row_every and step < task.steps:
            continue
        since = np.asarray(jax.device_get(losses))
        row = {"step": step, "loss": float(since.mean())}
        losses.clear()
        if math.isfinite(row["loss"]):
            row["highest loss"] = float(since.max())
            if step % (task.evaluate_every or 1) == 0 or step == task.steps:
                row |= task.evaluate(assemble(task, state.params, state.rest))
        else:
            progress.write(f"{run}: the loss of step {step} is {row['loss']}.")
            row["loss"] = math.nan
        progress.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k != "step"})
        rows.append(row | {"seconds": time.perf_counter() - start})
        # By the clock, so that checkpoints take little of the time of any run.
        if finished(task, rows) or time.perf_counter() - saved > SAVE_EVERY:
            save(manager, state, rows)
            saved = time.perf_counter()


def initial_state(task: Task, run: Run) -> TrainState:
    _, *states = nnx.split(task.create_model(nnx.Rngs(run.seed)), nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    return TrainState(params, rest, run.transformation.init(params))


@functools.cache
def structure(task: Task) -> tuple[nnx.GraphDef, list[nnx.State]]:
    """Returns what all the models of a task have in common."""
    model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    return graphdef, states


def assemble(task: Task, params: dict[Any, Any], rest: dict[Any, Any]) -> nnx.Module:
    graphdef, states = structure(task)
    # Merged as they are, they would be changed by whoever uses the model.
    states = jax.tree.map(lambda x: x, states)
    for state, values in zip(states, (params, rest), strict=True):
        nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graphdef, *states)


def loss_and_rest(
    task: Task,
) -> Callable[[dict[Any, Any], dict[Any, Any], Batch], tuple[jax.Array, Any]]:
    """Returns a function of parameters, the rest and a batch: loss and new rest."""

    def both(params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, Any]:
        model = assemble(task, params, rest)
        loss = task.loss(model, batch)
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    return both


@functools.cache
def compiled_step(
    task: Task, update: optax.TransformUpdateFn
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Returns the jitted step of runs that share ``update``; it donates the state."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        (loss, rest), gradients = jax.value_and_grad(loss_and_rest(task), has_aux=True)(
            state.params, state.rest, batch
        )
        updates, opt_state = update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, rest, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def save(manager: ocp.CheckpointManager, state: TrainState, rows: list[Row]) -> None:
    saved = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        rows=ocp.args.JsonSave({"rows": rows}),
    )
    manager.save(int(rows[-1]["step"]), args=saved, force=True)


def restore_rows(manager: ocp.CheckpointManager) -> list[Row]:
    """Returns the rows of the last checkpoint, none before the first."""
    if (step := manager.latest_step()) is None:
        return []
    wanted = ocp.args.Composite(rows=ocp.args.JsonRestore())
    return manager.restore(step, args=wanted)["rows"]["rows"]


def restore_state(manager: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """Returns the state of the last checkpoint, before the first ``like`` itself."""
    if (step := manager.latest_step()) is None:
        return like
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(like._asdict()))
    return TrainState(**manager.restore(step, args=wanted)["state"])


def in_bfloat16(task: Task) -> Task:
    """Returns the task with weights and gradients in bfloat16, computed in float32."""

    def cast(model: nnx.Module, dtype: Any) -> nnx.Module:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return nnx.merge(graphdef, params, rest)

    def widened_loss(model: nnx.Module, batch: Batch) -> jax.Array:
        return task.loss(cast(model, jnp.float32), batch)

    return dataclasses.replace(
        task,
        create_model=lambda rngs: cast(task.create_model(rngs), jnp.bfloat16),
        loss=widened_loss,
        evaluate=lambda model: task.evaluate(cast(model, jnp.float32)),
    )
