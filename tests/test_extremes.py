"""Are steps finite, bounded and symmetric, whatever rates and gradients there are?"""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from optax_adamod import (
    adamod,
    adamodw,
    held_by_bound,
    learning_rates,
    log10_histogram,
    scale_by_adamod,
)

TARGET = jnp.asarray([1.0, -2.0, 3.0])


def steps(tx, gradients):
    """Runs gradients, shape (steps, ...); returns all updates and the last state."""

    @jax.jit
    def run(gradients):
        def body(state, g):
            updates, state = tx.update(g, state, g)
            return state, updates

        return jax.lax.scan(body, tx.init(gradients[0]), gradients)

    state, updates = run(gradients)
    return updates, state


def test_a_change_of_sign_turns_the_step_at_once():
    """As at the end of some linear decays, by a rounding error.

    To a magnitude that neither Adam's rate nor the bound's memory exceeds.
    """
    schedule = optax.join_schedules([lambda _: 0.1, lambda _: -1e-11], [20])
    updates, _ = steps(adamod(schedule, b3=0.9), jnp.ones((40, 3)))
    assert np.all(updates[:20] < 0)
    assert np.all((updates[20:] > 0) & (updates[20:] <= 1.001e-11))


@pytest.mark.parametrize(
    ("dtype", "b", "settings"),
    [
        ("float32", 0.9, dict()),
        ("float32", 0.9, dict(nesterov=True)),
        ("bfloat16", 0.3, dict(convention="torch")),
        ("complex64", 0.9, dict(convention="torch")),
    ],
)
def test_the_largest_gradients_make_nothing_nan(dtype, b, settings):
    """Differences and Nesterov's sums of them are larger than any float."""
    real, imaginary = np.random.default_rng(0).choice([-1.0, 1.0], (2, 30, 16))
    signs = real + (1j * imaginary if dtype == "complex64" else 0)
    sizes = np.repeat([3e38, float(jnp.finfo(dtype).max)], 8)
    tx = scale_by_adamod(b, 0.9, b, **settings)
    updates, state = steps(tx, jnp.asarray(sizes * signs, dtype))
    assert np.all(updates == 0)  # as with Adam, for their squares are infinite
    chex.assert_tree_all_finite((state.mu, state.bound))


@pytest.mark.parametrize(
    ("b3", "settings"),
    [
        (0.9, dict(convention="paper")),
        (0.9, dict(convention="torch", nu_dtype="bfloat16")),
        (0.0, dict(convention="torch")),
    ],
    ids=str,
)
def test_square_that_overflows_stops_its_coordinate_alone(b3, settings):
    """As with ``optax.adam``, and no update is NaN."""
    gradients = jnp.tile(TARGET, (10, 1)).at[3, 0].set(3e19)
    updates, state = steps(adamod(0.1, b3=b3, **settings), gradients)
    plain, _ = steps(adamod(0.1, b3=b3, **settings), jnp.tile(TARGET, (10, 1)))
    chex.assert_trees_all_equal(updates[:, 1:], plain[:, 1:])
    adams, _ = steps(optax.adam(0.1), gradients)
    assert np.array_equal(adams == 0, updates == 0)
    assert np.array_equal(updates[:, 0] == 0, np.arange(10) >= 3)
    chex.assert_tree_all_finite((updates, optax.tree.get(state, "bound")))


def test_the_rate_holds_as_far_as_the_square():
    """1.8e19 is the root of the largest float32."""
    updates, _ = steps(scale_by_adamod(b3=0.9), jnp.full((300, 4), 1.8e19))
    chex.assert_trees_all_close(updates[-1], jnp.ones(4), rtol=1e-5)


def test_gradients_that_float16_does_not_hold():
    """``mu`` keeps the largest number that it can, and training goes on."""
    gradients = jnp.ones((201, 2)).at[0].set(jnp.asarray([-7e5, -3e38]))
    updates, state = steps(scale_by_adamod(mu_dtype="float16"), gradients)
    chex.assert_tree_all_finite((updates, state.mu))
    np.testing.assert_allclose(np.asarray(state.mu, np.float32), 1.0, rtol=0.01)


@pytest.mark.parametrize("learning_rate", [0.1, -0.1])
def test_rates_that_are_infinite_for_a_step(learning_rate):
    """Without eps, where a coordinate had no gradient: it goes on either way."""
    tx = optax.chain(adamod(learning_rate, b3=0.9, eps=0.0), optax.zero_nans())
    updates, _ = steps(tx, jnp.asarray([[0.0], *[[1.0]] * 9]))
    assert np.all(updates[0] == 0)
    assert np.all(updates[1:] * np.sign(learning_rate) < -0.05)


