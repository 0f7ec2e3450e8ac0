"""Does the pod example shard, resume and refuse as it says? In one process."""

import csv
import dataclasses
import os
import re
import signal
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

from examples import pod_training as pod
from examples.common import pod_checkpoints, pod_metrics

SMALL = pod.Options(b3=0.5, learning_rate=1e-2, steps=8, depth=1, width=8, save_every=4)

pytestmark = pytest.mark.usefixtures("eight_devices")


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """Every run compiles the same: in a hurry, and after the first from a cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(
        names, (str(tmp_path_factory.mktemp("cache")), 0), strict=True
    ):
        jax.config.update(name, value)
    jax.config.update("jax_disable_most_optimizations", True)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    jax.config.update("jax_disable_most_optimizations", False)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def train(folder, **changes):
    """Trains; returns the rows of the metrics and the state as it was saved."""
    folder.mkdir(exist_ok=True)
    options = dataclasses.replace(SMALL, output=folder, **changes)
    pod.train(options)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    checkpoints = pod.Checkpoints(folder / "checkpoints")
    _, like = pod.abstract_state(options, pod.make_mesh(options.fsdp))
    step, state = checkpoints.restore(like)
    checkpoints.close()
    return rows, step, state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_averages_are_sharded_as_their_parameters(whole):
    _, _, state = whole
    graph, _ = pod.abstract_state(SMALL, pod.make_mesh(SMALL.fsdp))
    model, optimizer = nnx.merge(graph, state)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    shardings = jax.tree.map(lambda x: x.sharding, params)
    for name in ("mu", "nu", "bound"):
        average = nnx.to_pure_dict(optax.tree.get(optimizer.opt_state, name))
        assert jax.tree.map(lambda x: x.sharding, average) == shardings
    assert params["tokens"]["embedding"].sharding.spec == P("fsdp")
    assert params["blocks"][0]["expand"]["kernel"].sharding.spec == P(None, "fsdp")


def test_trains_and_notes_every_step(whole):
    rows, step, _ = whole
    assert step == 8
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert {row["skipped"] for row in rows} == {"0"}
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.3


def test_resumed_run_is_bit_equal(whole, tmp_path):
    train(tmp_path, steps=5, save_every=3)
    # Rows of steps that are done again, and one that was cut short.
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,1.0,0\r\n7")
    rows, step, state = train(tmp_path)
    assert (rows, step) == whole[:2]
    chex.assert_trees_all_equal(*jax.device_get((state, whole[2])))


def test_sigterm_saves_the_step(tmp_path, monkeypatch, whole):
    make_batch = pod.batch

    def batch(text, seed, step, mesh):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(text, seed, step, mesh)

    monkeypatch.setattr(pod, "batch", batch)
    rows, step, _ = train(tmp_path)
    assert step == 3
    assert rows == whole[0][:3]


def test_failed_save_is_a_warning(whole, tmp_path, monkeypatch):
    save = pod_checkpoints.ocp.CheckpointManager.save

    def full(self, step, **settings):
        if step == 4:
            raise OSError(28, "No space left on device")
        return save(self, step, **settings)

    monkeypatch.setattr(pod_checkpoints.ocp.CheckpointManager, "save", full)
    with pytest.warns(UserWarning, match="step 4 was not saved: OSError: .*No space"):
        rows, step, state = train(tmp_path)
    assert (rows, step) == whole[:2]
    chex.assert_trees_all_equal(*jax.device_get((state, whole[2])))


def test_last_step_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    def full(self, step, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pod_checkpoints.ocp.CheckpointManager, "save", full)
    with (
        pytest.warns(UserWarning, match="was not saved"),
        pytest.raises(RuntimeError, match="step 2, the last one, could not be saved"),
    ):
        train(tmp_path, steps=2)


def test_metrics_wait_for_room_on_the_disk(tmp_path, monkeypatch):
    metrics = pod.Metrics(tmp_path / "metrics.csv", 0)
    metrics.rows.append((1, 2.0, 0))
    with monkeypatch.context() as context:
        context.setattr(pod_metrics.csv, "writer", HalfWriter)
        with pytest.warns(UserWarning, match="was not written: .*No space"):
            metrics.write()
    metrics.rows.append((2, 1.5, 0))
    metrics.write()
    assert metrics.path.read_text().splitlines() == [
        "step,loss,skipped",
        "1,2.0,0",
        "2,1.5,0",
    ]


class HalfWriter:
    """Writes half a row, and then the disk is full."""

    def __init__(self, file):
        self.file = file

    def writerows(self, rows):
        self.file.write("1,")
        self.file.flush()
        raise OSError(28, "No space left on device")


def test_nan_gradients_are_skipped_and_counted(whole):
    graph, _ = pod.abstract_state(SMALL, pod.make_mesh(SMALL.fsdp))
    model, optimizer = nnx.merge(graph, jax.tree.map(jnp.copy, whole[2]))
    params = nnx.state(model, nnx.Param)
    before = jax.device_get(nnx.to_pure_dict(nnx.state((model, optimizer))))
    gradients = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    nnx.jit(lambda o, m, g: o.update(m, g))(optimizer, model, gradients)
    after = jax.device_get(nnx.to_pure_dict(nnx.state((model, optimizer))))
    assert after[1]["opt_state"]["total_notfinite"] == 1
    chex.assert_trees_all_equal(after[0], before[0])
    chex.assert_trees_all_equal(
        after[1]["opt_state"]["inner_state"], before[1]["opt_state"]["inner_state"]
    )


def test_run_of_nan_gradients_ends(tmp_path, monkeypatch):
    """With weights and averages as they were before the first of them."""
    monkeypatch.setattr(pod, "MAX_SKIPPED", 3)
    monkeypatch.setattr(
        pod.optax,
        "softmax_cross_entropy_with_integer_labels",
        lambda logits, labels: jnp.nan * logits.sum(axis=-1),
    )
    with pytest.raises(RuntimeError, match="gradients of the 3 steps up to 3 were not"):
        train(tmp_path)


def test_batches_depend_on_seed_and_step_alone():
    mesh = pod.make_mesh(4)
    text = np.frombuffer(bytes(range(256)) * 9, np.uint8)
    first = np.asarray(pod.batch(text, 0, 1, mesh))
    assert first.shape == (pod.BATCH, pod.CONTEXT + 1)
    np.testing.assert_array_equal(first, pod.batch(text, 0, 1, pod.make_mesh(2)))
    for seed, step in ((0, 2), (1, 1)):
        assert np.any(first != pod.batch(text, seed, step, mesh))


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"save_every": 0}, "--save-every must be at least 1, got 0"),
        ({"width": 30}, "--width must be a multiple of 4"),
        ({"local_processes": 3}, "--local-processes must be 1, 2, 4 or 8, got 3"),
        ({"local_processes": 2, "distributed": True}, "exclude each other"),
    ],
)
def test_nonsense_is_refused(nonsense, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **nonsense)


def test_distributed_needs_a_cluster(tmp_path, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    options = dataclasses.replace(SMALL, distributed=True, output=tmp_path)
    with pytest.raises(ValueError, match="Slurm and Kubernetes, and JAX finds none"):
        pod.main(options)


@pytest.fixture
def broken(monkeypatch):
    def train(options):
        raise RuntimeError("Connection closed by peer\nand much more")

    monkeypatch.setattr(pod, "train", train)


def test_one_of_many_says_why_and_waits_for_none(broken, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code + 100))
    with pytest.raises(SystemExit) as ended:
        pod.run(SMALL)
    assert ended.value.code == 101
    words = capsys.readouterr().err
    assert words.startswith("process 3 of 4 cannot go on: Connection closed by peer\n")
    assert "start all of them again" in words
    assert "and much more" not in words


def test_one_alone_fails_as_usual(broken):
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        pod.run(SMALL)


def test_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=re.escape("got 3 for 8 devices")):
        pod.make_mesh(3)
