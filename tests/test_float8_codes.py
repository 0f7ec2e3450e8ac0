"""Do codes in 8 bits mean what they should, and are they rounded without bias?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import FLOAT8, noise
from optax_adamod import (
    Float8Array,
    _arithmetic,
    _float8,
    _kernels,
    from_adamod,
    scale_by_adamod,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIGNED = pytest.mark.parametrize("signed", [False, True])
ENDS = (0, 2**19, 2**20 - 1)  # of random bits, and those that round to nearest
quantize = jax.jit(Float8Array.quantize, static_argnames="signed")


@functools.partial(jax.jit, static_argnames="signed")
def encoded(x, bits, signed):
    largest = jnp.max(_float8.magnitudes(x), axis=-1, keepdims=True)
    shared = _float8.exponents_of(largest, signed)
    codes = _float8.encode(x, shared, bits[:, None, None], signed)
    return _float8.from_groups(codes, shared, signed).dequantize()


def codes_of(group, bits=ENDS, signed=False):
    """Encodes a group of 128 once for each of some random bits."""
    x = np.broadcast_to(np.asarray(group, np.float32), (len(bits), 1, 128))
    return np.asarray(encoded(x, np.asarray(bits, np.int32), signed))


@SIGNED
def test_mean_of_all_random_bits_is_the_number(signed):
    """Exactly: every one of 4,096 evenly spaced random words counts once."""
    octaves = 12 if signed else 30
    group = np.exp2(np.linspace(-octaves, 0, 128)) * 3e-5
    if signed:
        group *= (-1) ** np.arange(128)
    bits = (np.arange(4096) << 8) + 128
    rounded = codes_of(group, bits, signed).astype(np.float64)
    # 4,096 words put the probability within 1/8192, of a spacing of at most 1/8.
    np.testing.assert_allclose(rounded.mean(axis=0), group, rtol=2e-5)
    assert np.abs(rounded / group - 1).max() < (1.0 if signed else 0.126)
    assert np.abs(rounded / group - 1)[:, -40:].max() < 0.126
    assert all(len(np.unique(column)) <= 2 for column in rounded.T)


def test_special_numbers():
    group = np.ones(128, np.float32)
    group[:4] = 0, 1e8, 2.0**-30, np.finfo(np.float32).tiny
    for back in codes_of(group):
        assert back[0] == 0
        assert 0.87e8 <= back[1] <= 1.13e8
        assert np.all(back[2:4] > 0)  # else an update would divide by eps
        np.testing.assert_allclose(back[4:], 1, rtol=0.126)
    group[1:4] = -1e3, -0.0, 1
    np.testing.assert_allclose(codes_of(group, signed=True)[1], group, rtol=0.126)
    # Of a gradient an infinity must be seen; a square that overflows saturates.
    group[5] = np.inf
    assert np.all(np.isnan(codes_of(group, signed=True)))
    assert codes_of(np.abs(group))[0, 5] == pytest.approx(2.98e38, rel=0.07)


@SIGNED
def test_every_magnitude_and_nan(signed):
    largest = 2.0**64 if signed else 2.98e38
    for magnitude in (0.0, 1e-42, 1e-30, 1e-8, 1.0, 1e19, 1e30, 3.4e38):
        group = np.full(128, magnitude, np.float32)
        back = codes_of(group, signed=signed)
        assert np.all(np.isfinite(back))
        if magnitude > 1e-37:
            np.testing.assert_allclose(back, min(magnitude, largest), rtol=0.126)
        # A NaN reaches the whole group, whatever bits it has.
        for word in (0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF):
            group[7:8] = np.asarray([word], np.uint32).view(np.float32)
            assert np.all(np.isnan(codes_of(group, signed=signed)))


def test_gradients_whose_squares_overflow_take_no_large_steps():
    """Nor do they when the gradients are small again; those that are NaN stay so."""
    tx = scale_by_adamod(b3=0.9, **FLOAT8)
    ones = jnp.ones((7, 256))
    large = jnp.asarray([1e19, 1e25, -1e30, 3e38])[:, None]
    large = ones.at[:4].set(large)
    large = large.at[4:, 130].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    is_bad = np.zeros((7, 256), bool)
    is_bad[4:, 128:] = True  # their groups
    state, update = tx.init(ones), jax.jit(tx.update)
    for g in (large, ones, large, ones, 1e-3 * ones):
        updates, state = update(g, state)
        np.testing.assert_array_equal(np.isnan(updates), is_bad)
        assert np.all(np.abs(updates)[~is_bad] < 7.3)


def test_quantize_is_to_nearest():
    numbers = noise((3, 256))
    x = quantize(numbers, signed=True)
    # Half a spacing, of an eighth or less where the offset is far below.
    np.testing.assert_allclose(x.dequantize(), numbers, rtol=2**-4, atol=1e-5)
    assert (x.shape, x.ndim, x.size, x.nbytes) == ((3, 256), 2, 768, 774)
    assert repr(x) == "Float8Array(signed float8[3,256], an exponent for each 128)"
    for bad, signed in ((jnp.nan, True), (jnp.inf, False), (-1.0, False)):
        spoiled = numbers if signed else jnp.abs(numbers)
        spoiled = quantize(spoiled.at[1, 130].set(bad), signed=signed).dequantize()
        assert jnp.isnan(spoiled[1, 128:]).all()
        assert jnp.isfinite(spoiled[::2]).all()
    with pytest.raises(TypeError, match="real numbers"):
        Float8Array.quantize(jnp.ones(128, jnp.complex64), signed=True)
    with pytest.raises(ValueError, match="multiple of 128"):
        Float8Array.quantize(jnp.ones((128, 3)), signed=True)


@SIGNED
def test_what_was_dequantized_stays(signed):
    """Though the largest number of every 20th group had been rounded down a step."""
    spread = np.repeat([1, 4, 12], 500)[:, None]
    x = jnp.exp(spread * noise((1500, 128))).at[0].set(1)
    x = x.at[1:].multiply(jnp.sign(noise((1499, 128), 1)) if signed else 1)
    once = quantize(x, signed=signed).dequantize()
    twice = quantize(once, signed=signed).dequantize()
    np.testing.assert_array_equal(once, twice)
    np.testing.assert_array_equal(once[0], 1 - 2**-15 if signed else 1)


@pytest.mark.parametrize(
    ("form", "eps"), [("xla", 1e-8), ("xla", 1e-15), ("gpu", 1e-15), ("tpu", 1e-8)]
)
def test_coordinates_without_gradients_loosen_no_bound(form, eps):
    """Their rate is 1 / eps, which would be the largest of the group by far."""
    tx = scale_by_adamod(b3=0.99, eps=eps, **FLOAT8)
    wide = scale_by_adamod(b3=0.99, eps=eps)
    p = jnp.zeros((3, 256))
    state, wide_state = tx.init(p), wide.init(p)
    with _kernels.forced(form):
        # Of a function of its own, so that nothing is remembered of another form.
        update = jax.jit(lambda g, state: tx.update(g, state))
        for step in range(3):
            g = noise(p.shape, step).at[:, 5::64].set(0).at[2].set(0)
            _, state = update(g, state)
            _, wide_state = jax.jit(wide.update)(g, wide_state)
    bound, expected = state.bound.dequantize(), wide_state.bound
    awake = jnp.asarray(wide_state.nu) > 0
    ratio = bound / expected
    # A group that has no other rate keeps that of its coordinates.
    ratio = ratio[awake.at[2].set(True)]
    assert ratio.min() > 0.8
    assert ratio.max() < 1.25
    # Without gradients a bound is that of a neighbour, at most doubled.
    largest = jnp.max(jnp.where(awake, expected, 0)[:2, :128], axis=1)
    assert jnp.all(bound[:2, 5] > 0.8 * largest)
    assert jnp.all(bound[:2, 5] < 2.5 * largest)


@pytest.mark.parametrize(
    ("mu_dtype", "nu_dtype"),
    [
        *[("float8", x) for x in ("float8", "bfloat16", "float32")],
        ("float16", "float8"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_no_pair_of_dtypes_takes_steps_that_cannot_be(mu_dtype, nu_dtype):
    """Cauchy and Schwarz: |m| is at most 7.27 times the root of v for the defaults."""
    tx = scale_by_adamod(b3=0.0, eps=1e-30, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    magnitudes = 10.0 ** -jnp.linspace(0, 12, 128)[None]  # all in one group

    def step(state, g):
        updates, state = tx.update(magnitudes * g, state)
        return state, jnp.max(jnp.abs(updates), axis=0)

    _, largest = jax.lax.scan(
        step, tx.init(jnp.zeros((16, 128))), noise((200, 16, 128))
    )
    assert jnp.max(largest) < 4  # after bias correction, which lags behind 7.27
    assert jnp.max(largest, axis=0)[0] > 0.9


def largest_ratio(*decay_rates):
    averages = map(_arithmetic.Average.of, decay_rates)
    return _arithmetic.largest_ratio(*averages, np.dtype(np.float32))


def test_momentum_is_limited_as_cauchy_and_schwarz_say():
    """By the gradients that reach the limit, and any others stay below."""
    b1, b2, t = 0.9, 0.999, 4000
    i = np.arange(t)  # steps ago; the weights of m over those of v
    g = ((b1 / b2) ** i)[::-1]
    m = (1 - b1) * np.sum(b1**i * g[::-1])
    v = (1 - b2) * np.sum(b2**i * g[::-1] ** 2)
    for x in (b1, jnp.asarray(b1, jnp.float32)):
        limit = largest_ratio(x, b2)
        np.testing.assert_allclose(limit, m / np.sqrt(v), rtol=1e-5)
    for b1, b2 in ((0.9, 0.81), (0.9, 0.5), (0.0, 0.0)):
        assert largest_ratio(b1, b2) > 1e19


def test_momentum_of_other_decay_rates_is_kept():
    """It may exceed what the present ones allow, by more than any rounding."""
    g = jnp.full((1, 128), 1e-3)
    old = scale_by_adamod(b2=0.999, b3=0.0)
    state, update = old.init(g), jax.jit(old.update)
    for scale in (*[1] * 20, 1000, 1):
        _, state = update(scale * g, state)
    wide, narrow = (
        scale_by_adamod(b2=0.95, b3=0.0, mu_dtype=x) for x in (None, "float8")
    )
    expected, _ = jax.jit(wide.update)(g, state)
    limit = largest_ratio(0.9, 0.95)
    assert jnp.all(jnp.abs(state.mu) > 1.5 * limit * jnp.sqrt(state.nu))
    state = jax.jit(from_adamod)(state, narrow.init(g))
    actual, _ = jax.jit(narrow.update)(g, state)
    np.testing.assert_allclose(jnp.mean(actual), jnp.mean(expected), rtol=0.07)