def test_update_of_a_closed_learning_rate_is_adams():
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.0})
    tx = scale_by_adamod(b3=0.9, bound_learning_rate=schedule)
    updates, _ = steps(tx, jnp.tile(TARGET, (4, 1)))
    shares = np.array([[0.1], [0.19], [1.0], [1.0]])  # of Adam's, which is the sign
    np.testing.assert_allclose(updates, shares * np.sign(TARGET), rtol=1e-6)


@pytest.mark.parametrize(
    ("averages", "convention"), [(None, "paper"), ("bfloat16", "torch")]
)
def test_strict_promotion_of_dtypes(averages, convention):
    dtypes = "float16", "bfloat16", "float32", "complex64"
    params = {dtype: jnp.full((2, 3), 0.5, dtype) for dtype in dtypes}
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    settings = dict.fromkeys(("mu_dtype", "nu_dtype", "bound_dtype"), averages)
    tx = adamodw(schedule, **settings, convention=convention)

    def everything(params):
        _, state = tx.update(params, tx.init(params), params)
        rates = learning_rates(state, schedule, convention=convention)
        return held_by_bound(rates), log10_histogram(rates.bounded, [-3, 0, 3])

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(everything, params)


DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])
CONVENTIONS = st.sampled_from(["paper", "torch"])
DECAYS = st.sampled_from([0.0, 0.3, 0.9, 0.999, 0.9999])


@st.composite
def gradients_of(draw, dtypes, least, most):
    """Three gradients, with coordinates of any magnitude and zeros."""
    dtype = draw(dtypes)
    exponents = draw(st.lists(st.integers(least, most), min_size=4, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    signs = rng.choice([-1.0, 0.0, 1.0], (2, 3, 4))
    largest = float(jnp.finfo(dtype).max)
    values = 10.0 ** (np.asarray(exponents) + rng.uniform(-2, 0, (2, 3, 4)))
    real, imaginary = signs * np.minimum(values, largest)
    parts = 1j if dtype == "complex64" else 0
    return jnp.asarray(real + parts * imaginary, dtype)


def one_by_one(tx, gradients):
    """Returns the updates of every step, and the last state."""
    state, updates = tx.init(gradients[0]), []
    for g in gradients:  # eager, so that only leaves are compiled, once for each dtype
        u, state = tx.update(g, state, g)
        updates.append(u)
    return jnp.stack(updates), state


# Up to the largest number that the dtype holds.
@hypothesis.given(
    gradients_of(DTYPES, -38, 42),
    st.tuples(DECAYS, DECAYS, DECAYS),
    CONVENTIONS,
    st.sampled_from([1e-12, 1e-8, 1e-4]),
    st.booleans(),
)
@hypothesis.settings(max_examples=30)
def test_everything_is_finite_and_turns_with_the_sign(
    gradients, decays, convention, eps, nesterov
):
    nesterov = nesterov and convention == "paper"
    tx = adamod(1e-3, *decays, eps, convention=convention, nesterov=nesterov)
    updates, (state, _) = one_by_one(tx, gradients)
    chex.assert_tree_all_finite((state.mu, state.bound))
    # Where eps alone divides, a step may be more than its dtype holds.
    overflows = updates.dtype == np.float16 or decays[1] == 0.0
    assert not np.any(np.isnan(updates) if overflows else ~np.isfinite(updates))
    # Squares may be infinite; what divides by their roots is then 0.
    assert not np.any(np.isnan(state.nu))
    assert updates.dtype == gradients.dtype
    np.testing.assert_array_equal(one_by_one(tx, -gradients)[0], -updates)


@hypothesis.given(gradients_of(st.just("float32"), -38, 18), DECAYS, CONVENTIONS)
@hypothesis.settings(max_examples=20)
def test_no_step_is_larger_than_adams(gradients, b3, convention):
    bounded, _ = one_by_one(scale_by_adamod(b3=b3, convention=convention), gradients)
    adam, _ = one_by_one(scale_by_adamod(b3=0.0, convention=convention), gradients)
    # The bound, at b3 = 0 the rate itself, is rounded once more than the rate.
    assert np.all(np.abs(bounded) <= np.abs(adam) * (1 + 1e-6))


@hypothesis.given(
    gradients_of(st.just("float32"), -6, 4),
    DECAYS,
    CONVENTIONS,
    st.sampled_from([2.0**-20, 2.0**20]),
)
@hypothesis.settings(max_examples=20)
def test_the_unit_of_the_gradient_does_not_matter(gradients, b3, convention, scale):
    """A power of two scales without rounding, so the updates are the same bits."""
    updates = []
    for unit in (1.0, scale):
        tx = scale_by_adamod(b3=b3, eps=unit * 2.0**-30, convention=convention)
        updates.append(one_by_one(tx, unit * gradients)[0])
    np.testing.assert_array_equal(*updates)
