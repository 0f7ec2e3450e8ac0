"""Does the experiments' training loop train, stop, and go on where it stopped?"""

import math

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.common import training
from experiments.common.training import Run, train, train_all
from experiments.tests.helpers import (
    Batches,
    Model,
    run_of,
    squares,
    task_of,
    without_seconds,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def adam(seed=0, transformation=None):
    return run_of(seed=seed, transformation=transformation or optax.adam(0.1))


def test_a_step_is_the_optimizers(tmp_path, progress):
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(3, 1)), rng.normal(size=(8, 3))
    seen = []

    class Linear(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))

    def evaluate(model):
        seen.append(np.asarray(model.kernel[...]))
        return {}

    task = task_of(
        lambda model, batch: jnp.mean(jnp.square(batch["x"] @ model.kernel[...] - 1)),
        create_model=Linear,
        batches=lambda seed: [{"x": x}],
        steps=1,
        evaluate=evaluate,
    )
    rows = train(task, Run("SGD", optax.sgd(0.1), 0.1, 0), tmp_path, progress)
    errors = x @ kernel - 1
    np.testing.assert_allclose(rows[0]["loss"], np.mean(errors**2), rtol=1e-5)
    expected = kernel - 0.1 * 2 * x.T @ errors / len(x)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5)


def test_rows(tmp_path, progress):
    rows = train(task_of(steps=5), adam(), tmp_path, progress)
    assert [row["step"] for row in rows] == [2, 4, 5]
    columns = ["step", "loss", "highest loss", "norm", "seconds"]
    assert all(list(row) == columns for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]
    # The first row's loss is the mean of the first two.
    singly = train(task_of(steps=2, row_every=1), adam(), tmp_path / "2", progress)
    np.testing.assert_allclose(
        rows[0]["loss"], (singly[0]["loss"] + singly[1]["loss"]) / 2, rtol=1e-6
    )
    assert rows[0]["highest loss"] == max(row["loss"] for row in singly)


def test_rows_between_evaluations(tmp_path, progress):
    task = task_of(steps=9, evaluate_every=4)
    rows = train(task, adam(), tmp_path, progress)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]
    assert [row["step"] for row in rows if "norm" in row] == [4, 8, 9]


@pytest.mark.parametrize("save_every", [0.0, 60.0])
def test_a_stopped_run_goes_on(tmp_path, progress, monkeypatch, save_every):
    monkeypatch.setattr(training, "SAVE_EVERY", save_every)
    whole = train(task_of(), adam(), tmp_path / "whole", progress)
    with pytest.raises(KeyboardInterrupt):
        train(task_of(fails_at=7), adam(), tmp_path / "stopped", progress)
    asked = []

    def batches(seed):
        asked.append(seed)
        return Batches(seed, fails_at=5 if save_every == 0 else None)

    resumed = train(task_of(batches=batches), adam(), tmp_path / "stopped", progress)
    assert asked == [0]
    assert without_seconds(resumed) == without_seconds(whole)


def test_what_is_done_is_not_done_again(tmp_path, progress):
    first = train(task_of(), adam(), tmp_path, progress)
    assert train(task_of(fails_at=0), adam(), tmp_path, progress) == first


def test_a_run_whose_loss_is_not_finite_ends(tmp_path, progress):
    def loss(model, batch):
        # Beyond float32 in a few steps.
        return squares(model, batch) * jnp.float32(1e30)

    run = adam(transformation=optax.sgd(1.0))
    rows = train(task_of(loss, steps=50), run, tmp_path, progress)
    assert math.isnan(rows[-1]["loss"])
    assert "norm" not in rows[-1]
    assert rows[-1]["step"] < 50
    assert all(math.isfinite(row["loss"]) for row in rows[:-1])
    again = train(task_of(loss, fails_at=0, steps=50), run, tmp_path, progress)
    assert without_seconds(again[:-1]) == without_seconds(rows[:-1])
    assert math.isnan(again[-1]["loss"])


def test_seeds_differ_and_share_a_compiled_step(tmp_path):
    @chex.assert_max_traces(1)
    def loss(model, batch):
        return squares(model, batch)

    transformation = optax.adam(0.1)
    runs = [adam(seed, transformation) for seed in range(3)]
    history = train_all(task_of(loss), runs, tmp_path, {})
    assert list(history) == runs
    assert len({rows[-1]["loss"] for rows in history.values()}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": lambda seed: Batches(7)},
        {"create_model": lambda rngs: Model(nnx.Rngs(7))},
    ],
    ids=["weights", "batches"],
)
def test_seeds_give_other(changes, tmp_path, progress):
    task = task_of(steps=1, **changes)
    first, second = (train(task, adam(x), tmp_path, progress) for x in range(2))
    assert first[0]["loss"] != second[0]["loss"]


def test_other_settings_are_refused(tmp_path):
    task, runs = task_of(steps=2), [adam()]
    train_all(task, runs, tmp_path, {"steps": 2, "data": None})
    train_all(task, runs, tmp_path, {"steps": 2, "data": None})
    with pytest.raises(ValueError, match=r"other settings: steps 2, now 4.*--output"):
        train_all(task_of(steps=4), runs, tmp_path, {"steps": 4, "data": None})
    with pytest.raises(ValueError, match="other settings: data None, now 'x'"):
        train_all(task, runs, tmp_path, {"steps": 2, "data": "x"})


def test_evaluation_leaves_the_model_in_training(tmp_path, progress):
    def evaluate(model):
        model.eval()
        return {"mean": float(model(jnp.ones((2, 3)))[0, 0])}

    with_eval = train(task_of(evaluate=evaluate), adam(), tmp_path / "a", progress)
    without = train(task_of(), adam(), tmp_path / "b", progress)
    assert [x["loss"] for x in with_eval] == [x["loss"] for x in without]
    assert len({x["mean"] for x in with_eval}) > 1
