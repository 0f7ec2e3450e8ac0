"""Do codes in 8 bits mean what they should, and are averages of them unbiased?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamod import Float8Array, _float8, scale_by_adamod

FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}


def noise(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def codes_of(group, bits, signed=False):
    """Encodes a group of 128 once for each of some random bits."""
    x = jnp.broadcast_to(jnp.asarray(group, jnp.float32), (len(bits), 128))
    bits = jnp.asarray(bits, jnp.uint32)[:, None]
    dtype = _float8.code_dtype(signed)
    (shared,) = _float8.exponents([x], [dtype])
    coded, numbers = _float8.encode(x, shared, dtype, bits)
    chex.assert_trees_all_equal(coded.dequantize(), numbers)
    return numbers


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


def test_special_numbers_keep_their_meaning():
    group = np.ones(128, np.float32)
    group[:6] = 0, np.inf, np.nan, 1e8, 2.0**-30, np.finfo(np.float32).tiny
    for bits in (0, 2**19, 2**20 - 1):
        back = np.asarray(codes_of(group, [bits]))[0]
        assert back[0] == 0
        assert back[1] == np.inf
        assert np.isnan(back[2])
        assert 0.87e8 <= back[3] <= 1.13e8
        assert back[4] > 0
        assert back[5] > 0  # else an update would divide by eps
        np.testing.assert_allclose(back[6:], 1, rtol=0.126)
    group[4:6] = -np.inf, -1e7
    back = np.asarray(codes_of(group, [2**19], signed=True))[0]
    assert back[4] == -np.inf
    np.testing.assert_allclose(back[[3, 5]], group[[3, 5]], rtol=0.126)
    assert np.isnan(codes_of(-group, [0])[0, 6])  # no sign, and no silence


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-8, 1.0, 1e30, 3.4e38])
def test_every_magnitude(magnitude):
    group = np.full(128, magnitude, np.float32)
    for signed in (False, True):
        for bits in (0, 2**20 - 1):
            back = np.asarray(codes_of(group, [bits], signed))
            assert np.all(np.isfinite(back))
            if 1e-37 < magnitude < 1e38:
                np.testing.assert_allclose(back, magnitude, rtol=0.126)


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
    scale = jnp.exp(spread * noise((coordinates,), 1))

    def body(carry, step):
        state, total = carry
        g = scale * jnp.exp(
            sigma * jax.random.normal(jax.random.key(step), (coordinates,))
        )
        updates, state = tx.update(g, state)
        seen = (*map(numbers, (state.nu, state.bound)), jnp.abs(updates))
        late = step >= steps // 2
        return (state, jax.tree.map(lambda a, x: a + late * x, total, seen)), None

    start = tx.init(scale), (jnp.zeros(coordinates),) * 3
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
