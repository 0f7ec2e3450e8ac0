"""Is each optimizer's own update timed, and does its row say what was measured?"""

import importlib.util
import json
import os

import jax
import numpy as np
import optax
import pytest

from benchmarks import compiled, step_time
from benchmarks.common import optimizers, timing, torch_optimizers, trees


def test_update_is_the_optimizers():
    tree = trees.equal_leaves(64, 2)
    update = timing.Update(optimizers.updates_of(optimizers.ADAM), tree)
    update.run(3)
    tx, params = optax.adam(1e-3), {name: np.zeros(32) for name in tree}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(timing.gradients(tree), state)
        params = optax.apply_updates(params, updates)
    for name in tree:
        np.testing.assert_allclose(update.params[name], params[name], 1e-5)
    assert update.opt_state[0].count == 3


def test_a_process_of_its_own_is_another_one():
    with timing.a_process() as run:
        other = run(os.getpid)
        assert run(os.getpid) == other != os.getpid()
        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)


def test_tables_are_written(tmp_path, capsys, monkeypatch):
    """What is not installed is left out of them, and named."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torch_optimizers.missing() == set(torch_optimizers.NAMES)
    options = step_time.Options(
        rounds=2, cases=("leaves", "sizes"), parameters=320, leaves=(1, 16),
        largest=1e3, optimizers=("AdaMod", "PyTorch Adam, fused"), output=tmp_path,
    )  # fmt: skip
    tables = step_time.main(options)
    assert [*tables] == [
        "256 parameters in 1 leaves",
        "320 parameters in 16 leaves",
        "896 parameters in one leaf",
    ]
    saved = json.loads((tmp_path / "step_time.json").read_text())
    assert saved["tables"] == tables
    assert {"jax", "optax", "python"} <= set(saved["versions"])
    for rows in tables.values():
        assert [row["optimizer"] for row in rows] == ["Adam", "AdaMod"]
        assert all(row["of Adam's time"] > 0 for row in rows)
    missing = "Not installed, so left out: PyTorch Adam, fused."
    for text in capsys.readouterr().out, (tmp_path / "step_time.md").read_text():
        assert all(x in text for x in [missing, *(f"## {title}" for title in tables)])


def test_each_result_is_written_when_it_is_there(tmp_path, monkeypatch):
    """Also of an optimizer that fails, which says why, and the others go on."""

    def compare(optimizer, tree, rounds):
        if optimizer == "RAdam":
            raise MemoryError("no room")
        written = tmp_path / "step_time.json"
        seen.append(json.loads(written.read_text()) if written.exists() else None)
        return dict.fromkeys(step_time.COLUMNS, 1.0)

    seen = []
    monkeypatch.setattr(step_time, "compare", compare)
    options = step_time.Options(
        cases=("sizes",), largest=1e3, optimizers=("RAdam", "Lion"), output=tmp_path
    )
    ((title, rows),) = step_time.main(options).items()
    assert [row["optimizer"] for row in rows] == ["Adam", "RAdam", "Lion"]
    assert rows[1]["failed"] == "MemoryError: no room"
    assert seen[0] is None
    assert len(seen[1]["tables"][title]) == 2


@pytest.mark.parametrize("name", compiled.COMPARED)
def test_weights_keep_the_dtype_that_an_optimizer_is_for(name):
    dtype = optimizers.weights_dtype(name)
    tree = trees.one_leaf(2, 128, dtype=dtype)
    tx = optimizers.OPTIMIZERS[name]()
    params, _, updates = jax.eval_shape(
        optimizers.step_in_place(tx), tree, jax.eval_shape(tx.init, tree), tree
    )
    assert params["kernel"].dtype == dtype
    assert updates.keys() == tree.keys()


def test_bytes_that_an_update_moves():
    tree = trees.equal_leaves(10**6, 1)
    names = ("Adam", "AdaMod", "AdaMod, bfloat16 mu and bound", *torch_optimizers.NAMES)
    moved = [step_time.bytes_per_step(name, tree) / 1e6 for name in names]
    np.testing.assert_allclose(moved, [28, 36, 28] + [28] * 2 + [36] * 3, atol=0.001)
    halved = trees.one_leaf(1000, 1024, dtype="bfloat16")
    moved = step_time.bytes_per_step(optimizers.ADAMOD_7_BYTES, halved) / 1.024e6
    assert moved == pytest.approx(6 + 2 * 3 * (1 + 1 / 128), abs=1e-4)


def test_tracing_starts_from_nothing(monkeypatch):
    @jax.jit
    def negative(x):
        traced.append(x.shape)
        return -x

    traced = []
    tx = optax.stateless(lambda updates, _: jax.tree.map(negative, updates))
    monkeypatch.setitem(optimizers.OPTIMIZERS, "of one function", lambda: tx)
    row = step_time.compiling("of one function", trees.equal_leaves(64, 2), repeats=2)
    assert traced == [(32,)] * 3  # once more to lower and compile
    assert row["a leaf, ms"] == row["trace, ms"] / 2 > 0
    assert row["leaves"] == 2
