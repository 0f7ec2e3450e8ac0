"""Do the examples run, and do they refuse nonsense?"""

import csv
import dataclasses
import math
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from examples import warmup_free_transformer as example
from examples import watch_training
from examples.common import learning_rate_figure
from examples.common.stdlib_text import load_text
from optax_adamod import adamod, learning_rates

ROOT = Path(__file__).parents[2]


def test_quickstart_classifies_digits(capsys):
    runpy.run_module("examples.quickstart")
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert float(accuracy) > 95


@pytest.mark.usefixtures("quick_compilation")
def test_transformer_writes_losses_and_figure(tmp_path, capsys, monkeypatch):
    drawn = []

    def plot(runs, rates, bins, path):
        drawn.append(rates)
        learning_rate_figure.plot(runs, rates, bins, path)

    monkeypatch.setattr(example, "plot", plot)
    monkeypatch.setattr(example, "BATCH", 8)
    monkeypatch.setattr(example, "CONTEXT", 16)
    options = example.Options(
        steps=24, depth=1, width=16, seeds=2, output=tmp_path / "new"
    )
    runs = example.main(options)
    assert list(runs) == [
        "Adam",
        "Adam, linear warm-up over 100 steps",
        "Adam, exponential warm-up, b3 0.99",
        "RAdam",
        "AdaMod, b3 0.99",
    ]
    for losses in runs.values():
        assert np.shape(losses) == (2, 24)
        # An untrained model is at ln 256, and learns which bytes are common first.
        assert np.all(np.abs(np.asarray(losses)[:, 0] - math.log(256)) < 1)
        first, last = (np.asarray(losses)[:, x].mean(axis=1) for x in np.s_[:5, -5:])
        assert np.all(last < first - 0.1)
    # Seeds differ, and optimizers start alike.
    starts = np.asarray(list(runs.values()))[:, :, 0]
    np.testing.assert_allclose(starts, np.broadcast_to(starts[0], (5, 2)), rtol=1e-6)
    assert starts[0, 0] != starts[0, 1]
    (rates,) = drawn
    assert list(rates) == ["Adam", "AdaMod, b3 0.99"]
    centres = (example.BINS[1:] + example.BINS[:-1]) / 2
    adam, ours = (x @ centres / x.sum(axis=1) for x in rates.values())
    assert len(adam) == 24
    # The bound opens as if it averaged a constant, for the first steps at least.
    opened = np.log10(1 - 0.99 ** np.arange(1, 25))
    assert np.all(np.abs(ours - adam - opened) < 0.3)
    printed = capsys.readouterr().out
    for name, losses in runs.items():
        mean = np.mean(np.asarray(losses)[:, -example.FINAL :])
        assert f"| {name} | {mean:.2f} |" in printed
    figure, table = tmp_path / "new" / "losses.png", tmp_path / "new" / "losses.csv"
    assert str(figure) in printed
    assert str(table) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 * 24
    assert float(rows[-1]["loss"]) == runs[rows[-1]["optimizer"]][1][-1]


def test_warm_ups_of_the_compared_optimizers():
    steps = np.arange(1, 151)
    factors = {
        "Adam": np.ones(150),
        "linear": np.minimum(1, steps / 100),
        "exponential": 1 - 0.9**steps,
        "AdaMod": 1 - 0.9**steps,  # while gradients are constant
    }
    compared = example.optimizers(example.Options(learning_rate=0.5, b3=0.9))
    for part, expected in factors.items():
        name = next(x for x in compared if part in x)
        params, tx = np.ones(3, np.float32), compared[name]

        def step(state, _, tx=tx, params=params):
            updates, state = tx.update(params, state, params)
            return state, updates

        _, updates = jax.lax.scan(step, tx.init(params), length=150)
        np.testing.assert_allclose(
            updates, np.broadcast_to(-0.5 * expected[:, None], (150, 3)), rtol=1e-4
        )


def test_learning_rates_of_adam_and_adamod():
    params = np.linspace(1e-3, 2e-2, 100, dtype=np.float32).reshape(4, 25)
    counts = {}
    for name, tx in {
        "adam": optax.adam(3e-3, b2=example.B2),
        "unbounded": adamod(3e-3, b2=example.B2, b3=0.0),
        "bounded": adamod(3e-3, b2=example.B2, b3=0.99),
    }.items():
        tree = {"a": params, "b": params}
        _, state = tx.update(tree, tx.init(tree))
        counts[name] = np.asarray(example.count_rates(state, 3e-3))
        assert counts[name].sum() == 200
    np.testing.assert_array_equal(counts["adam"], counts["unbounded"])
    # The first bound is a hundredth of the rate: two decades, of ten bins each.
    np.testing.assert_array_equal(counts["adam"][20:], counts["bounded"][:-20])


