"""Does the experiment at scale train what is missing, each by its own optimizer?"""

import math
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import at_scale
from experiments.at_scale import Key, Options, Size

SMALL = Size(steps=2, depth=1, width=512, context=8, batch=2, text=2**16)
FOLDER = Path(at_scale.__file__).parent


def options_of(tmp_path, **changes):
    usual = dict(rates=(1e-3,), size=SMALL, text=FOLDER, output=tmp_path)
    return Options(**usual | changes)


@pytest.mark.usefixtures("quick_compilation")
def test_what_is_missing_is_trained_and_nothing_twice(tmp_path, capsys):
    names = ("AdaMod", "AdaMod, 7 bytes")
    first = at_scale.main(options_of(tmp_path, optimizers=names[:1]))
    assert [*first] == [Key("AdaMod", 1e-3, 0)]
    both = at_scale.main(options_of(tmp_path, optimizers=names))
    assert [*both] == [Key(name, 1e-3, 0) for name in names]
    assert both.items() > first.items()
    assert all(0 < x < 8 for x in both.values())
    page = (tmp_path / "at_scale.md").read_text()
    assert f"| AdaMod, 7 bytes | {both[Key(names[1], 1e-3, 0)]:.3f} |" in page
    assert page in capsys.readouterr().out
    assert not [*(tmp_path / "runs").iterdir()]
    at_scale.main(options_of(tmp_path, rates=(1e-3, 2e-3), minutes=-1))
    assert at_scale.read(tmp_path / "at_scale.csv") == both
    with pytest.raises(ValueError, match="other settings"):
        at_scale.main(options_of(tmp_path, size=Size(steps=3)))


def test_the_model_has_38_million_parameters_and_bytes_to_match():
    text = np.zeros(10**5, np.uint8)
    task = at_scale.create_task(Size(), text)
    model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == pytest.approx(38e6, rel=0.02)
    for name, expected in (("AdaMod", 12), ("AdaMod, 8 bits", 3.02), ("Adam", 8)):
        creates = at_scale.create(at_scale.OPTIMIZERS[name], at_scale.Schedule(0.98))
        state = jax.eval_shape(creates(1e-3).init, params)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert held / count == pytest.approx(expected, rel=0.01)
    narrow = at_scale.in_bfloat16(task)
    model = nnx.eval_shape(lambda: narrow.create_model(nnx.Rngs(0)))
    assert model.logits.kernel.dtype == "bfloat16"
    rounded = at_scale.rounded(optax.adam)(1e-3)
    assert len(rounded.init({"w": np.ones(2, np.float32)})) == 2


def test_matrices_are_multiplied_in_bfloat16():
    task = at_scale.create_task(SMALL, np.zeros(2**12, np.uint8))
    model = task.create_model(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    text = forward.lower(state, np.zeros((1, 8), np.int32)).as_text()
    factors = re.findall(r"dot_general .*: \((.*)\) ->", text)
    assert len(factors) == 9  # four projections, two of attention, two layers, logits
    assert all(x.count("bf16>") == 2 for x in factors)


def test_validation_is_of_text_that_is_not_trained_on():
    training, validation = at_scale.split(np.arange(100_000))
    assert not {*training.tolist()} & {*validation.tolist()}
    assert len(validation) / 100_000 == pytest.approx(1 / at_scale.HELD_OUT, rel=0.1)


def test_who_diverged_is_said_so_and_never_the_best(tmp_path):
    path = tmp_path / "at_scale.csv"
    for rate, value in ((1e-3, 2.0), (1e-2, math.nan)):
        row = {"loss": value, "seconds": 1.0, "validation loss": value}
        at_scale.add(path, Key("Adam, linear warm-up over 50", rate, 0), row)
    at_scale.report(at_scale.read(path), np.zeros(9), options_of(tmp_path))
    page = (tmp_path / "at_scale.md").read_text()
    assert "| 2.000 | 2.000 | 1 of 1 diverged |" in page
    assert "tuned linear warm-up: 2.000." in page
