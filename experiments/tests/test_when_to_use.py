"""Does the comparison train what its stages ask for, and judge it as it says?"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tqdm import tqdm

from experiments import when_to_use
from experiments.common.comparison import GRID, Compared, best_rates, judge, result
from experiments.common.comparison_report import (
    geometric_mean,
    report_all,
    task_table,
)
from experiments.common.contestants import CONTESTANTS, Schedule, create
from experiments.common.training import Task
from experiments.data.changes import Switching, Weighted, easy_batches
from experiments.tasks import ppo, text
from experiments.tasks.changing import cosine, restarts, rewarmed, weighted_loss
from experiments.tasks.steady import Size
from experiments.tests.helpers import rows_of, run_of

SMALL = Size(unit=1, width=4)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def options_of(tmp_path, stage="first", **changes):
    return when_to_use.Options(
        **{
            "stage": stage,
            "tasks": ("post_ln_6",),
            "contestants": ("Adam",),
            "size": SMALL,
            "output": tmp_path,
        }
        | changes
    )


@pytest.mark.usefixtures("quick_compilation")
def test_stages(tmp_path, capsys):
    first = when_to_use.main(options_of(tmp_path))["post_ln_6"]
    assert [(x.learning_rate, x.seed) for x in first] == [(rate, 0) for rate in GRID]
    final = when_to_use.main(options_of(tmp_path, "final"))["post_ln_6"]
    by_rate = {
        rate: {x.seed for x in final if x.learning_rate == rate} for rate in GRID
    }
    finals = {x.learning_rate: rows[-1]["loss"] for x, rows in first.items()}
    worst = sorted(finals, key=finals.__getitem__)[3:]
    assert by_rate == {r: {0} if r in worst else {0, 1, 2} for r in GRID}
    # What was trained before is as it was, and a report trains nothing.
    of_first = {str(x): rows for x, rows in final.items() if x.seed == 0}
    assert of_first == {str(x): rows for x, rows in first.items()}
    options = options_of(tmp_path, "report", contestants=("Adam", "RAdam"))
    report = when_to_use.main(options)["post_ln_6"]
    assert [str(x) for x in report] == [str(x) for x in final]
    assert "| Adam | " in capsys.readouterr().out
    for name in ("post_ln_6/runs.jsonl", "when_to_use.md", "when_to_use.png"):
        assert (tmp_path / name).stat().st_size > 100
    lines = (tmp_path / "when_to_use.csv").read_text().splitlines()
    assert lines[0] == "task,optimizer,learning_rate,seed,value,spike"
    assert len(lines) == 1 + len(final)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("task", [x for x in when_to_use.TASKS if x not in ppo.TASKS])
def test_every_task(task):
    check_task(task)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("task", ppo.TASKS)
def test_every_game(task):
    pytest.importorskip("gymnax", reason="it is not for JAX 0.12 and later")
    check_task(task)


def check_task(name):
    """Twice the same, so from its seed alone; and its result is a number."""
    compared = when_to_use.TASKS[name](SMALL)
    creates = create(CONTESTANTS["Adam"], compared.schedule)
    runs = when_to_use.runs_of("Adam", creates, (1e-3,), (0,))
    with tqdm(disable=True) as bar:
        (first,), (second,) = (
            compared.train(compared.task, runs, bar).values() for _ in range(2)
        )
    assert [x["loss"] for x in first] == [x["loss"] for x in second]
    assert first[-1]["step"] == compared.task.steps
    assert math.isfinite(judge(compared, first).value)


def compared_of(**changes):
    task = Task(nnx.Module, lambda *x: jnp.zeros([]), lambda seed: [], 100, 1)
    return Compared(
        **{
            "task": task,
            "schedule": Schedule(0.98),
            "counted": ((90, 100),),
            "rates": RATES,
        }
        | changes
    )


def test_a_run_is_judged_by_the_rows_that_count():
    losses = [*np.linspace(5, 2, 90), *np.arange(10.0)]
    judged = judge(compared_of(), rows_of(*losses, every=1))
    assert judged.value == 4.5
    of_others = compared_of(counted=((0, 100),), left_out=((10, 100),))
    assert judge(of_others, rows_of(*losses, every=1)).value == pytest.approx(
        np.mean(losses[:10])
    )


def test_a_spike_rises_over_the_running_median():
    losses = [2.0] * 100
    assert judge(compared_of(), rows_of(*losses, every=1)).spike == 0.25
    losses[50] = 6.0
    assert judge(compared_of(), rows_of(*losses, every=1)).spike == 4.25
    losses[10] = 9.0  # before the first fifth is over
    assert judge(compared_of(), rows_of(*losses, every=1)).spike == 4.25
    easy = compared_of(left_out=((45, 55),))
    assert judge(easy, rows_of(*losses, every=1)).spike == 0.25


def test_a_diverged_run_has_no_result():
    judged = judge(compared_of(), rows_of(2.0, math.nan, every=1))
    assert math.isnan(judged.value)
    assert math.isnan(judged.spike)


def judged_of(*values):
    return [judge(compared_of(), rows_of(*[x] * 100, every=1)) for x in values]


def test_the_best_rate_has_all_seeds():
    by_rate = {
        1e-3: judged_of(1.0),  # one seed: lucky
        2e-3: judged_of(2.0, 3.0, 4.0),
        4e-3: judged_of(3.1, 3.1, 3.1),
        8e-3: judged_of(1.0, 1.0, math.nan),
    }
    found = result(compared_of(), by_rate)
    assert (found.rate, found.mean, found.seeds) == (2e-3, 3.0, 3)
    assert (found.lowest, found.highest) == (2.0, 4.0)
    assert found.width == 4  # from 1e-3 to 4e-3, which is 3 % from the best
    assert (found.failed, found.runs) == (1, 10)
    assert not found.at_edge
    higher = result(compared_of(higher_is_better=True), by_rate)
    assert (higher.rate, higher.mean) == (4e-3, pytest.approx(3.1))
    assert result(compared_of(), {1e-3: judged_of(math.nan)}) is None


def history_of(values, name="Adam", seed=0):
    return {
        run_of(name, rate, seed): rows_of(*[value] * 100, every=1)
        for rate, value in zip(RATES, values, strict=True)
    }


def test_best_rates():
    history = history_of([3.0, 1.0, math.nan, 2.0])
    assert best_rates(compared_of(), history, "Adam", 2) == [2e-3, 8e-3]
    assert best_rates(compared_of(), history, "Adam", 4)[-1] == 4e-3
    higher = compared_of(higher_is_better=True)
    assert best_rates(higher, history, "Adam", 2) == [1e-3, 8e-3]


def test_tuned_warm_ups_are_one_row():
    history = history_of([3.0, 2.0, 2.5, 9.0], "Adam, linear warm-up over 50")
    history |= history_of([3.0, 1.5, 2.5, 9.0], "Adam, linear warm-up over 200")
    history |= history_of([1.0, 9.0, 9.0, 9.0])
    lines = task_table(compared_of(), history).splitlines()[-2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| Adam", "0.001, the last tried", "1.000"],
        ["| Adam, tuned linear warm-up", "0.002", "1.500"],
    ]


def test_tables_of_all_tasks(tmp_path):
    tasks = {"one": compared_of(), "two": compared_of()}
    adamod = history_of([9.0, 3.0, 1.005, 3.0], "AdaMod, b3 0.99")
    histories = {
        "one": history_of([2.0, 1.0, 1.04, 9.0])
        | history_of([9.0, 2.0, 4.0, 3.0], "AMSGrad")
        | adamod,
        "two": history_of([4.0, 9.0, 8.0, 9.0]) | adamod,
    }
    report_all(tasks, histories, tmp_path, {"steady": ["one"], "games": ["two"]})
    written = (tmp_path / "when_to_use.md").read_text()
    assert "| AdaMod, b3 0.99 | 2 | 1.002 | 1.005 | 1.000 | 1.005 | 2 |  |" in written
    assert (
        "| Adam | 2 | 1.995 | 1.000 | 3.980 | 3.980 | 1 | 1, 0 of 2 | 1.4 | 1.00 |"
        in written
    )
    assert (
        "| AMSGrad | 1 | 2.000 | 2.000 |  | 2.000 | 0 | 1, 0 of 1 | 1.0 | 1.00 |"
        in written
    )
    assert "| one | 1.000 | 2.000 | 1.005 |\n| two | 3.980 |  | 1.000 |\n" in written
    lines = (tmp_path / "when_to_use.csv").read_text().splitlines()
    assert "one,AMSGrad,0.004,0,4,0.25" in lines


def test_who_fails_once_fails_on_the_whole():
    assert geometric_mean([1.0, 4.0]) == 2
    assert geometric_mean([1.0, math.inf]) == math.inf


def test_batches_change_in_spans():
    switching = Switching(range(100), range(1000, 1100), ((2, 4), (6, 7)))
    assert [switching[i] for i in range(8)] == [0, 1, 1002, 1003, 4, 5, 1006, 7]
    easy = easy_batches(4, 3)[5]["tokens"]
    np.testing.assert_array_equal(easy, np.full((3, 5), ord(" ")))


@pytest.mark.usefixtures("quick_compilation")
def test_a_weight_scales_gradients_and_not_the_loss():
    model = text.model_of(1, SMALL.width)(nnx.Rngs(0))
    batch = easy_batches(text.CONTEXT, 2)
    full, small = (Weighted([batch[0]], lambda step, w=w: w)[0] for w in (1.0, 1e-3))
    (loss, gradient), (same, smaller) = (
        nnx.jit(nnx.value_and_grad(weighted_loss))(model, x) for x in (full, small)
    )
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(smaller), strict=True):
        np.testing.assert_allclose(b, 1e-3 * a, rtol=1e-4, atol=1e-9)


def test_learning_rates_jump():
    size = Size(unit=100)
    assert cosine(0.0) == 1
    assert cosine(1.0) == pytest.approx(0.01)
    for compared, jumps in (
        (restarts(size), (200, 400, 600)),
        (rewarmed(size), (400,)),
    ):
        schedule = compared.schedule
        shape = np.array([schedule.shape(jnp.asarray(i)) for i in range(800)])
        assert tuple(1 + np.flatnonzero(np.diff(shape) > 0)) == jumps
        since = [int(schedule.since_jump(jnp.asarray(i))) for i in range(800)]
        assert tuple(np.flatnonzero(np.diff(since) < 0) + 1) == jumps
