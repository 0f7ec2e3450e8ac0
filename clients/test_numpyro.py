"""Does NumPyro's SVI find a known posterior?"""

import chex
import flax.serialization
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import optax_to_numpyro

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
DATA = np.random.default_rng(0).normal(2.0, 1.0, 50).astype(np.float32)


def model():
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    numpyro.sample("x", dist.Normal(mean, 1.0), obs=DATA)


def run(tx, steps, state=None):
    svi = SVI(model, AutoNormal(model), optax_to_numpyro(tx), Trace_ELBO(20))
    key = jax.random.key(0)
    svi.init(key)  # which ``run`` does only where it is given no state
    return svi.run(key, steps, progress_bar=False, init_state=state)


def test_the_posterior_of_a_mean():
    tx, traces = counted(adamod(optax.cosine_decay_schedule(0.05, 800), b3=0.9))
    found = run(tx, 800)
    assert sum(traces) == 1
    variance = 1 / (1 / 10**2 + len(DATA))
    assert found.params["mean_auto_loc"] == pytest.approx(
        variance * DATA.sum(), abs=0.1 * variance**0.5
    )
    assert found.params["mean_auto_scale"] == pytest.approx(variance**0.5, rel=0.1)
    # The page says where the state is.
    rates = learning_rates(found.state.optim_state, 0.05).bounded
    assert rates.keys() == found.params.keys()


def test_without_a_bound_it_is_adam():
    chex.assert_trees_all_close(
        run(adamod(0.05, b3=0), 30).losses, run(optax.adam(0.05), 30).losses, rtol=1e-4
    )


def test_a_run_goes_on_from_its_serialized_state():
    tx = adamod(0.05, b3=0.9)
    state = run(tx, 10).state
    like = run(tx, 1).state
    kept = flax.serialization.to_bytes(state.optim_state)
    restored = state._replace(
        optim_state=flax.serialization.from_bytes(like.optim_state, kept)
    )
    chex.assert_trees_all_equal(run(tx, 10, restored).losses, run(tx, 10, state).losses)
