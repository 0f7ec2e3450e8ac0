"""Trains a Transformer on many devices, or many machines, and survives their failures.

Parameters and AdaMod's three averages are sharded alike over the mesh's axis ``fsdp``,
the batch over ``data`` and ``fsdp``. A run that was ended resumes from its newest good
checkpoint. With no option it runs here, on the accelerators or on 8 simulated devices:

    python -m examples.pod_training
    python -m examples.pod_training --local-processes 4    as on 4 machines
    srun python -m examples.pod_training --distributed     under Slurm; the same command
                                                           in each pod of a Kubernetes
                                                           job, or host of a TPU pod

The output folder must be one that all machines share. SIGTERM, by which schedulers
announce that a machine is taken away, saves and ends with exit code 0.

To continue from a checkpoint of ``optax.adam``, restore it with a template that
``optax.adam`` makes, as ``adam_state``. With ``tx`` the new optimizer:

    from optax_adamod import from_adam

    state = from_adam(adam_state, tx.init(params))

The bound then opens from zero, as at the start of a run.
"""

import dataclasses
import functools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples.common import local_processes
from examples.common.options import check_counts, check_heads
from examples.common.pod_checkpoints import Checkpoints
from examples.common.pod_metrics import Metrics
from examples.common.stdlib_text import FOLDER, load_text
from examples.common.transformer import Transformer, next_token_losses
from optax_adamod import adamod

CONTEXT = 64  # bytes that the model sees
BATCH = 32
HEADS = 4
B2 = 0.98  # the usual one of Transformers
DEVICES = 8  # simulated ones, where there is nothing but a CPU
MAX_SKIPPED = 10  # steps in a row with non-finite gradients, before a run gives up


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a Post-LN Transformer on a (data, fsdp) mesh, with checkpoints."""

    steps: int = 200
    """Training steps in all, those before a restart included."""
    depth: int = 2
    """Transformer blocks."""
    width: int = 64
    """Features of each token, a multiple of 4, the number of heads."""
    learning_rate: float = 3e-3
    """AdaMod's learning rate, constant."""
    b3: float = 0.99
    """AdaMod's b3; its bound opens over about 1 / (1 - b3) steps."""
    seed: int = 0
    """Seed of the weights and, with the step, of each batch."""
    fsdp: int = 4
    """Devices over which parameters and averages are sharded."""
    save_every: int = 50
    """Steps between checkpoints."""
    local_processes: int = 0
    """Start so many processes on this machine, 1, 2, 4 or 8, that share 8 devices."""
    distributed: bool = False
    """Join the other processes of a TPU pod, or of a Slurm or Kubernetes job."""
    output: Path = Path("outputs/pod_training")
    """Folder of checkpoints and metrics.csv; resumes where it has checkpoints."""
    text: Path = FOLDER
    """Folder whose .py files are the text."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "depth", "width", "fsdp", "save_every")
        check_heads(self, HEADS)
        if self.local_processes not in (0, 1, 2, 4, 8):
            raise ValueError(
                f"--local-processes must be 1, 2, 4 or 8, got {self.local_processes}."
            )
        if self.local_processes and self.distributed:
            raise ValueError("--local-processes and --distributed exclude each other.")


def make_mesh(fsdp: int) -> jax.sharding.Mesh:
    """Returns all devices of all processes as a (data, fsdp) mesh."""
    devices = jax.device_count()
    if devices % fsdp or BATCH % devices:
        raise ValueError(
            f"--fsdp must divide the number of devices, and that the batch of {BATCH}; "
            f"got {fsdp} for {devices} devices."
        )
    return jax.make_mesh(
        (devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )


def sharding_of(leaf: Any, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Splits the largest dimension that ``fsdp`` divides.

    It depends on the shape alone, so that averages are sharded as their parameters.
    """
    fsdp = mesh.shape["fsdp"]
    divisible = [d for d, size in enumerate(leaf.shape) if size and size % fsdp == 0]
    if not divisible:
        return NamedSharding(mesh, P())
    split = max(divisible, key=lambda d: leaf.shape[d])
    return NamedSharding(mesh, P(*(None,) * split, "fsdp"))


