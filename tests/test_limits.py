"""How far do the limits go that docs/limits.md gives figures of?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod, scale_by_adamod


def last_state(tx, gradients_of, like, steps):
    def body(step, state):
        return tx.update(gradients_of(step), state)[1]

    return jax.jit(lambda: jax.lax.fori_loop(0, steps, body, tx.init(like)))()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decay", "short"), [(0.999, 5e-5), (0.9999, 4.4e-4), (0.99999, 4.4e-3)]
)
def test_float32_averages_of_constants_stop_short(decay, short):
    """Where a step of the average is less than half its spacing."""
    gradients = jnp.exp(jnp.linspace(-5.0, 5.0, 64))
    tx = scale_by_adamod(b2=decay, b3=decay)
    steps = round(20 / (1 - decay))
    state = last_state(tx, lambda _: gradients, gradients, steps)
    share = np.asarray(state.bound, np.float64) * np.asarray(gradients, np.float64)
    print(f"decay {decay}: the bound ends {1 - share.min():.1e} short")
    assert 0.5 * short < 1 - share.min() < 1.5 * short


@pytest.mark.slow
@pytest.mark.parametrize(
    ("b2", "noise"), [(0.99, 0.017), (0.999, 0.043), (0.9999, 0.052)]
)
def test_noise_of_nu_in_bfloat16(b2, noise):
    scale = jnp.exp(jax.random.normal(jax.random.key(0), (2048,)))

    def gradients_of(step):
        key = jax.random.fold_in(jax.random.key(1), step)
        return scale * jax.random.normal(key, scale.shape)

    def nu(dtype):
        tx = scale_by_adamod(b2=b2, nu_dtype=dtype)
        state = last_state(tx, gradients_of, scale, round(5 / (1 - b2)))
        return np.asarray(state.nu, np.float64)

    ratio = nu("bfloat16") / nu(None)
    print(f"b2 {b2}: nu in bfloat16 is {ratio.mean():.4f} +- {ratio.std():.4f} of it")
    assert abs(ratio.mean() - 1) < 0.005
    assert ratio.std() == pytest.approx(noise, rel=0.2)


QUICK = pytest.mark.usefixtures("quick_compilation")


def trained(tx, steps=4):
    """Loss of steps down a parabola; ``eps_root`` is needed to differentiate it."""
    target = jnp.asarray([1.0, -2.0, 3.0])

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(2 * (params - target), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(3), tx.init(jnp.zeros(3))
    (params, _), _ = jax.lax.scan(step, start, length=steps)
    return jnp.sum((params - target) ** 2)


def with_bound(learning_rate, b3=0.7, **settings):
    return trained(adamod(learning_rate, b3=b3, eps_root=1e-8, **settings))


@QUICK
def test_derivatives_of_training(x64):
    """By the learning rate and b3, against central differences in 64 bits."""
    f = jax.jit(lambda x: with_bound(*x, convention="torch"))
    at, h = jnp.array([0.1, 0.7]), 1e-6
    numeric = [(f(at + h * x) - f(at - h * x)) / (2 * h) for x in jnp.eye(2)]
    analytic = jax.jit(jax.grad(f))(at)
    assert np.all(np.abs(analytic) > 1e-2)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6)


@QUICK
def test_derivatives_where_a_hyperparameter_is_zero_are_adams():
    def derivatives(make, **settings):
        f = jax.jit(jax.grad(lambda x: trained(make(*x, eps_root=1e-8, **settings))))
        return [f(jnp.array(x)) for x in ((0.0, 0.9, 0.999), (0.1, 0.0, 0.0))]

    adam = derivatives(optax.adam)
    assert np.abs(adam[0][0]) > 1e-2
    assert np.all(np.abs(adam[1]) > 1e-2)
    np.testing.assert_allclose(derivatives(adamod, b3=0.0), adam, rtol=1e-4)


@QUICK
def test_derivative_at_a_learning_rate_of_zero_is_adams():
    """And so not the limit of those beside it, where the bound is closed."""
    derivative = jax.jit(jax.grad(with_bound))
    at_zero, above, below = (derivative(x) for x in (0.0, 1e-5, -1e-5))
    np.testing.assert_allclose(above, below, rtol=1e-3)
    assert at_zero == pytest.approx(-48.0, rel=1e-3)
    assert above == pytest.approx(-26.72, rel=1e-3)


@QUICK
def test_derivative_by_b3_at_zero_is_that_of_a_kink(x64):
    """Rate and bound are equal there but for rounding: either may be smaller."""
    derivative = jax.jit(jax.grad(lambda b3: with_bound(0.1, b3)))
    at_zero, above = float(derivative(0.0)), float(derivative(1e-6))
    assert above > 0.1
    assert 0 <= at_zero < above
