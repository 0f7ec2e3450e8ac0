"""What several test files share: how close is close, meshes, rounding to nearest.

XLA rounds a sum of products once or twice, as it sees fit, for every program and every
shape of a shard. So equal bits are asked of one program on the same devices, of what is
stored and restored, and of random bits; of all else a few units in the last place.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

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


# Meshes are of as many devices as there are: the accelerators, one included, or 8 CPUs.
# `JAX_NUM_CPU_DEVICES=1 pytest` runs the tests as a machine with one device does.
# A power of two, so that it divides the tests' arrays.
COUNT = min(8, 1 << (jax.device_count().bit_length() - 1))
# Of two axes the first is the longer.
_SHAPES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


def make_mesh(names, axis_types=AxisType.Auto, devices=COUNT):
    """A mesh of one axis or two, of one type or of a type each."""
    if isinstance(axis_types, AxisType):
        axis_types = (axis_types,) * len(names)
    return jax.make_mesh(
        (devices,) if len(names) == 1 else _SHAPES[devices],
        names,
        axis_types=axis_types,
        devices=jax.devices()[:devices],
    )


def rounded_to_nearest(tx):
    """Keeps a transformation's float32 averages in bfloat16, rounded to nearest."""

    def cast(state, old, new):
        return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, state)

    def init_fn(params):
        return cast(tx.init(params), jnp.float32, jnp.bfloat16)

    def update_fn(updates, state, params=None):
        state = cast(state, jnp.bfloat16, jnp.float32)
        updates, state = tx.update(updates, state, params)
        return updates, cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformation(init_fn, update_fn)


BFLOAT16 = {f"{name}_dtype": "bfloat16" for name in ("mu", "nu", "bound")}
FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}
# In a compiled program.
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|"
    r"reduce-scatter)(-start)?\("
)


def noise(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def trained(tx, params, steps=4):
    """The last update and state, with noise as gradients, sharded as parameters."""
    state, update = tx.init(params), jax.jit(tx.update)
    updates = params
    for step in range(steps):
        gradients = jax.tree.map(
            lambda p, step=step: jax.device_put(noise(p.shape, step), p.sharding),
            params,
        )
        updates, state = update(gradients, state, params)
    return updates, state


def assert_same_codes(actual, expected):
    """Fused multiply-adds may turn one code of 10,000, by one."""
    far = total = 0
    leaves = map(jax.tree.leaves, jax.device_get((actual, expected)))
    for a, b in zip(*leaves, strict=True):
        assert a.shape == b.shape
        if a.dtype in (np.int8, np.uint8):
            apart = np.abs(a.astype(int) - b.astype(int))
            assert apart.max() <= 1
            far, total = far + np.sum(apart), total + apart.size
    assert total > 0
    assert far <= 1e-4 * total + 1
