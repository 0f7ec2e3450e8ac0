"""Could upstream/_adamod.py go into Optax as it is?"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_adamod
from test_optax_habits import parabola, rosenbrock

FOLDER = Path(__file__).parent.parent / "upstream"
README = (FOLDER / "README.md").read_text()
LINES = re.findall(r"^    (from optax.contrib.*)$", README, re.M)
(ENTRY,) = re.findall(r"^    (\{'opt_name'.*)$", README, re.M)


@functools.cache
def load():
    spec = importlib.util.spec_from_file_location("upstream", FOLDER / "_adamod.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def upstream():
    return load()


def trajectory(tx, gradients, params):
    """Updates of all steps."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    return jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g))(gradients)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64, jnp.bfloat16])
@pytest.mark.parametrize("rate", ["constant", "schedule"])
def test_it_is_our_adamod(upstream, dtype, rate):
    learning_rate = 0.01
    if rate == "schedule":  # which is zero in the beginning and at the end
        learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.01, 20, 150)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 6, 2)) * 10.0 ** np.arange(-2, 4)[:, None]
    values = values @ [1, 1j] if dtype == jnp.complex64 else values[..., 0]
    gradients = jnp.asarray(values, dtype)
    params = jnp.ones(6, dtype)
    settings = dict(b3=0.9, weight_decay=0.1, mask=True)
    settings["mu_dtype"] = "float32" if dtype == jnp.bfloat16 else None
    expected_state, expected = trajectory(
        optax_adamod.adamodw(learning_rate, **settings), gradients, params
    )
    state, updates = trajectory(
        upstream.adamod(learning_rate, **settings), gradients, params
    )
    # Optax's helpers do their arithmetic in the gradients' dtype, and correct the bias
    # with 1 - b**t. Where the step cancels the decay only an absolute error means much.
    close = dict(rtol=3e-4, atol=2e-6 * 0.01)
    if dtype == jnp.bfloat16:
        close = dict(rtol=1e-2, atol=1e-2 * 0.01)
    wide = jnp.result_type(dtype, jnp.float32)
    assert updates.dtype == expected.dtype == dtype
    chex.assert_trees_all_close(updates.astype(wide), expected.astype(wide), **close)
    for name in ("mu", "nu", "bound"):
        ours, theirs = (optax.tree.get(x, name) for x in (expected_state, state))
        assert ours.dtype == theirs.dtype
        chex.assert_trees_all_close(theirs, ours, **close)


def test_update_of_a_closed_learning_rate_is_adams(upstream):
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.0})
    tx = upstream.scale_by_adamod(b3=0.9, bound_learning_rate=schedule)
    gradients = jnp.asarray([[1.0, -2.0]] * 4)
    _, updates = trajectory(tx, gradients, gradients[0])
    expected = np.outer([0.1, 0.19, 1.0, 1.0], [1, -1])
    chex.assert_trees_all_close(updates, jnp.asarray(expected, jnp.float32), rtol=2e-5)


@pytest.mark.parametrize(
    ("objective", "start", "goal", "steps"),
    [
        (parabola, (-1.0, 2.0), (0.7, -0.3), 1000),
        (rosenbrock, (-0.5, 0.5), (1.0, 1.0), 4000),
    ],
)
def test_convergence(upstream, objective, start, goal, steps):
    tx = upstream.adamod(optax.cosine_decay_schedule(0.1, steps), b3=0.99)
    params = dict(zip("xy", map(jnp.asarray, start), strict=True))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(
        (params, tx.init(params))
    )
    chex.assert_trees_all_close(tuple(params.values()), goal, rtol=3e-2, atol=3e-2)


class WrappedTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_inject_hyperparams(self):
        module = load()
        params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
        gradients = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
        results = []
        for tx in (
            module.adamod(learning_rate=0.1),
            optax.inject_hyperparams(module.adamod)(learning_rate=0.1),
        ):
            state = self.variant(tx.init)(params)
            state = optax.tree.map_params(tx, lambda x: x, state)
            updates, state = self.variant(tx.update)(gradients, state, params)
            results.append((updates, optax.tree.get(state, "bound")))
        chex.assert_trees_all_close(*results, rtol=1e-4)


def test_gradient_accumulation(upstream):
    tx = optax.MultiSteps(upstream.adamod(0.1), every_k_schedule=2)
    params = jnp.ones(3)
    state = tx.init(params)
    first, state = tx.update(jnp.array([1.0, 2.0, 3.0]), state, params)
    second, state = tx.update(jnp.array([3.0, 2.0, 1.0]), state, params)
    whole = upstream.adamod(0.1)
    expected, _ = whole.update(jnp.full(3, 2.0), whole.init(params), params)
    chex.assert_trees_all_close((first, second), (jnp.zeros(3), expected), rtol=1e-5)


@pytest.fixture
def optax_with_it(tmp_path):
    """A copy of the installed Optax, with the file and the lines of upstream/README."""
    copy = tmp_path / "optax"
    shutil.copytree(Path(optax.__file__).parent, copy)
    shutil.copy(FOLDER / "_adamod.py", copy / "contrib")
    assert len(LINES) == 3
    with (copy / "contrib" / "__init__.py").open("a") as file:
        file.write("\n".join(["", *LINES, ""]))
    return copy


def run(optax_with_it, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ
        | {
            "PYTHONPATH": str(optax_with_it.parent),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",
            "PYTEST_ADDOPTS": "--color=no -p no:cacheprovider",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_goes_into_optax(optax_with_it):
    code = (
        "import doctest, optax.contrib._adamod as adamod; "
        "from optax import contrib; "
        "assert contrib.adamod is adamod.adamod; "
        "assert contrib.scale_by_adamod is adamod.scale_by_adamod; "
        "print(adamod.__file__, doctest.testmod(adamod))"
    )
    result = run(optax_with_it, "-c", code)
    assert result.returncode == 0, result.stderr
    path = optax_with_it / "contrib" / "_adamod.py"
    assert result.stdout == f"{path} TestResults(failed=0, attempted=10)\n"


@pytest.mark.slow
def test_it_passes_the_shared_tests(optax_with_it):
    path = optax_with_it / "contrib" / "_common_test.py"
    text = path.read_text()
    all_of_them = "_ALL_OPTIMIZERS_UNDER_TEST = tuple("
    assert text.count(all_of_them) == 1
    ours_alone = (
        f"_MAIN_OPTIMIZERS_UNDER_TEST = [\n{ENTRY}\n]\n"
        "for x in _MAIN_OPTIMIZERS_UNDER_TEST:\n"
        "  x.update(wrapper_name=None, wrapper_kwargs=None)\n"
        "_OTHER_OPTIMIZERS_UNDER_TEST = []\n"
    )
    path.write_text(text.replace(all_of_them, ours_alone + all_of_them))
    result = run(optax_with_it, "-m", "pytest", "-q", path)
    assert result.returncode == 0, result.stdout
    (passed,) = re.findall(r"^(\d+) passed", result.stdout, re.M)
    assert int(passed) > 10
    assert "skipped" not in result.stdout
