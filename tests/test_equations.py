"""Are the updates those of the paper, and of the authors' release?"""

import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from optax_adamod import adamod, adamodw, scale_by_adamod
from reference import RELEASE, AdaMod

# The rounding of an average adds up over its horizon, so a limit on the error is one
# for a number of steps. With 10_000 here, float32 is off by 1.2e-5 at b3 0.999.
STEPS = 200
PEAK = 1e-2
CONVENTIONS = "paper", "torch"
SCHEDULES = {
    "constant": optax.constant_schedule(PEAK),
    "cosine": optax.cosine_decay_schedule(PEAK, STEPS - 1),  # ends at 0
    "warm_up": optax.linear_schedule(0.0, PEAK, STEPS // 3),  # starts at 0
    "step_drop": optax.piecewise_constant_schedule(PEAK, {STEPS // 2: 0.1}),
    "ascent": optax.constant_schedule(-PEAK),
    "falls_below_zero": optax.linear_schedule(PEAK, -PEAK, STEPS),
    "rises_above_zero": optax.linear_schedule(-PEAK, PEAK, STEPS),
}
# Each with every schedule.
GRID = [
    dict(b3=b3, convention=convention)
    for b3, convention in itertools.product((0.0, 0.5, 0.99, 0.9999), CONVENTIONS)
]
# Each with a constant rate: all pairs of values.
GRID_OF_CONSTANT = [
    dict(b1=b1, b2=b2, eps=eps, convention=convention)
    for b1, b2, eps, convention in [
        (0.0, 0.0, 1e-12, "paper"),
        (0.95, 0.0, 1e-4, "torch"),
        (0.0, 0.98, 1e-4, "paper"),
        (0.95, 0.98, 1e-12, "torch"),
        (0.0, 0.9999, 1e-12, "torch"),
        (0.95, 0.9999, 1e-4, "paper"),
    ]
]
GRID_OF_CONSTANT += [
    dict(nesterov=True),
    dict(nesterov=True, b1=0.3),
    dict(eps_root=1e-6),
    dict(eps_root=1e-6, convention="torch"),
    dict(b1=0.3, b2=0.3, b3=0.3),
]


def make_gradients(dtype, seed=0):
    """Coordinates of many magnitudes, one that sleeps and one that wakes half-way."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(STEPS, 9)) * 10.0 ** np.arange(-6, 3)
    if np.issubdtype(dtype, np.complexfloating):
        gradients = gradients * np.exp(2j * np.pi * rng.random(gradients.shape))
    gradients[:, 6] += 5.0  # a mean larger than its noise
    gradients[:, 5] = 0.0
    gradients[: STEPS // 2, 7] = 0.0
    return gradients.astype(dtype)


def run(make):
    """Returns a function of learning rates, gradients and the first parameters.

    It runs all steps in one scan, and gives updates, parameters and averages. The rates
    are the very same numbers for the library, by count, and the reference, by step.
    """

    @jax.jit
    def trajectory(rates, gradients, params):
        tx = make(lambda count: rates[count])

        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            averages = {k: optax.tree.get(state, k) for k in ("mu", "nu", "bound")}
            return (params, state), {"update": updates, "theta": params, **averages}

        return jax.lax.scan(body, (params, tx.init(params)), gradients)[1]

    return trajectory


def rates_of(schedule, dtype=np.float64):
    return np.asarray([SCHEDULES[schedule](t) for t in range(STEPS)], dtype)


def assert_follows_reference(dtype, tolerance, schedules=SCHEDULES, **settings):
    gradients = make_gradients(dtype)
    ours = run(lambda learning_rate: adamod(learning_rate, **settings))
    for schedule in schedules:
        rates = rates_of(schedule, np.finfo(dtype).dtype)
        reference = AdaMod(alpha=lambda t, rates=rates: float(rates[t - 1]), **settings)
        expected = reference.trajectory(gradients)
        actual = ours(rates, gradients, np.zeros_like(gradients[0]))
        bounded = settings.get("b3") != 0.0
        assert (actual["bound"] is None) != bounded
        actual = {
            k: np.asarray(x, expected[k].dtype)
            for k, x in actual.items()
            if x is not None
        }
        assert np.abs(expected["update"]).max() > 0
        # An update holds v at half its power and the smaller of two rates.
        for name, size, limit in [
            ("update", "update_size", tolerance),
            ("nu", "nu", 2 * tolerance),
            ("bound", "bound_size", 2 * tolerance),
        ][: 3 if bounded else 2]:
            np.testing.assert_array_less(
                np.abs(actual[name] - expected[name]),
                limit * expected[size] + np.finfo(np.float64).tiny,
                err_msg=f"{name}, {schedule}",
            )


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_float64(settings, x64):
    assert_follows_reference(np.float64, 1e-12, **settings)


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_float32(settings):
    assert_follows_reference(np.float32, 1e-6, **settings)


@pytest.mark.parametrize("settings", GRID_OF_CONSTANT, ids=str)
def test_float64_of_other_settings(settings, x64):
    assert_follows_reference(np.float64, 1e-12, ("constant", "cosine"), **settings)


@pytest.mark.parametrize("settings", GRID_OF_CONSTANT, ids=str)
def test_float32_of_other_settings(settings):
    assert_follows_reference(np.float32, 1e-6, ("constant", "cosine"), **settings)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_complex128(convention, x64):
    assert_follows_reference(np.complex128, 1e-12, convention=convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_complex64(convention):
    assert_follows_reference(np.complex64, 1e-6, convention=convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_decoupled_decay(convention, x64):
    settings = dict(b3=0.99, weight_decay=0.1, convention=convention)
    gradients = make_gradients(np.float64)
    start = np.full_like(gradients[0], 2.0)
    ours = run(lambda learning_rate: adamodw(learning_rate, **settings))
    for schedule in SCHEDULES:
        rates = rates_of(schedule)
        reference = AdaMod(alpha=lambda t, rates=rates: rates[t - 1], **settings)
        chex.assert_trees_all_close(
            np.asarray(ours(rates, gradients, start)["theta"]),
            reference.trajectory(gradients, theta=2.0)["theta"],
            rtol=0,
            atol=1e-13,
        )


@pytest.mark.parametrize(("name", "settings", "drop"), RELEASE)
def test_authors_release(name, settings, drop, x64):
    golden = np.load(Path(__file__).with_name("golden.npz"))
    settings = {"weight_decay": 0.0, **settings}
    peak = settings.pop("peak")
    gradients = golden["gradients"]
    steps = np.arange(len(gradients))
    rates = peak * np.where(steps < len(gradients) // 2, 1.0, drop)
    ours = run(lambda lr: adamodw(lr, **settings, convention="torch"))
    actual = ours(rates, gradients, golden["start"])
    assert np.abs(golden[f"{name}/theta"] - golden["start"]).max() > 1e-3
    for ours, theirs in {
        "theta": "theta",
        "mu": "exp_avg",
        "nu": "exp_avg_sq",
        "bound": "exp_avg_lr",
    }.items():
        if actual[ours] is None:  # b3 is 0, and theirs keeps the rate of the last step
            assert ours == "bound"
            assert settings["b3"] == 0.0
            continue
        chex.assert_trees_all_close(
            np.asarray(actual[ours]), golden[f"{name}/{theirs}"], rtol=1e-11, atol=1e-17
        )


class VariantsTest(chex.TestCase):
    """The same numbers with and without jit, on the host and on every device."""

    @chex.all_variants
    @parameterized.product(convention=("paper", "torch"))
    def test_first_steps(self, convention):
        tx = scale_by_adamod(b3=0.9, bound_learning_rate=0.5, convention=convention)
        gradients = make_gradients(np.float32)[:5]
        reference = AdaMod(alpha=lambda t: 0.5, b3=0.9, convention=convention)
        expected = reference.trajectory(gradients)

        state = tx.init(jnp.zeros(9))
        update = self.variant(lambda g, state: tx.update(g, state))
        for t, g in enumerate(gradients):
            updates, state = update(g, state)
            chex.assert_trees_all_close(
                np.asarray(-0.5 * updates, np.float64), expected["update"][t], rtol=1e-5
            )
            chex.assert_trees_all_close(
                np.asarray(state.bound, np.float64), expected["bound"][t], rtol=1e-6
            )
