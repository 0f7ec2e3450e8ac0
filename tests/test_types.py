"""Do dtypes, shapes and structures stay what they are, and values finite?"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod, adamodw, scale_by_adamod

REAL = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def wide(dtype):
    """The dtype of nu and bound: real, and at least float32."""
    return jnp.result_type(jnp.float32, jnp.finfo(dtype).dtype)


@pytest.mark.parametrize(
    ("factory", "dtype", "mu_dtype"),
    [
        *itertools.product([adamod], REAL + COMPLEX, [None]),
        *itertools.product([adamod], ["float32", "bfloat16", "complex64"], REAL),
        *itertools.product([adamodw], ["float16", "complex64"], [None]),
    ],
)
def test_dtypes_are_kept(factory, dtype, mu_dtype, x64):
    tx = factory(1e-3, mu_dtype=mu_dtype)
    params = {"w": jnp.ones((2, 3), dtype), "b": jnp.asarray(0.5, dtype)}
    state = tx.init(params)
    expected_mu = jnp.dtype(mu_dtype or dtype)
    if dtype in COMPLEX and mu_dtype:
        expected_mu = jnp.result_type(mu_dtype, jnp.complex64)
    for name, expected in {
        "mu": expected_mu, "nu": wide(dtype), "bound": wide(dtype)
    }.items():  # fmt: skip
        for leaf in jax.tree.leaves(optax.tree.get(state, name)):
            assert leaf.dtype == expected

    def step(carry, flag):
        params, state = carry
        gradients = jax.tree.map(jnp.sin, params)
        # Both branches, and the loop, must have the same types.
        updates, state = jax.lax.cond(
            flag, lambda: tx.update(gradients, state, params), lambda: (params, state)
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        return (optax.apply_updates(params, updates), state), None

    flags = jnp.arange(6) % 2 == 0
    (after, new_state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, flags))(
        (params, state)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes((after, new_state), (params, state))
    chex.assert_tree_all_finite((after, new_state))
    assert optax.tree.get(new_state, "count") == 3


@pytest.mark.parametrize("name", ["nu_dtype", "bound_dtype"])
def test_rates_in_the_requested_dtype(name, x64):
    tx = scale_by_adamod(**{name: "float64"})
    gradients = jnp.full(3, 0.1, jnp.float32)
    state = tx.init(gradients)
    updates, new_state = jax.jit(tx.update)(gradients, state)
    chex.assert_trees_all_equal_dtypes(new_state, state)
    assert updates.dtype == jnp.float32
    assert getattr(state, name.removesuffix("_dtype")).dtype == jnp.float64


def test_wide_gradients_of_half_precision_parameters():
    """Arithmetic is in float32, whatever the parameters are."""
    tx = scale_by_adamod(b2=0.999, b3=0.999)
    state = tx.init(jnp.zeros(4, jnp.bfloat16))
    gradients = jnp.full(4, 0.1, jnp.float32)
    updates, state = tx.update(gradients, state)
    assert updates.dtype == jnp.float32
    # In bfloat16 0.999 is 1, and these would be 0 and NaN.
    chex.assert_trees_all_close(updates, jnp.full(4, 1e-3), rtol=1e-2)
    chex.assert_trees_all_close(state.nu, jnp.full(4, 1e-5), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1.0, 6e4])
def test_half_precision_with_defaults_is_finite_and_moves(dtype, magnitude):
    tx = scale_by_adamod(b3=0.9)
    gradients = jnp.full(4, magnitude, dtype)
    state = tx.init(gradients)
    update = jax.jit(tx.update)
    for _ in range(100):
        updates, state = update(gradients, state)
        chex.assert_tree_all_finite((updates, state))
    # Adam's step on a constant gradient is 1, where eps is small beside it.
    size = magnitude / (magnitude + 1e-8)
    chex.assert_trees_all_close(
        updates.astype(jnp.float32), jnp.full(4, size), rtol=0.2
    )


def test_empty_none_scalar_and_zero_size_leaves():
    params = {"none": None, "scalar": jnp.asarray(1.0), "empty": jnp.zeros((0, 3)),
              "node": {}, "vector": jnp.ones(2)}  # fmt: skip
    tx = adamodw(0.1, b3=0.0)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_close(updates["vector"], jnp.full(2, -0.1), rtol=1e-3)
    chex.assert_trees_all_close(updates["scalar"], jnp.asarray(-0.1), rtol=1e-3)
    for empty in ({}, (), None):
        updates, _ = adamod(0.1).update(empty, adamod(0.1).init(empty))
        assert updates == empty


def test_a_missing_gradient_leaves_its_averages():
    tx = scale_by_adamod()
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params))
    updates, new_state = tx.update({"a": jnp.ones(2), "b": None}, state)
    assert updates["b"] is None
    chex.assert_trees_all_equal_structs(new_state, state)
    chex.assert_trees_all_equal(new_state.bound["b"], state.bound["b"])
    assert np.all(new_state.bound["a"] > state.bound["a"])


def test_init_from_shapes():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    shapes = jax.eval_shape(lambda: params)
    for tx in (adamod(0.1), adamod(0.1, mu_dtype="float16")):
        expected = tx.init(params)
        chex.assert_trees_all_equal(tx.init(shapes), expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.eval_shape(tx.init, shapes), expected
        )


def test_state_has_no_weak_types():
    state = scale_by_adamod().init({"weak": jnp.asarray(1.0), "python": 1.0})
    assert not any(x.weak_type for x in jax.tree.leaves(state))
