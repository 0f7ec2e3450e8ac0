"""Do the bounds and symmetries of the method hold for any input?"""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from optax_adamod import adamod, scale_by_adamod

STEPS = 3
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
ALL_DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])
SHAPES = st.sampled_from([(), (0,), (3,), (2, 3), (2, 1, 2)])  # few to compile for
EXPONENTS = st.integers(-38, 18)
CONVENTIONS = st.sampled_from(["paper", "torch"])
DECAYS = st.sampled_from([0.0, 0.3, 0.9, 0.999, 0.9999])


@st.composite
def gradient_trees(draw, dtypes=DTYPES, exponents=EXPONENTS):
    """STEPS trees of one structure, with gradients of any magnitude and zeros."""
    leaf = st.tuples(SHAPES, dtypes, exponents)
    tree = draw(
        st.recursive(
            leaf,
            lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            max_leaves=4,
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def gradient(spec):
        shape, dtype, exponent = spec

        def values():
            signs = rng.choice([-1.0, 0.0, 1.0], shape)
            values = signs * 10.0 ** (exponent + rng.uniform(-2, 0, shape))
            largest = float(jnp.finfo(dtype).max)
            return np.clip(values, -largest, largest)

        parts = 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 0
        return jnp.asarray(values() + parts * values(), dtype)

    is_spec = lambda x: isinstance(x, tuple)  # noqa: E731
    return [jax.tree.map(gradient, tree, is_leaf=is_spec) for _ in range(STEPS)]


def run(tx, gradients):
    """Returns the updates of every step, and the last state."""
    state, updates = tx.init(gradients[0]), []
    for g in gradients:  # eager, so that only leaves are compiled, once for each shape
        u, state = tx.update(g, state, g)
        updates.append(u)
    return updates, state


# Up to the largest number that the dtype holds.
@hypothesis.given(
    gradient_trees(ALL_DTYPES, st.integers(-38, 42)),
    DECAYS,
    DECAYS,
    DECAYS,
    CONVENTIONS,
    st.sampled_from([1e-12, 1e-8, 1e-4]),
    st.booleans(),
)
@hypothesis.settings(max_examples=60)
def test_everything_is_finite(gradients, b1, b2, b3, convention, eps, nesterov):
    nesterov = nesterov and convention == "paper"
    tx = adamod(1e-3, b1, b2, b3, eps, convention=convention, nesterov=nesterov)
    updates, (state, _) = run(tx, gradients)
    chex.assert_tree_all_finite((state.mu, state.bound))
    for u in jax.tree.leaves(updates):
        # float16 itself may not hold a step, of 1e9 where eps alone divides.
        overflows = u.dtype == np.float16
        assert not np.any(np.isnan(u) if overflows else ~np.isfinite(u))
    # Squares may be infinite; what divides by their roots is then 0.
    assert not any(np.any(np.isnan(v)) for v in jax.tree.leaves(state.nu))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates[0], gradients[0])


@hypothesis.given(gradient_trees(st.just("float32")), DECAYS, CONVENTIONS)
@hypothesis.settings(max_examples=40)
def test_no_step_is_larger_than_adams(gradients, b3, convention):
    bounded, _ = run(scale_by_adamod(b3=b3, convention=convention), gradients)
    adam, _ = run(scale_by_adamod(b3=0.0, convention=convention), gradients)
    for ours, theirs in zip(
        jax.tree.leaves(bounded), jax.tree.leaves(adam), strict=True
    ):
        # The bound, at b3 = 0 the rate itself, is rounded once more than the rate.
        assert np.all(np.abs(ours) <= np.abs(theirs) * (1 + 1e-6))


@hypothesis.given(gradient_trees(), DECAYS, CONVENTIONS)
@hypothesis.settings(max_examples=40)
def test_the_update_turns_with_the_sign(gradients, b3, convention):
    tx = scale_by_adamod(b3=b3, convention=convention)
    updates, _ = run(tx, gradients)
    turned, _ = run(tx, [optax.tree.scale(-1, g) for g in gradients])
    chex.assert_trees_all_equal(turned, [optax.tree.scale(-1, u) for u in updates])


@hypothesis.given(
    gradient_trees(st.just("float32"), st.integers(-6, 4)),
    DECAYS,
    CONVENTIONS,
    st.integers(-20, 20),
)
@hypothesis.settings(max_examples=40)
def test_the_unit_of_the_gradient_does_not_matter(gradients, b3, convention, power):
    """A power of two scales without rounding, so the updates are the same bits."""
    scale = 2.0**power
    updates, _ = run(
        scale_by_adamod(b3=b3, eps=2.0**-30, convention=convention), gradients
    )
    scaled, _ = run(
        scale_by_adamod(b3=b3, eps=scale * 2.0**-30, convention=convention),
        [optax.tree.scale(scale, g) for g in gradients],
    )
    chex.assert_trees_all_equal(scaled, updates)
