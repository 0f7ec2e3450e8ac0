"""Do dtypes, shapes and structures stay what they are, and values finite?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod, adamodw, scale_by_adamod

DTYPES = "float16", "bfloat16", "float32", "float64", "complex64", "complex128"


@pytest.mark.parametrize(
    ("factory", "mu_dtype"),
    [(adamodw, None), *((adamod, dtype) for dtype in DTYPES[:4])],
)
def test_dtypes_are_kept(factory, mu_dtype, x64):
    tx = factory(1e-3, mu_dtype=mu_dtype)
    params = {dtype: jnp.full((2, 3), 0.5, dtype) for dtype in DTYPES}
    state = tx.init(params)
    for dtype in DTYPES:
        mu = jnp.dtype(mu_dtype or dtype)
        if "complex" in dtype:
            mu = jnp.result_type(mu, jnp.complex64)
        rate = jnp.result_type(jnp.float32, jnp.finfo(dtype).dtype)  # real, and wide
        for name, expected in {"mu": mu, "nu": rate, "bound": rate}.items():
            assert optax.tree.get(state, name)[dtype].dtype == expected

    flags = jnp.array([True, False])

    def step(carry, flag):
        params, state = carry
        gradients = jax.tree.map(jnp.sin, params)
        # Both branches, and the loop, must have the same types.
        updates, state = jax.lax.cond(
            flag, lambda: tx.update(gradients, state, params), lambda: (params, state)
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        return (optax.apply_updates(params, updates), state), None

    after = jax.eval_shape(lambda x: jax.lax.scan(step, x, flags)[0], (params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))


@pytest.mark.parametrize("name", ["nu", "bound"])
def test_rates_in_the_requested_dtype(name, x64):
    tx = scale_by_adamod(**{f"{name}_dtype": "float64"})
    gradients = jnp.full(3, 0.1, jnp.float32)
    state = tx.init(gradients)
    updates, new_state = tx.update(gradients, state)
    chex.assert_trees_all_equal_dtypes(new_state, state)
    assert updates.dtype == jnp.float32
    wide = [f for f in ("mu", "nu", "bound") if getattr(state, f).dtype == jnp.float64]
    assert wide == [name]


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


def test_empty_none_scalar_and_zero_size_leaves():
    params = {"none": None, "node": {}, "scalar": jnp.asarray(1.0)}
    params |= {"empty": jnp.zeros((0, 3)), "vector": jnp.ones(2)}
    tx = adamod(0.1, b3=0.0)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_close(updates["vector"], jnp.full(2, -0.1), rtol=1e-3)
    chex.assert_trees_all_close(updates["scalar"], jnp.asarray(-0.1), rtol=1e-3)
    for empty in ({}, (), None):
        assert tx.update(empty, tx.init(empty))[0] == empty


def test_a_missing_gradient_leaves_its_averages():
    tx = scale_by_adamod()
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params))
    updates, new_state = tx.update({"a": jnp.ones(2), "b": None}, state)
    assert updates["b"] is None
    chex.assert_trees_all_equal_structs(new_state, state)
    chex.assert_trees_all_equal(new_state.bound["b"], state.bound["b"])
    assert np.all(new_state.bound["a"] > state.bound["a"])


def test_parameters_of_another_shape_are_not_looked_at():
    """GaLore updates projections of gradients."""
    tx = scale_by_adamod(nu_dtype="float8", bound_dtype="float8")
    gradients, params = {"w": jnp.ones((2, 128))}, {"w": jnp.ones((5, 256))}
    state = tx.init(gradients)
    expected = tx.update(gradients, state)
    chex.assert_trees_all_equal(tx.update(gradients, state, params), expected)


def test_init_from_shapes():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    tx = adamod(0.1, mu_dtype="float16")
    shapes, expected = jax.eval_shape(lambda: params), tx.init(params)
    chex.assert_trees_all_equal(tx.init(shapes), expected)
    abstract = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, expected)


def test_state_has_no_weak_types():
    state = scale_by_adamod().init({"weak": jnp.asarray(1.0), "python": 1.0})
    assert not any(x.weak_type for x in jax.tree.leaves(state))
