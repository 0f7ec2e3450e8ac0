"""Do tables, curves and the sweep say what happened?"""

import csv
import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import learning_rate_sweep as sweep
from experiments.common import plateau, report
from experiments.data import text
from experiments.tests.helpers import rows_of, run_of

HISTORY = {
    run_of(seed=0): rows_of(3.0, 2.0, 1.0),
    run_of(seed=1): rows_of(3.0, 2.5, 2.0),
    run_of(rate=1.0, seed=0): rows_of(3.0, math.nan),
    run_of(rate=1.0, seed=1): rows_of(3.0, 3.5, 4.0),
    run_of("AdaMod", b3=0.9, seed=0): rows_of(3.0, 1.0, 0.5),
}


def test_table():
    lines = report.final_table(HISTORY, "loss", last=1).splitlines()
    assert lines[0] == "Loss after 30 steps, mean (lowest to highest) of 2 seeds:"
    assert lines[2:] == [
        "| optimizer | lr 0.1 | lr 1 | steps |",
        "| --- | --- | --- | --- |",
        "| Adam | 1.500 (1.000 to 2.000) "
        "| 4.000 (4.000 to 4.000), 1 of 2 diverged | 30 |",
        "| AdaMod | 0.500 |  | 30, 3.0 horizons of 10 |",
    ]


def test_table_of_an_earlier_step_and_of_several_rows():
    table = report.final_table(report.until(HISTORY, 20), "loss", last=2)
    assert table.startswith("Loss after 20 steps")
    assert "| Adam | 2.625 (2.500 to 2.750) |" in table
    assert "3.250 (3.250 to 3.250), 1 of 2 diverged" in table
    assert "| AdaMod | 2.000 |  | 20, 2.0 horizons of 10 |" in table


def test_a_run_that_diverges_later_counts_before():
    table = report.final_table(report.until(HISTORY, 10), "loss", last=1)
    assert "diverged" not in table
    assert "| Adam | 3.000 (3.000 to 3.000) | 3.000 (3.000 to 3.000) | 10 |" in table


def test_all_diverged():
    assert report.spread([math.nan, math.nan]) == "2 of 2 diverged"


def test_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py", "--seeds", "2"])
    report.report("x", HISTORY, "loss", tmp_path / "new", extra=["More."])
    text = (tmp_path / "new/x.md").read_text()
    assert text.startswith("# x\n\n`python -m experiments.x --seeds 2`, 20")
    assert "0 minutes" in text
    assert text.endswith("\n\nMore.\n")
    assert text.removeprefix("# x\n") in capsys.readouterr().out
    with (tmp_path / "new/x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(HISTORY)
    assert rows[1] == {
        "optimizer": "Adam", "learning_rate": "0.1", "seed": "1", "step": "30",
        "loss": "2", "highest loss": "2.25", "seconds": "3",
    }  # fmt: skip
    assert rows[2]["loss"] == "nan"


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([4.0, 3.0, 2.8], "never left"),
        ([4.0, 2.7, 2.6], "left 20"),
        ([4.0, 2.7, 2.8, 2.95, 3.1], "left 20, back 40"),
        ([2.7, 3.1, 2.8, 2.7], "left 10, back 20, left 40"),
        ([2.7, 2.0, math.nan], "left 10, back 30, diverged 30"),
        ([4.0, math.nan], "never left, diverged 20"),
    ],
)
def test_leaving_the_plateau(losses, words):
    assert plateau.path_of(rows_of(*losses), plateau=3.0) == words


