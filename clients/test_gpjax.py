"""Does GPJax find the marginal likelihood that SciPy's L-BFGS finds?"""

import chex
import flax.serialization
import gpjax as gpx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("x64")]


def problem():
    x = jnp.linspace(0.0, 6.0, 30)[:, None]
    noise = 0.1 * jax.random.normal(jax.random.key(0), x.shape)
    data = gpx.Dataset(x, jnp.sin(2 * x) + noise)
    prior = gpx.gps.Prior(
        mean_function=gpx.mean_functions.Zero(), kernel=gpx.kernels.RBF()
    )
    return prior * gpx.likelihoods.Gaussian(num_datapoints=30), data


def negative_mll(posterior, data):
    return -gpx.objectives.conjugate_mll(posterior, data)


def fit(tx, steps):
    posterior, data = problem()
    return gpx.fit(
        model=posterior, objective=negative_mll, train_data=data,
        optim=tx, num_iters=steps, verbose=False,
    )  # fmt: skip


def test_the_marginal_likelihood_is_scipys():
    tx, traces = counted(adamod(0.05, b3=0.9))
    _, losses = fit(tx, 500)
    assert sum(traces) == 1
    posterior, data = problem()
    best, _ = gpx.fit_scipy(
        model=posterior, objective=negative_mll, train_data=data, verbose=False
    )
    assert losses[-1] == pytest.approx(float(negative_mll(best, data)), abs=1e-3)
    assert losses[0] > losses[-1] + 5


def test_without_a_bound_it_is_adam():
    ours, adams = (fit(tx, 20)[1] for tx in (adamod(0.05, b3=0), optax.adam(0.05)))
    np.testing.assert_allclose(ours, adams, rtol=1e-6)


def test_the_state_of_its_parameters_is_serialized():
    """``gpx.fit`` keeps the state to itself, so this is a loop of one's own."""
    tx = adamod(0.05, b3=0.9)
    posterior, data = problem()
    graph, params, rest = nnx.split(posterior, gpx.parameters.Parameter, ...)
    gradients = jax.grad(
        lambda params: negative_mll(nnx.merge(graph, params, rest), data)
    )(params)
    _, state = tx.update(gradients, tx.init(params), params)
    pure = nnx.to_pure_dict(params)
    kept = flax.serialization.to_bytes(jax.tree.leaves(state))
    leaves = flax.serialization.from_bytes(jax.tree.leaves(tx.init(params)), kept)
    restored = jax.tree.structure(state).unflatten(leaves)
    chex.assert_trees_all_equal(restored, state)
    rates = jax.tree.leaves(learning_rates(restored, 0.05).bounded)
    assert len(rates) == len(jax.tree.leaves(pure))
    # The bound opens by a tenth of Adam's rate in the first step.
    for rate, gradient in zip(rates, jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(rate, 0.005 / np.abs(gradient), rtol=1e-5)
