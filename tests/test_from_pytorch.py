"""Does a training that PyTorch's AdaMod began go on as if PyTorch went on?"""

import collections
import copy
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
from jax.sharding import NamedSharding, PartitionSpec

from helpers import make_mesh
from optax_adamod import adamod, adamodw, from_torch, scale_by_adamod
from reference import RELEASE

TESTS = Path(__file__).parent
TRAJECTORIES = np.load(TESTS / "golden.npz")
MODELS = np.load(TESTS / "golden_model.npz")
PAGE = (TESTS.parent / "docs" / "from_pytorch.md").read_text()
AVERAGES = ("exp_avg", "exp_avg_sq", "exp_avg_lr")
NAMES = [str(name) for name in MODELS["names"]]
HYPERPARAMETERS = dict(b2=0.98, b3=0.95, eps=1e-6, weight_decay=0.1, convention="torch")


# The model of golden_model.npz.
MODEL = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])


def to_tree(arrays):
    """Names and layouts of Flax, for those of PyTorch."""
    return {
        f"layers_{i}": {
            "kernel": arrays[f"{i}.weight"].T,
            "bias": arrays[f"{i}.bias"],
        }
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


def convert(state_dict, names=NAMES, to_tree=to_tree, state=None):
    if state is None:
        state = adamod(1e-2).init(to_tree(model_params("adamod")))
    return from_torch(state_dict, names, to_tree, state)


@pytest.mark.parametrize(("name", "settings", "drop"), RELEASE)
def test_a_trajectory_goes_on(name, settings, drop, x64):
    settings = dict(settings)
    gradients, step = TRAJECTORIES["gradients"], 20
    rows = {key: TRAJECTORIES[f"{name}/{key}"] for key in ("theta", *AVERAGES)}
    peak = settings.pop("peak")
    schedule = optax.piecewise_constant_schedule(peak, {len(gradients) // 2: drop})
    make = adamodw if "weight_decay" in settings else adamod
    tx = make(schedule, **settings, convention="torch")
    stored = {key: rows[key][step - 1] for key in AVERAGES}
    params = {"theta": jnp.asarray(rows["theta"][step - 1])}
    state = convert(
        {"state": {0: {"step": step, **stored}}, "param_groups": [{"params": [0]}]},
        ["theta"],
        dict,
        tx.init(params),
    )

    def body(carry, gradient):
        params, state = carry
        updates, state = tx.update({"theta": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["theta"]

    _, actual = jax.lax.scan(body, (params, state), gradients[step:])
    assert np.abs(rows["theta"][-1] - rows["theta"][step - 1]).max() > 1e-3
    chex.assert_trees_all_close(
        np.asarray(actual), rows["theta"][step:], rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("package", ["adamod", "torch_optimizer", "pytorch_optimizer"])
def test_a_model_goes_on(package, x64):
    params = jax.tree.map(jnp.asarray, to_tree(model_params(package)))
    tx = adamodw(1e-2, **HYPERPARAMETERS)
    state = convert(model_state_dict(package), state=tx.init(params))
    assert optax.tree.get(state, "count") == 30

    def loss_fn(params, inputs, targets):
        return jnp.mean((MODEL.apply({"params": params}, inputs) - targets) ** 2)

    @jax.jit
    def step(params, state, inputs, targets):
        gradients = jax.grad(loss_fn)(params, inputs, targets)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    after = model_params(package, "after")
    for t in range(len(MODELS["inputs"])):
        params, state = step(params, state, MODELS["inputs"][t], MODELS["targets"][t])
        expected = to_tree({name: values[t] for name, values in after.items()})
        chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-11)


def test_the_fresh_state_gives_dtypes_and_shardings():
    mesh = make_mesh(("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.device_put(np.zeros(16, np.float32), sharding)}
    fresh = adamod(1e-3, mu_dtype="bfloat16").init(params)
    values = np.linspace(1, 2, 16)
    stored = {"step": 7, **dict.fromkeys(AVERAGES, values)}
    state_dict = {"state": {0: stored}, "param_groups": [{"params": [0]}]}
    state = convert(state_dict, ["w"], dict, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
    for name, rtol in (("mu", 2**-8), ("nu", 2**-24), ("bound", 2**-24)):
        average = optax.tree.get(state, name)["w"]
        assert average.sharding == sharding
        np.testing.assert_allclose(np.asarray(average, float), values, rtol=rtol)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.bfloat16


def test_steps_and_nothing_else_are_set(x64):
    # Parameters called as the fields of states are.
    Params = collections.namedtuple("Params", ["count", "bound", "mu"])
    params = Params(*np.full(3, 3.0))
    tx = optax.chain(
        optax.ema(0.9),
        scale_by_adamod(convention="torch"),
        optax.inject_hyperparams(optax.scale)(optax.linear_schedule(1.0, 0.0, 100)),
    )
    values = np.arange(3) + 0.5
    stored = [{"step": 9, **dict.fromkeys(AVERAGES, x)} for x in values]
    state_dict = {
        "state": dict(enumerate(stored)),
        "param_groups": [{"params": [0, 1]}, {"params": [2]}],
    }
    fresh = tx.init(params)
    state = convert(state_dict, Params._fields, lambda x: Params(**x), fresh)
    ema, ours, injected = state
    for tree in (ours.mu, ours.nu, ours.bound):
        chex.assert_trees_all_equal(tree, Params(*values))
    injected = [x for _, x in optax.tree.get_all_with_path(injected, "count")]
    counts = [ema.count, ours.count, *injected]
    # The average is empty, and its bias correction is that of step 0.
    assert [int(count) for count in counts] == [0, 9, 9, 9]
    chex.assert_trees_all_equal(ema.ema, fresh[0].ema)


def test_injected_hyperparameters_go_on(x64):
    schedule = optax.linear_schedule(1e-2, 0.0, 100)
    settings = {"learning_rate": schedule, **HYPERPARAMETERS}
    params = to_tree(model_params("adamod"))
    results = []
    for make in (adamodw, optax.inject_hyperparams(adamodw)):
        tx = make(**settings)
        state = convert(model_state_dict("adamod"), state=tx.init(params))
        updates, state = tx.update(params, state, params)
        results.append(updates)
    assert state.hyperparams["learning_rate"] == pytest.approx(7e-3)
    chex.assert_trees_all_close(*results, rtol=1e-12)


def test_a_state_of_its_own_goes_in():
    tx = scale_by_adamod(convention="torch")
    fresh = tx.init(to_tree(model_params("adamod")))
    state = convert(model_state_dict("adamod"), state=fresh)
    assert int(state.count) == 30
    assert not state.bound["layers_0"]["kernel"].committed  # as before
    expected = model_state_dict("adamod")["state"][0]["exp_avg_lr"].T
    np.testing.assert_allclose(state.bound["layers_0"]["kernel"], expected, rtol=1e-7)


def edited(edit, package="adamod"):
    state_dict = copy.deepcopy(model_state_dict(package))
    edit(state_dict["state"], state_dict["param_groups"])
    return state_dict


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s, g: s.pop(1), "'0.bias' has no averages, for it never had a grad"),
        (lambda s, g: s[2].pop("exp_avg"), r"of '2.weight' lacks \['exp_avg'\]"),
        (lambda s, g: s[2].pop("exp_avg_lr"), "of '2.weight' .* is not AdaMod"),
        (
            lambda s, g: s[2].update(max_exp_avg_sq=1),
            r"holds \['max_exp_avg_sq'\], which AdaMod does not know",
        ),
        (lambda s, g: s[2].update(step=29), "one step, and are at .*'2.weight': 29"),
        (lambda s, g: s[2].pop("step"), "neither the state of '2.weight' nor its"),
        (
            lambda s, g: s[3].update(exp_avg=1j * s[3]["exp_avg"]),
            "exp_avg of '2.bias' is complex",
        ),
        (lambda s, g: g[0]["params"].pop(), "has 3 parameters, and names has 4"),
        (lambda s, g: g[0]["param_names"].reverse(), "names are .*'2.bias', '2.weig"),
        (lambda s, g: g[0].update(adam_debias=True), "adam_debias=True corrects"),
        (
            lambda s, g: s[3].update(exp_avg_sq=np.ones(4)),
            r"to_tree's exp_avg_sq at \['layers_2'\]\['bias'\] has shape \(4,\), and "
            r"the parameter has \(3,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(edit, message):
    convert(model_state_dict("adamod"))
    with pytest.raises(ValueError, match=message):
        convert(edited(edit))


class Tensor:
    """As far as NumPy needs to know one of PyTorch."""

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


@pytest.mark.parametrize(
    "form",
    [
        int, float, np.int64, np.float32, np.asarray, jnp.asarray, Tensor,
        lambda x: np.full(1, x), lambda x: np.full((1, 1), x, np.float32),
        lambda x: Tensor([float(x)]),
    ],
)  # fmt: skip
def test_forms_of_the_step(form):
    for package in ("adamod", "pytorch_optimizer"):  # by parameter, and by group

        def edit(states, groups):
            for holder in (*states.values(), *groups):
                if "step" in holder:
                    holder["step"] = form(30)

        assert optax.tree.get(convert(edited(edit, package)), "count") == 30


@pytest.mark.parametrize("step", [[3, 4], [], 7.5, np.nan, "30", True, None], ids=str)
def test_other_steps_are_refused(step):
    message = "neither" if step is None else "step of '2.weight' must be one whole num"
    with pytest.raises(ValueError, match=message):
        convert(edited(lambda states, _: states[2].update(step=step)))


def test_steps_of_groups_may_not_differ():
    def split(_, groups):
        del groups[0]["param_names"]
        last = groups[0]["params"].pop()
        groups.append({**groups[0], "params": [last], "step": 12})

    with pytest.raises(ValueError, match=r"'2.weight': 30, '2.bias': 12"):
        convert(edited(split, "pytorch_optimizer"))


def test_a_forgotten_transpose_is_refused():
    def forgetful(arrays):
        tree = to_tree(arrays)
        tree["layers_0"]["kernel"] = arrays["0.weight"]
        return tree

    fresh = adamod(1e-2).init(to_tree(model_params("adamod")))
    with pytest.raises(ValueError, match=r"\['layers_0'\]\['kernel'\].*\(5, 4\)"):
        convert(model_state_dict("adamod"), to_tree=forgetful, state=fresh)


def test_another_structure_is_refused():
    fresh = adamod(1e-2).init(to_tree(model_params("adamod")))
    with pytest.raises(
        ValueError, match=r"to_tree's .*'0.bias'.*parameters are .*layers_0"
    ):
        convert(model_state_dict("adamod"), to_tree=dict, state=fresh)


@pytest.mark.parametrize(
    ("tx", "number"),
    [
        (optax.adam(1e-2), 0),
        (optax.chain(scale_by_adamod(), scale_by_adamod()), 2),
    ],
)
def test_one_adamod_is_needed(tx, number):
    fresh = tx.init(to_tree(model_params("adamod")))
    with pytest.raises(ValueError, match=f"one ScaleByAdamodState, and holds {number}"):
        convert(model_state_dict("adamod"), state=fresh)


def test_a_model_is_no_optimizer():
    with pytest.raises(ValueError, match=r"an optimizer's.*has \['0.bias', '0.wei"):
        convert(model_params("adamod"))


def test_the_page_knows_our_defaults():
    rows = re.findall(r"^\|.*\| `(\w+)=(\S+)` \|$", PAGE, re.M)
    signature = inspect.signature(adamodw).parameters
    assert {"b1", "b2", "b3", "eps", "weight_decay"} == {name for name, _ in rows}
    for name, value in rows:
        assert float(value) == signature[name].default


def test_the_page_goes_on_in_jax(monkeypatch):
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
    chex.assert_trees_all_close(namespace["params"], to_tree(model_params("adamod")))
    expected = convert(checkpoint["optimizer"], state=namespace["state"])
    chex.assert_trees_all_equal(namespace["state"], expected)
    tx = adamodw(1e-2, **HYPERPARAMETERS)
    chex.assert_trees_all_equal(
        namespace["tx"].update(namespace["params"], expected, namespace["params"]),
        tx.update(namespace["params"], expected, namespace["params"]),
    )


@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_bounds_of_8_bits_beside_coordinates_without_gradients(eps):
    """Whose bound, 1 / eps, leaves no room for others in their group."""
    v = np.exp2(np.linspace(-40, -20, 128, dtype=np.float32))
    v[::7] = 0
    bound = 1e-3 / (np.sqrt(v) + eps)
    averages = dict(zip(AVERAGES, (np.sqrt(v), v, bound), strict=True))
    state_dict = {
        "state": {0: {"step": 7, **{k: x[None] for k, x in averages.items()}}},
        "param_groups": [{"params": [0]}],
    }
    dtypes = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}
    tx = adamod(1e-3, convention="torch", **dtypes)
    state = tx.init({"w": jnp.zeros((1, 128))})
    state = from_torch(state_dict, ["w"], dict, state)
    actual = optax.tree.get(state, "bound")["w"].dequantize()[0]
    np.testing.assert_allclose(actual[v > 0], bound[v > 0], rtol=0.07)

    averages["exp_avg_lr"][1] = 1e-20  # as of a learning rate of almost 0
    with pytest.raises(ValueError, match=r"exp_avg_lr at \['w'\] .* 8 bits: 1 of"):
        from_torch(state_dict, ["w"], dict, state)
