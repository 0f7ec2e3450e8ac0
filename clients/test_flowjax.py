"""Does a normalizing flow in flowjax learn a known distribution?"""

import io

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from flowjax.bijections import Affine
from flowjax.distributions import Normal, StandardNormal, Transformed
from flowjax.train import fit_to_data, fit_to_key_based_loss, step
from flowjax.train.losses import ElboLoss, MaximumLikelihoodLoss

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
MEAN, SCALE = np.array([1.0, -2.0]), np.array([0.5, 2.0])
DATA = MEAN + SCALE * np.random.default_rng(0).normal(size=(500, 2))


def new_flow():
    return Transformed(StandardNormal((2,)), Affine(jnp.zeros(2), jnp.ones(2)))


def fit(tx, epochs):
    return fit_to_data(
        jax.random.key(0), new_flow(), jnp.asarray(DATA, jnp.float32),
        optimizer=tx, max_epochs=epochs, max_patience=epochs, batch_size=50,
        return_best=False, show_progress=False,
    )  # fmt: skip


def test_the_mean_and_the_scale_of_data():
    tx, traces = counted(adamod(optax.cosine_decay_schedule(0.05, 360), b3=0.9))
    flow, _ = fit(tx, 40)  # of 9 batches
    assert sum(traces) == 1
    affine = paramax.unwrap(flow).bijection
    np.testing.assert_allclose(affine.loc, DATA.mean(axis=0), atol=0.15)
    np.testing.assert_allclose(affine.scale, DATA.std(axis=0), rtol=0.1)


def test_a_target_density():
    tx, traces = counted(adamod(0.03, b3=0.9))
    target = Normal(jnp.asarray(MEAN, jnp.float32), jnp.asarray(SCALE, jnp.float32))
    flow, losses = fit_to_key_based_loss(
        jax.random.key(1), new_flow(), loss_fn=ElboLoss(target.log_prob, 50),
        steps=400, optimizer=tx, show_progress=False,
    )  # fmt: skip
    assert sum(traces) == 1
    affine = paramax.unwrap(flow).bijection
    np.testing.assert_allclose(affine.loc, MEAN, atol=0.1)
    np.testing.assert_allclose(affine.scale, SCALE, rtol=0.1)
    assert abs(losses[-1]) < 0.05  # of the exact flow it is zero


def test_without_a_bound_it_is_adam():
    ours, adams = (
        fit(tx, 3)[1]["train"] for tx in (adamod(0.03, b3=0), optax.adam(0.03))
    )
    np.testing.assert_allclose(ours, adams, rtol=1e-4)


def test_a_run_goes_on_from_its_serialised_leaves():
    tx, kept = adamod(0.03, b3=0.9), io.BytesIO()
    params, static = eqx.partition(new_flow(), eqx.is_inexact_array)
    loss = MaximumLikelihoodLoss()

    def three_steps(params, state):
        for _ in range(3):
            params, state, _ = step(
                params, static, jnp.asarray(DATA[:100], jnp.float32),
                optimizer=tx, opt_state=state, loss_fn=loss,
            )  # fmt: skip
        return params, state

    like = params, tx.init(params)
    carry = three_steps(*like)
    eqx.tree_serialise_leaves(kept, carry)
    kept.seek(0)
    restored = eqx.tree_deserialise_leaves(kept, like)
    chex.assert_trees_all_equal(three_steps(*restored), three_steps(*carry))
    rates = learning_rates(restored[1], 0.03).bounded
    assert jax.tree.structure(rates) == jax.tree.structure(params)