def build(options: Options) -> tuple[Transformer, nnx.Optimizer]:
    """Returns the model and its optimizer."""
    model = Transformer(
        options.depth, options.width, HEADS, CONTEXT, rngs=nnx.Rngs(options.seed)
    )
    # A step with a NaN is skipped. One that is not would poison all later ones, so the
    # transformation lets none through, and the loop below counts them.
    tx = optax.apply_if_finite(
        adamod(options.learning_rate, b2=B2, b3=options.b3),
        max_consecutive_errors=jnp.iinfo(jnp.int32).max - 1,
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def abstract_state(options: Options, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Returns NNX's graph, and the state's shapes, dtypes and shardings."""
    graph, state = nnx.split(nnx.eval_shape(functools.partial(build, options)))
    return graph, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x, mesh)),
        state,
    )


def make_train_step(graph: Any, like: Any) -> jax.stages.Wrapped:
    """Returns the jitted step: (state, windows) -> (state, metrics)."""

    # Donated: the new state takes the old one's memory.
    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, like), None),
    )
    def train_step(state: Any, windows: jax.Array) -> Any:
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model: Transformer) -> jax.Array:
            return next_token_losses(model, windows).mean()

        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        metrics = {
            "loss": loss,
            "skipped": optimizer.opt_state.total_notfinite[...],
            "in_a_row": optimizer.opt_state.notfinite_count[...],
        }
        return nnx.state((model, optimizer)), metrics

    return train_step


def batch(text: np.ndarray, seed: int, step: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Returns random windows of the text, which (seed, step) alone decides.

    So a resumed run sees what the run that was ended would have seen.
    """
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(len(text) - CONTEXT, size=BATCH)
    windows = text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
    return jax.make_array_from_callback(
        windows.shape,
        NamedSharding(mesh, P(("data", "fsdp"))),
        lambda index: windows[index],
    )


def train(options: Options) -> None:
    """Trains up to the last step, from the newest checkpoint if there is one."""
    mesh = make_mesh(options.fsdp)
    text = load_text(options.text, at_least=BATCH * CONTEXT)
    graph, like = abstract_state(options, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    checkpoints = Checkpoints(options.output / "checkpoints")
    restored = checkpoints.restore(like)
    if restored is None:
        # Under jit, so that no device ever holds more than its share.
        init = jax.jit(lambda: nnx.state(build(options)), out_shardings=shardings)
        restored = 0, init()
    first, state = restored
    is_main = jax.process_index() == 0
    if is_main:
        where = f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices"
        print(f"on {where} of {jax.process_count()} processes, after step {first}")
    metrics = Metrics(options.output / "metrics.csv", first) if is_main else None
    train_step = make_train_step(graph, like)
    train_step = train_step.lower(state, batch(text, options.seed, 0, mesh)).compile()
    # All at once: CPU's collectives wait half a minute for a process, and no longer.
    ocp.multihost.sync_global_processes("compiled")
    terminated = on_sigterm()
    previous = None
    progress = tqdm(
        range(first + 1, options.steps + 1),
        initial=first,
        total=options.steps,
        unit="step",
        disable=not is_main,
    )
    step = first
    for step in progress:
        state, now = train_step(state, batch(text, options.seed, step, mesh))
        # The step before is done by now: reading it does not keep the devices waiting.
        report(metrics, progress, step - 1, previous)
        previous = now
        preempted = checkpoints.preempted(step) or terminated.is_set()
        if step % options.save_every == 0 or step == options.steps or preempted:
            report(metrics, progress, step, previous)
            previous = None
            if metrics:
                metrics.write()
            checkpoints.save(step, state)
        if preempted:
            if is_main:
                progress.write(f"preempted: saving step {step}, to be resumed")
            break
    progress.close()
    checkpoints.close()
    if checkpoints.newest() != step:
        raise RuntimeError(f"step {step}, the last one, could not be saved.")


def report(metrics: Metrics | None, progress: tqdm, step: int, values: Any) -> None:
    """Notes a step's metrics, and ends a run of which nothing can be expected."""
    if values is None:
        return
    loss, skipped, in_a_row = (
        values[name].item() for name in ("loss", "skipped", "in_a_row")
    )
    if metrics:
        metrics.rows.append((step, loss, skipped))
    progress.set_postfix(loss=f"{loss:.3f}", skipped=skipped, refresh=False)
    if in_a_row >= MAX_SKIPPED:
        raise RuntimeError(
            f"the gradients of the {in_a_row} steps up to {step} were not finite; the "
            "weights are those of before. Try a smaller --learning-rate."
        )


def on_sigterm() -> threading.Event:
    """Returns what SIGTERM sets. Of many processes, JAX notifies all by itself."""
    terminated = threading.Event()
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    return terminated


def run(options: Options) -> None:
    """Trains as one of the processes; says so if that fails for another's sake."""
    try:
        train(options)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        line = str(error).strip().split("\n", 1)[0]
        print(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: "
            f"{line}\nIf that is because another process ended, start all of them "
            "again: training resumes from the newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the usual way out would wait for the others


def main(options: Options) -> None:
    """Trains in this process, or in others that it starts."""
    options.output.mkdir(parents=True, exist_ok=True)
    if options.local_processes:
        devices = DEVICES // options.local_processes
        local_processes.run(options.local_processes, devices, run, options)
        return
    if options.distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                "--distributed is for TPU pods, Slurm and Kubernetes, and JAX finds "
                f"none of them: {error}"
            ) from error
    else:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    run(options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
