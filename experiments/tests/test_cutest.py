"""Does the experiment on CUTEst's problems minimise, and count what is solved?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cutest
from experiments.common.contestants import CONTESTANTS, Schedule, create

pytestmark = pytest.mark.usefixtures("quick_compilation")


def quadratic(x):
    return jnp.sum(jnp.square(x - 1))


def test_lowest_is_that_of_the_optimizer():
    start, rates = jnp.zeros(2), (1e-2, 0.3)
    creates = [create(CONTESTANTS[x], Schedule(cutest.B2)) for x in ("AMSGrad", "Adam")]
    _, found = cutest.lowest(quadratic, start, creates, rates, 30)
    for rate, values in zip(rates, found, strict=True):
        x, tx = start, optax.adam(rate, b2=cutest.B2)
        state, expected = tx.init(x), []
        for _ in range(30):
            value, gradient = jax.value_and_grad(quadratic)(x)
            expected.append(float(value))
            updates, state = tx.update(gradient, state)
            x = optax.apply_updates(x, updates)
        lowest = np.minimum.accumulate(expected)
        np.testing.assert_allclose(values, lowest, rtol=1e-4, atol=1e-6)
    assert expected[-1] > lowest[-1]  # it overshoots, so the lowest is told apart


def test_solved_is_near_the_best_of_all(monkeypatch):
    first = {
        "Adam": {"0.1": [10.0, 5.0, 0.02], "1": [10.0, 9.0, None]},
        "RAdam": {"0.1": [10.0, 0.0, 0.0], "1": [10.0, 10.0, 10.0]},
    }
    monkeypatch.setattr(cutest, "TOLERANCE", 1e-2)
    found = cutest.solved([first])
    np.testing.assert_array_equal(found["Adam"][0], [[0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(found["RAdam"][0], [[0, 1, 1], [0, 0, 0]])
    monkeypatch.setattr(cutest, "TOLERANCE", 1e-3)
    assert not cutest.solved([first])["Adam"].any()


def test_csv_says_when_a_problem_was_solved(tmp_path, monkeypatch):
    monkeypatch.setattr(cutest, "RATES", (0.1, 1.0))
    done = np.zeros((1, 2, cutest.KEPT + 1), bool)
    done[0, 1, 3:] = True
    path = tmp_path / "cutest.csv"
    cutest.write_csv({"Adam": done}, ["ONE"], path)
    lines = path.read_text().splitlines()
    assert lines == ["problem,optimizer,lr 0.1,lr 1", "ONE,Adam,,120"]


@pytest.mark.slow
def test_a_problem(tmp_path, capsys, monkeypatch):
    for name, value in {"NAMES": ("Adam",), "RATES": (1e-3, 0.1), "STEPS": 40}.items():
        monkeypatch.setattr(cutest, name, value)
    options = cutest.Options(problems=("ROSENBR",), output=tmp_path)
    found = cutest.main(options)
    assert found["Adam"].shape == (1, 2, cutest.KEPT + 1)
    assert "| Adam | 0.1 | 100.0 | 100.0 |" in capsys.readouterr().out
    saved = (tmp_path / "problems" / "ROSENBR.json").stat().st_mtime_ns
    np.testing.assert_array_equal(cutest.main(options)["Adam"], found["Adam"])
    assert (tmp_path / "problems" / "ROSENBR.json").stat().st_mtime_ns == saved
