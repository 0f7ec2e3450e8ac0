"""Are runs that are trained side by side what each of them is alone?"""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.contestants import CONTESTANTS, Schedule, at_rate, create
from experiments.common.together import (
    finished_so_far,
    go_on_together,
    key_of,
    read,
    train_together,
    write,
)
from experiments.common.training import Run, train
from experiments.tests.helpers import squares, task_of, without_seconds

pytestmark = pytest.mark.usefixtures("quick_compilation")
CREATES = create(CONTESTANTS["AdaMod, b3 0.99"], Schedule(0.98))


def runs_of(rates, seeds=(0,)):
    return [
        Run("AdaMod", at_rate(CREATES, rate), rate, seed)
        for rate in rates
        for seed in seeds
    ]


def test_each_run_is_as_it_were_alone(tmp_path, progress):
    """With statistics of batch normalisation, and the same dropout."""
    task = task_of(
        evaluate=lambda model: {"kernel": float(jnp.sum(model.out[0].kernel[...]))},
        evaluate_every=10,
    )
    runs = runs_of((1e-3, 1e-2))
    together = go_on_together(task, runs, progress)
    for run in runs:
        alone = without_seconds(train(task, run, tmp_path, progress))
        mine = without_seconds(together[run])
        assert [sorted(row) for row in mine] == [sorted(row) for row in alone]
        for name in ("step", "loss", "highest loss"):
            np.testing.assert_allclose(
                [row[name] for row in mine], [row[name] for row in alone], rtol=1e-4
            )
        assert mine[-1]["kernel"] == pytest.approx(alone[-1]["kernel"], rel=1e-4)
    for name in ("loss", "kernel"):
        first, second = (together[run][-1][name] for run in runs)
        assert abs(first - second) > 1e-3 * abs(first)


def test_who_diverges_leaves_the_others_alone(progress):
    task = task_of()
    fine, wild = runs_of((0.1, 1e38))
    found = go_on_together(task, [fine, wild], progress)
    (expected,) = go_on_together(task, [fine], progress).values()
    np.testing.assert_allclose(
        [row["loss"] for row in found[fine]], [row["loss"] for row in expected],
        rtol=1e-4,
    )  # fmt: skip
    *_, last = found[wild]
    assert math.isnan(last["loss"])
    assert "highest loss" not in last
    assert len(found[wild]) < len(found[fine])


def test_what_is_done_is_kept_and_not_done_again(tmp_path, progress):
    path = tmp_path / "runs.jsonl"
    runs = runs_of((0.1, 0.2), seeds=(0, 1))
    seeds = []

    def fails_at_1(task, runs, progress):
        seeds.append(runs[0].seed)
        if seeds == [0, 1]:
            raise KeyboardInterrupt
        return go_on_together(task, runs, progress)

    with pytest.raises(KeyboardInterrupt):
        train_together(task_of(), runs, path, progress, fails_at_1)
    assert {run.seed for run in finished_so_far(runs, path)} == {0}
    kept = read(path)
    history = train_together(task_of(), runs, path, progress, fails_at_1)
    assert seeds == [0, 1, 1]
    assert [*history] == runs
    assert {key: read(path)[key] for key in kept} == kept
    assert train_together(task_of(), runs, path, progress, fails_at_1) == history
    assert seeds == [0, 1, 1]


def test_the_file_has_what_was_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    rows = [
        {"step": 1, "loss": 1 / 3, "highest loss": 2.0, "seconds": 0.1},
        {"step": 2, "loss": math.nan, "seconds": 0.2, "accuracy": 123456.7},
    ]
    (run,) = runs_of((1e-3,))
    write(path, {key_of(run): rows})
    first, second = read(path)[key_of(run)]
    assert first == {"step": 1, "loss": 0.33333, "highest loss": 2, "seconds": 0.1}
    assert math.isnan(second.pop("loss"))
    assert second == {"step": 2, "seconds": 0.2, "accuracy": 123460}


def test_runs_of_one_optimizer(progress):
    """They share a compiled step, so another optimizer's would be trained wrongly."""
    (run,) = runs_of((0.1,))
    other = Run("SGD", optax.sgd(0.1), 0.1, 0)
    with pytest.raises(ValueError, match="too many values"):
        go_on_together(task_of(squares), [run, other], progress)
