"""Does a training that PyTorch's AdaMod began go on as if PyTorch went on?"""

import copy
import functools
import inspect
import json
import re
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from optax_adamod import adamod, adamodw, from_torch

TESTS = Path(__file__).parent
MODELS = np.load(TESTS / "golden_model.npz")
PAGE = (TESTS.parent / "docs" / "from_pytorch.md").read_text()
NAMES = [str(name) for name in MODELS["names"]]
TX = adamodw(1e-2, b2=0.98, b3=0.95, eps=1e-6, weight_decay=0.1, convention="torch")
# The model of golden_model.npz.
MODEL = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])


def to_tree(arrays):
    """Names and layouts of Flax, for those of PyTorch."""
    return {
        f"layers_{i}": {"kernel": arrays[f"{i}.weight"].T, "bias": arrays[f"{i}.bias"]}
        for i in (0, 2)
    }


def model_params(package, when="before"):
    return {name: MODELS[f"{package}/{when}/{name}"] for name in NAMES}


def model_state_dict(package):
    state = {}
    for key in MODELS.files:
        if key.startswith(f"{package}/state/"):
            index, field = key.split("/")[2:]
            state.setdefault(int(index), {})[field] = MODELS[key]
    groups = json.loads(str(MODELS[f"{package}/param_groups"]))
    return {"state": state, "param_groups": groups}


FRESH = adamod(1e-2).init(to_tree(model_params("adamod")))


def convert(state_dict, state=FRESH):
    return from_torch(state_dict, NAMES, to_tree, state)


@functools.partial(jax.jit, static_argnums=0)
def step_of(tx, params, state, inputs, targets):
    def loss_fn(params):
        return jnp.mean((MODEL.apply({"params": params}, inputs) - targets) ** 2)

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state


def assert_goes_on(package, tx, params, state):
    assert optax.tree.get(state, "count") == 30
    after = model_params(package, "after")
    for t in range(len(MODELS["inputs"])):
        data = MODELS["inputs"][t], MODELS["targets"][t]
        params, state = step_of(tx, params, state, *data)
        expected = to_tree({name: values[t] for name, values in after.items()})
        chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("package", ["adamod", "torch_optimizer", "pytorch_optimizer"])
def test_a_model_goes_on(package, x64):
    params = jax.tree.map(jnp.asarray, to_tree(model_params(package)))
    state = convert(model_state_dict(package), TX.init(params))
    assert_goes_on(package, TX, params, state)


def edited(edit, package="adamod"):
    state_dict = copy.deepcopy(model_state_dict(package))
    edit(state_dict["state"], state_dict["param_groups"])
    return state_dict


def split(s, g):
    del s[3]["step"]
    g.append({"params": [g[0]["params"].pop()], "step": 12})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s, g: s.pop(1), "'0.bias' has no averages, for it never had a grad"),
        (lambda s, g: s[2].pop("exp_avg"), r"of '2.weight' lacks exp_avg\.$"),
        (lambda s, g: s[2].pop("exp_avg_lr"), "of '2.weight' .* is not AdaMod"),
        (
            lambda s, g: s[2].update(max_v=1),
            "holds max_v, which AdaMod does not",
        ),
        (lambda s, g: s[2].update(step=29), "'0.weight' is at 30, '2.weight' at 29"),
        (split, "'0.weight' is at 30, '2.bias' at 12"),
        (lambda s, g: s[2].pop("step"), "neither the state of '2.weight' nor its"),
        *[
            (
                lambda s, g, x=x: s[2].update(step=x),
                "step of '2.weight' must be one who",
            )
            for x in ([3, 4], [], 7.5, np.nan, "30", True)
        ],
        (
            lambda s, g: s[3].update(exp_avg=1j * s[3]["exp_avg"]),
            "exp_avg of '2.bias' is complex",
        ),
        (lambda s, g: g[0]["params"].pop(), "has 3 parameters, and names has 4"),
        (lambda s, g: g[0]["param_names"].reverse(), "'0.weight' where .* '2.bias'"),
        (lambda s, g: g[0].update(adam_debias=True), "adam_debias=True is another"),
    ],
)
def test_what_does_not_fit_is_refused(edit, message):
    convert(model_state_dict("adamod"))
    with pytest.raises(ValueError, match=message):
        convert(edited(edit))


class Tensor(list):
    """As far as NumPy needs to know one of PyTorch."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray(list(self), dtype)


@pytest.mark.parametrize(
    "form",
    [
        float, jnp.asarray, lambda x: np.full((1, 1), x), lambda x: Tensor([float(x)]),
    ],
)  # fmt: skip
def test_forms_of_the_step(form):
    for package in ("adamod", "pytorch_optimizer"):  # by parameter, and by group

        def edit(states, groups):
            for holder in (*states.values(), *groups):
                if "step" in holder:
                    holder["step"] = form(30)

        assert optax.tree.get(convert(edited(edit, package)), "count") == 30


def test_a_model_is_no_optimizer():
    with pytest.raises(ValueError, match=r"an optimizer's.*has \['0.bias', '0.wei"):
        convert(model_params("adamod"))


def test_the_page_knows_our_defaults():
    rows = re.findall(r"^\|.*\| `(\w+)=(\S+)` \|$", PAGE, re.M)
    signature = inspect.signature(adamodw).parameters
    assert {"b1", "b2", "b3", "eps", "weight_decay"} == {name for name, _ in rows}
    for name, value in rows:
        assert float(value) == signature[name].default


def test_the_page_goes_on_in_jax(monkeypatch, x64):
    saves, goes_on, _ = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)
    checkpoint = {
        "names": NAMES,
        "model": model_params("adamod"),
        "optimizer": model_state_dict("adamod"),
    }
    assert all(f'"{key}":' in saves for key in checkpoint)
    torch = types.SimpleNamespace(load=lambda path, map_location: checkpoint)
    monkeypatch.setitem(sys.modules, "torch", torch)
    namespace = {}
    exec(compile(goes_on, "from_pytorch.md", "exec"), namespace)
    assert_goes_on("adamod", *(namespace[x] for x in ("tx", "params", "state")))
