"""Do codes in 8 bits mean what they should, and are averages of them unbiased?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamod import (
    Float8Array,
    _arithmetic,
    _float8,
    _kernels,
    from_adamod,
    scale_by_adamod,
)

FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}


def noise(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def codes_of(group, bits, signed=False):
    """Encodes a group of 128 once for each of some random bits."""
    x = jnp.broadcast_to(jnp.asarray(group, jnp.float32), (len(bits), 1, 128))
    bits = jnp.asarray(bits, jnp.int32)[:, None, None]
    largest = jnp.max(_float8.magnitudes(x), axis=-1, keepdims=True)
    shared = _float8.exponents_of(largest, signed)
    codes = _float8.encode(x, shared, bits, signed)
    return _float8.from_groups(codes, shared, signed).dequantize()


@pytest.mark.parametrize("signed", [False, True])
def test_mean_of_all_random_bits_is_the_number(signed):
    """Exactly: every one of 4,096 evenly spaced random words counts once."""
    octaves = 12 if signed else 30
    group = np.exp2(np.linspace(-octaves, 0, 128)) * 3e-5
    if signed:
        group *= (-1) ** np.arange(128)
    bits = (np.arange(4096) << 8) + 128
    rounded = np.asarray(codes_of(group, bits, signed), np.float64)
    # 4,096 words put the probability within 1/8192, of a spacing of at most 1/8.
    np.testing.assert_allclose(rounded.mean(axis=0), group, rtol=2e-5)
    assert np.abs(rounded / group - 1).max() < (1.0 if signed else 0.126)
    assert np.abs(rounded / group - 1)[:, -40:].max() < 0.126
    assert all(len(np.unique(column)) <= 2 for column in rounded.T)


def test_special_numbers():
    group = np.ones(128, np.float32)
    group[:4] = 0, 1e8, 2.0**-30, np.finfo(np.float32).tiny
    for bits in (0, 2**19, 2**20 - 1):
        back = np.asarray(codes_of(group, [bits]))[0]
        assert back[0] == 0
        assert 0.87e8 <= back[1] <= 1.13e8
        assert np.all(back[2:4] > 0)  # else an update would divide by eps
        np.testing.assert_allclose(back[4:], 1, rtol=0.126)
    group[1:4] = -1e3, -0.0, 1
    back = np.asarray(codes_of(group, [2**19], signed=True))[0]
    np.testing.assert_allclose(back, group, rtol=0.126)


@pytest.mark.parametrize("word", [0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF])
@pytest.mark.parametrize("signed", [False, True])
def test_nan_reaches_the_whole_group(word, signed):
    """Whatever bits it has, and whatever else the group holds."""
    for rest in (0.0, 1.0, 3e38):
        group = np.full(128, rest, np.float32)
        group[7:8] = np.asarray([word], np.uint32).view(np.float32)
        for bits in (0, 2**20 - 1):
            assert np.all(np.isnan(codes_of(group, [bits], signed)))


def test_infinities():
    """Of a gradient it must be seen; a square that overflows saturates."""
    group = np.ones(128, np.float32)
    group[5] = np.inf
    assert np.all(np.isnan(codes_of(group, [5], signed=True)))
    back = np.asarray(codes_of(group, [5]))[0]
    assert back[5] == pytest.approx(2.98e38, rel=0.07)


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-8, 1.0, 1e19, 1e30, 3.4e38])
def test_every_magnitude(magnitude):
    group = np.full(128, magnitude, np.float32)
    for signed in (False, True):
        largest = 2.0**64 if signed else 2.98e38
        for bits in (0, 2**20 - 1):
            back = np.asarray(codes_of(group, [bits], signed))
            assert np.all(np.isfinite(back))
            if magnitude > 1e-37:
                expected = min(magnitude, largest)
                np.testing.assert_allclose(back, expected, rtol=0.126)


@pytest.mark.parametrize("gradient", [1e19, 1e25, -1e30, 3e38])
def test_gradients_whose_squares_overflow_take_no_large_steps(gradient):
    """Nor do they when the gradients are small again."""
    tx = scale_by_adamod(b3=0.9, **FLOAT8)
    state = tx.init(jnp.ones((1, 128)))
    for g in (gradient, 1.0, gradient, 1.0, 1e-3):
        updates, state = tx.update(jnp.full((1, 128), g), state)
        assert np.all(np.abs(updates) < 7.3)


def test_averages_of_nan_are_nan_and_stay_so():
    tx = scale_by_adamod(**FLOAT8)
    g = jnp.ones((2, 256))
    state = tx.init(g)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        updates, after = tx.update(g.at[1, 130].set(bad), state)
        updates, _ = tx.update(g, after)
        expected = np.zeros((2, 256), bool)
        expected[1, 128:] = True  # its group
        np.testing.assert_array_equal(np.isnan(updates), expected)


def test_float8_arrays_print_and_measure_themselves():
    x = Float8Array.quantize(noise((3, 256)), signed=True)
    assert (x.shape, x.ndim, x.size, x.nbytes) == ((3, 256), 2, 768, 774)
    assert repr(x) == "Float8Array(signed float8[3,256], an exponent for each 128)"
    with pytest.raises(TypeError, match="real numbers"):
        Float8Array.quantize(jnp.ones(128, jnp.complex64), signed=True)
    with jax.debug_nans(True):
        again = Float8Array.quantize(x.dequantize(), signed=True)
    np.testing.assert_allclose(again.dequantize(), x.dequantize(), rtol=2**-4)


def test_quantize_is_to_nearest():
    x = noise((3, 256))
    back = Float8Array.quantize(x, signed=True).dequantize()
    # Half a spacing, of an eighth or less where the offset is far below.
    np.testing.assert_allclose(back, x, rtol=2**-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 128"):
        Float8Array.quantize(jnp.ones((128, 3)), signed=True)


def numbers(average):
    return average.dequantize() if isinstance(average, Float8Array) else average


def trajectory(steps, coordinates, sigma, spread, **settings):
    """Means over the second half: nu, bound and |update|."""
    tx = scale_by_adamod(**settings)
    shape = (coordinates // 128, 128)
    scale = jnp.exp(spread * noise(shape, 1))

    def body(carry, step):
        state, total = carry
        g = scale * jnp.exp(sigma * jax.random.normal(jax.random.key(step), shape))
        updates, state = tx.update(g, state)
        seen = (*map(numbers, (state.nu, state.bound)), jnp.abs(updates))
        late = step >= steps // 2
        return (state, jax.tree.map(lambda a, x: a + late * x, total, seen)), None

    start = tx.init(scale), (jnp.zeros(shape),) * 3
    run = jax.jit(lambda: jax.lax.scan(body, start, jnp.arange(steps))[0][1])
    return [np.asarray(x, np.float64) / (steps - steps // 2) for x in run()]


@pytest.mark.slow
@pytest.mark.parametrize("b3", [0.999, 0.9999])
@pytest.mark.parametrize("sigma", [0.0, 0.5], ids=["constant", "log-normal"])
def test_averages_follow_float32_for_20000_steps(sigma, b3):
    """The bound is right by itself; noise in nu raises the mean of 1 / sqrt(nu)."""
    # So many that the standard error of a mean is about 0.1 %.
    coordinates = 4_096 if b3 == 0.999 else 16_384
    wide = trajectory(20_000, coordinates, sigma, 1.0, b3=b3)

    def errors(**dtypes):
        narrow = trajectory(20_000, coordinates, sigma, 1.0, b3=b3, **dtypes)
        ratios = [a / b for a, b in zip(narrow, wide, strict=True)]
        print(
            sigma,
            b3,
            sorted(dtypes),
            [f"{r.mean():.4f} +- {r.std():.4f}" for r in ratios],
        )
        return [abs(r.mean() - 1) for r in ratios]

    assert errors(bound_dtype="float8")[1] < 0.005
    assert errors(nu_dtype="float8")[0] < 0.005
    # The smallest state in which the bound's mean is right to half a percent.
    assert errors(**FLOAT8 | {"nu_dtype": "bfloat16"})[1] < 0.005
    nu, bound, update = errors(**FLOAT8)
    assert nu < 0.005
    assert bound < 0.02
    assert update < 0.03


@pytest.mark.parametrize("form", ["xla", "gpu", "tpu"])
@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_a_coordinate_without_gradients_loosens_no_bound(form, eps):
    """Its rate is 1 / eps, which would be the largest of the group by far."""
    tx = scale_by_adamod(b3=0.99, eps=eps, **FLOAT8)
    wide = scale_by_adamod(b3=0.99, eps=eps)
    p = jnp.zeros((2, 256))
    states = [x.init(p) for x in (tx, wide)]
    with _kernels.forced(form):
        for step in range(3):
            g = noise(p.shape, step).at[:, 5::64].set(0)
            states = [
                jax.jit(x.update)(g, s)[1]
                for x, s in zip((tx, wide), states, strict=True)
            ]
    bound, expected = (x.bound for x in states)
    awake = jnp.asarray(states[1].nu) > 0
    ratio = (bound.dequantize() / expected)[awake]
    assert ratio.min() > 0.8
    assert ratio.max() < 1.25
    # Without gradients a bound is that of a neighbour, at most doubled.
    largest = jnp.max(jnp.where(awake, expected, 0), axis=1)
    assert jnp.all(bound.dequantize()[:, 5] <= 2.5 * largest)


def test_a_group_without_gradients_keeps_its_bound():
    tx = scale_by_adamod(b3=0.99, **FLOAT8)
    g = noise((1, 256)).at[:, :128].set(0)
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(state.bound.dequantize()[:, :128], 1e6, rtol=0.07)


@pytest.mark.parametrize("nu_dtype", ["float8", "bfloat16", "float32"])
@pytest.mark.parametrize("mu_dtype", ["float8", "bfloat16", "float16", "float32"])
def test_no_pair_of_dtypes_takes_steps_that_cannot_be(mu_dtype, nu_dtype):
    """Cauchy and Schwarz: |m| is at most 7.27 times the root of v for the defaults."""
    tx = scale_by_adamod(b3=0.0, eps=1e-30, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    magnitudes = 10.0 ** -jnp.linspace(0, 12, 128)[None]  # all in one group

    def step(state, key):
        g = magnitudes * jax.random.normal(key, (16, 128))
        updates, state = tx.update(g, state)
        return state, jnp.max(jnp.abs(updates), axis=0)

    keys = jax.random.split(jax.random.key(0), 200)
    _, largest = jax.jit(
        lambda: jax.lax.scan(step, tx.init(jnp.zeros((16, 128))), keys)
    )()
    assert jnp.max(largest) < 4  # after bias correction, which lags behind 7.27
    assert jnp.max(largest, axis=0)[0] > 0.9


def test_momentum_is_limited_as_cauchy_and_schwarz_say():
    """By the gradients that reach the limit, and any others stay below."""
    float32 = np.dtype(np.float32)
    b1, b2, t = 0.9, 0.999, 4000
    i = np.arange(t)  # steps ago; the weights of m over those of v
    g = ((b1 / b2) ** i)[::-1]
    m = (1 - b1) * np.sum(b1**i * g[::-1])
    v = (1 - b2) * np.sum(b2**i * g[::-1] ** 2)
    for x in (b1, jnp.asarray(b1, jnp.float32)):
        limit = _arithmetic.largest_momentum(x, b2, float32)
        np.testing.assert_allclose(limit, m / np.sqrt(v), rtol=1e-5)
    for b1, b2 in ((0.9, 0.81), (0.9, 0.5), (0.0, 0.0)):
        assert _arithmetic.largest_momentum(b1, b2, float32) > 1e19


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("spread", [1, 4, 12])
def test_what_was_dequantized_stays(signed, spread):
    """Though the largest number of every 20th group had been rounded down a step."""
    x = jnp.exp(spread * noise((1500, 128)))
    x = x * jnp.sign(noise(x.shape, 1)) if signed else x
    once = Float8Array.quantize(x, signed=signed).dequantize()
    twice = Float8Array.quantize(once, signed=signed).dequantize()
    np.testing.assert_array_equal(once, twice)
    ones = Float8Array.quantize(jnp.ones((1, 128)), signed=signed).dequantize()
    np.testing.assert_array_equal(ones, 1 - 2**-15 if signed else 1)


def test_momentum_of_other_decay_rates_is_kept():
    """It may exceed what the present ones allow, by more than any rounding."""
    g = jnp.full((1, 128), 1e-3)
    old = scale_by_adamod(b2=0.999, b3=0.0)
    state = old.init(g)
    for scale in (*[1] * 20, 1000, 1):
        _, state = old.update(scale * g, state)
    b2 = 0.95
    wide, narrow = (
        scale_by_adamod(b2=b2, b3=0.0, mu_dtype=x) for x in (None, "float8")
    )
    expected, _ = wide.update(g, state)
    limit = _arithmetic.largest_momentum(0.9, b2, np.dtype(np.float32))
    assert jnp.all(jnp.abs(state.mu) > 1.5 * limit * jnp.sqrt(state.nu))
    actual, _ = narrow.update(g, from_adamod(state, narrow.init(g)))
    np.testing.assert_allclose(jnp.mean(actual), jnp.mean(expected), rtol=0.07)
