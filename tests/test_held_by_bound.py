"""Are the share that the bound holds, and the mean factor, NumPy's?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from helpers import COUNT, make_mesh
from optax_adamod import LearningRates, held_by_bound


def numpy_held(adaptive, bounded):
    held = bounded < adaptive
    factors = (adaptive / bounded)[held].astype(np.float64)
    return (
        np.float32(held.sum() / (~np.isnan(adaptive)).sum()),
        np.float32(np.exp(np.log(factors).mean())),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001])
def test_what_the_bound_holds(size, dtype, x64):
    rng = np.random.default_rng(size)
    adaptive = rng.lognormal(sigma=3, size=(size, 7)).astype(dtype)
    bound = rng.lognormal(sigma=3, size=(size, 7)).astype(dtype)
    adaptive[0, :2], bound[0, :2] = (np.nan, 9.0), (1.0, 1.0)
    rates = LearningRates({"a": adaptive}, {"a": np.minimum(adaptive, bound)})
    held = jax.jit(held_by_bound)(jax.tree.map(jnp.asarray, rates))
    share, factor = numpy_held(adaptive, np.minimum(adaptive, bound))
    chex.assert_trees_all_close(tuple(held), ({"a": share}, {"a": factor}), rtol=2e-6)
    assert held.factor["a"].dtype == held.share["a"].dtype == np.float32


def test_nothing_to_hold():
    nan, zero = jnp.full(3, jnp.nan), jnp.zeros((0, 2))
    one = jnp.asarray(1.0)
    rates = LearningRates([nan, zero, one], [nan, zero, one])
    share, factor = held_by_bound(rates)
    np.testing.assert_array_equal(share, [np.nan, np.nan, 0.0])
    np.testing.assert_array_equal(factor, [np.nan] * 3)


def test_factors_that_are_alike():
    held = held_by_bound(LearningRates(jnp.full(5, 6.0), jnp.full(5, 2.0)))
    assert held == pytest.approx((1.0, 3.0))
    infinite = held_by_bound(LearningRates(jnp.full(5, jnp.inf), jnp.full(5, 2.0)))
    assert infinite == (1.0, np.inf)


def test_more_coordinates_than_float32_counts():
    """Added one by one, 2**24 and 1 are 2**24."""
    n = 2**25
    adaptive = jnp.where(jnp.arange(n) % 4 == 0, 2.0, 1.0)
    held = jax.jit(held_by_bound)(LearningRates(adaptive, jnp.ones(n)))
    assert held == pytest.approx((0.25, 2.0), rel=1e-5)


def test_each_device_for_itself():
    rng = np.random.default_rng(0)
    adaptive = rng.lognormal(sigma=3, size=(COUNT, 50)).astype(np.float32)
    bounded = np.minimum(adaptive, rng.lognormal(size=(COUNT, 50)).astype(np.float32))
    mesh = make_mesh(("x",))
    held = jax.shard_map(
        lambda rates: jax.tree.map(lambda x: x[None], held_by_bound(rates)),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
    )
    share, factor = jax.jit(held)(LearningRates(adaptive, bounded))
    expected = [numpy_held(*pair) for pair in zip(adaptive, bounded, strict=True)]
    chex.assert_trees_all_close(
        (share, factor), tuple(np.asarray(expected).T), rtol=2e-6
    )
