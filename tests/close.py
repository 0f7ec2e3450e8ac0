"""How close two programs come that compute the same.

XLA rounds a sum of products once or twice, as it sees fit, for every program and every
shape of a shard. So equal bits are asked of one program on the same devices, of what is
stored and restored, and of random bits; of all else a few units in the last place.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

FEW_UNITS = 8 * float(np.finfo(np.float32).eps)


def assert_few_units_apart(actual, expected):
    """Of float32, relative to the largest of a leaf where a sum cancels."""
    actual, expected = jax.device_get((actual, expected))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    jax.tree.map(_assert_leaf_few_units_apart, actual, expected)


def assert_equal_but_for_few_roundings(actual, expected):
    """Where bfloat16 is rounded at random, a unit of float32 may turn a rounding.

    Then an average, and what follows from it, is a unit of bfloat16 apart.
    """
    actual, expected = jax.device_get((actual, expected))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=2**-6)
    far = total = 0
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        far += np.sum(np.abs(a - b) > FEW_UNITS * np.abs(b))
        total += a.size
    assert far <= 0.01 * total


def _assert_leaf_few_units_apart(a, b):
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        np.testing.assert_array_equal(a, b)
        return
    units = FEW_UNITS * (float(jnp.finfo(a.dtype).eps) / np.finfo(np.float32).eps)
    scale = np.max(np.abs(b), initial=0.0)
    np.testing.assert_allclose(a, b, rtol=units, atol=0.1 * units * float(scale))