def test_three_panels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(learning_rate_figure.plt, "close", figures.append)
    bins = np.linspace(-1, 2, 31)
    rates = {k: np.ones((5, 30)) for k in ("Adam", "AdaMod")}
    rates["Adam"][3, 7] = 101
    names = ("Adam", "linear", "exponential", "RAdam", "AdaMod")
    runs = {k: [[4.0, 2.0, *[1.0] * 18, 5.0]] for k in names}
    learning_rate_figure.plot(runs, rates, bins, tmp_path / "figure.png")
    monkeypatch.undo()
    (figure,) = figures
    losses, left, right, colours = figure.axes
    assert [x.get_label() for x in losses.lines] == list(runs)
    assert len({x.get_color() for x in losses.lines}) == len(runs)
    for line in losses.lines:
        drawn = line.get_ydata()[[0, 1, 2, 19, 20]]
        np.testing.assert_allclose(drawn, [4, 3, 7 / 3, 24 / 20, 25 / 20])
    assert losses.get_ylabel().startswith("training loss, nats per byte")
    for axes, name in ((left, "Adam"), (right, "AdaMod")):
        (mesh,) = axes.collections
        share = rates[name] / rates[name].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(mesh.get_array(), share.T)
        assert mesh.get_clim() == (0, 101 / 130)
        assert axes.get_title() == f"Learning rates of {name}"
        assert (axes.get_xlabel(), axes.get_yscale()) == ("step", "log")
        assert axes.get_xlim() == (0.5, 5.5)
        np.testing.assert_allclose(axes.get_ylim(), (0.1, 100))
    assert left.get_ylabel() == "learning rate, parameter per gradient"
    assert "share of the coordinates" in colours.get_xlabel()
    plt.close(figure)


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"depth": 0}, "--depth must be at least 1, got 0"),
        ({"steps": 5}, "--steps must be at least 20"),
        ({"seeds": -1}, "--seeds must be at least 1, got -1"),
        ({"width": 30}, "--width must be a multiple of 4"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive, got 0.0"),
        ({"b3": 1.0}, r"--b3 must be in \[0, 1\), got 1.0"),
    ],
)
def test_nonsense_is_refused(nonsense, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(example.Options(), **nonsense)


def test_too_short_a_text_is_refused(tmp_path):
    (tmp_path / "short.py").write_text("x = 1\n")
    with pytest.raises(
        ValueError, match=f"{re.escape(str(tmp_path))} hold 6 bytes; one batch"
    ):
        load_text(tmp_path, at_least=2048)


def test_command_line_says_what_is_wrong():
    module = "examples.warmup_free_transformer"
    result = subprocess.run(
        [sys.executable, "-m", module, "--depth", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "--depth must be at least 1, got 0." in result.stderr
    assert "Traceback" not in result.stderr


def events(folder):
    """The events that TensorBoard would read: records of a length, and checksums."""
    (file,) = folder.glob("events.out.tfevents.*")
    data, position = file.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield Event.FromString(data[position + 12 : position + 12 + length])
        position += 12 + length + 4


def test_tensorboard_reads_the_learning_rates(tmp_path):
    watch_training.main(steps=20, output=tmp_path)
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    layers = [f"layers/{i}/{name}" for i in (0, 2) for name in ("bias", "kernel")]
    scalars = {
        (step, v.tag): v.simple_value for step, v in values if not v.HasField("histo")
    }
    tags = ["loss"] + [f"bound_{k}/{x}" for k in ("share", "factor") for x in layers]
    assert set(scalars) == {(step, tag) for step in (10, 20) for tag in tags}
    for (_, tag), value in scalars.items():
        if tag.startswith("bound_share"):
            assert 0.5 < value <= 1  # the bound has 1 / (1 - b3) steps to open
        elif tag.startswith("bound_factor"):
            assert 3 < value < 20
    assert scalars[20, "loss"] < scalars[10, "loss"] < math.log(10) + 0.1
    histograms = {step: v.histo for step, v in values if v.HasField("histo")}
    assert list(histograms) == [10, 20]
    for histogram in histograms.values():
        # The pixels in the corners are always 0: their weights have no gradient.
        assert 0.8 * 64 * 128 < sum(histogram.bucket) < 64 * 128 + 128 + 1280 + 10
        assert histogram.num == sum(histogram.bucket)
        assert len(histogram.bucket) == len(histogram.bucket_limit) == 42
        assert np.all(np.diff(histogram.bucket_limit) > 0)
    means = [h.sum / h.num for h in histograms.values()]
    assert means[0] < means[1]  # it opens


def test_tensorboard_buckets_hold_the_rates_up_to_their_limits(tmp_path):
    params = nnx.State({"w": nnx.Param(np.geomspace(1e-9, 1e7, 60, dtype=np.float32))})
    tx = adamod(watch_training.LEARNING_RATE, b3=0.99)
    _, state = tx.update(params, tx.init(params))
    with watch_training.SummaryWriter(str(tmp_path)) as writer:
        watch_training.write(writer, state, 1)
    (histogram,) = (
        v.histo
        for e in events(tmp_path)
        for v in e.summary.value
        if v.HasField("histo")
    )
    rates = learning_rates(state, watch_training.LEARNING_RATE).bounded
    (rates,) = jax.tree.leaves(rates)
    limits = np.asarray(histogram.bucket_limit)
    limits[-1] = np.inf
    expected, _ = np.histogram(np.log10(rates), [-np.inf, *limits])
    np.testing.assert_array_equal(histogram.bucket, expected)
    assert expected[0] > 0  # below the bins
    assert expected[-1] > 0  # above them