def test_heat_map(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plateau.plt, "close", figures.append)
    history = HISTORY | {
        run_of("AdaMod", rate=1.0, seed=0): rows_of(1.0, 2.0, 3.0),
        run_of("AdaMod", rate=1.0, seed=1): rows_of(3.0, 2.0, 1.0),
    }
    plateau.draw_heat_map(history, 3.0, 1, tmp_path / "map.png")
    monkeypatch.undo()
    (figure,) = figures
    axis = figure.axes[0]
    (image,) = axis.images
    np.testing.assert_array_equal(
        np.ma.filled(image.get_array(), np.nan), [[1.5, np.nan], [0.5, 2.0]]
    )
    texts = {
        (round(x.get_position()[1]), round(x.get_position()[0])): x.get_text()
        for x in axis.texts
    }
    assert texts[0, 0] == "1.50\nleft at 20"
    assert texts[0, 1] == "diverged\n2 of 2 never left"
    assert texts[1, 0] == "0.50\nleft at 20"
    assert texts[1, 1] == "2.00\nleft at 20\n1 of 2 fell back"
    assert [x.get_text() for x in axis.get_yticklabels()] == ["Adam", "AdaMod"]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    plt.close(figure)


@pytest.mark.usefixtures("quick_compilation")
def test_sweep_runs(tmp_path, capsys, monkeypatch):
    small = dict(STEPS=41, EARLY=20, WARMUP=4, DEPTH=1, WIDTH=4, BATCH=4)
    for name, value in small.items():
        monkeypatch.setattr(sweep, name, value)
    options = sweep.Options(rates=(1e-3,), output=tmp_path)
    history = sweep.main(options)
    names = [run.optimizer for run in history]
    assert names == [
        "Adam", "Adam, 4 steps of warm-up", "RAdam",
        "AdaMod, b3 0.99", "AdaMod, b3 0.999",
    ]  # fmt: skip
    assert {run.optimizer: run.b3 for run in history if run.b3} == {
        "AdaMod, b3 0.99": 0.99, "AdaMod, b3 0.999": 0.999,
    }  # fmt: skip
    for rows in history.values():
        assert [row["step"] for row in rows] == [20, 40, 41]
        assert abs(rows[0]["loss"] - math.log(256)) < 1
    first, *_, slowest = history.values()
    assert first[1]["loss"] < slowest[1]["loss"]
    printed = capsys.readouterr().out
    assert "Loss after 20 steps:" in printed
    assert "Loss after 40 steps" not in printed
    assert "Loss after 41 steps:" in printed
    assert (
        "| AdaMod, b3 0.999 | 0.001 | never left | 41, 0.0 horizons of 1,000 |"
        in printed
    )
    assert (tmp_path / "heat_map.png").exists()


def test_whole_grid():
    options = sweep.Options(whole=True)
    assert options.rates == (1e-3, 3e-3, 1e-2, 3e-2)
    runs = sweep.runs_of(options)
    assert len(runs) == len(set(runs)) == 5 * 4 * 3
    # Eight horizons of the shorter memory, and three of the longer.
    assert sweep.EARLY >= 8 / (1 - 0.99)
    assert sweep.STEPS >= 3 / (1 - 0.999) - 1e-9


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"rates": (0.0,)}, "--rates must be positive"),
        ({"rates": ()}, "--rates must be positive"),
        ({"variance": 0.0}, "--variance must be positive"),
    ],
)
def test_nonsense_is_refused(nonsense, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sweep.Options(), **nonsense)


def test_unigram_entropy():
    found = np.frombuffer(b"aab", np.uint8)
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert text.unigram_entropy(found) == pytest.approx(expected)


def test_windows_of_text():
    found = np.arange(100, dtype=np.uint8)
    batches = text.batches(found, context=4, seed=0, size=8)
    windows = np.concatenate([batches[i]["tokens"] for i in range(12)])
    assert windows.shape == (96, 5)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(
        windows - windows[:, :1], np.tile(np.arange(5), (96, 1))
    )
    assert sorted(windows[:, 0]) == list(range(96))
    again = text.batches(found, context=4, seed=0, size=8)
    np.testing.assert_array_equal(again[3]["tokens"], batches[3]["tokens"])
    other = text.batches(found, context=4, seed=1, size=8)
    assert not np.array_equal(other[0]["tokens"], batches[0]["tokens"])
