"""Does a neural differential equation in diffrax and Equinox learn a flow?"""

import io

import chex
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
TIMES = jnp.linspace(0.0, 2.0, 11)
STARTS = jax.random.normal(jax.random.key(0), (16, 2))
ROTATION = jnp.array([[-0.3, 1.0], [-1.0, -0.3]])


class Field(eqx.Module):
    """A vector field."""

    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        """Returns the velocity."""
        del t, args
        return self.mlp(y)


def paths(field):
    def path(start):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Heun(), 0.0, 2.0, 0.1, start,
            saveat=diffrax.SaveAt(ts=TIMES),
        ).ys  # fmt: skip

    return jax.vmap(path)(STARTS)


def new_field():
    return Field(eqx.nn.MLP(2, 2, 16, 1, jax.nn.tanh, key=jax.random.key(1)))


def train(tx, steps, field=None, state=None):
    target = paths(lambda t, y, args: ROTATION @ y)  # noqa: ARG005
    field = new_field() if field is None else field
    if state is None:
        state = tx.init(eqx.filter(field, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(field, state):
        loss, gradients = eqx.filter_value_and_grad(
            lambda field: jnp.mean((paths(field) - target) ** 2)
        )(field)
        params = eqx.filter(field, eqx.is_inexact_array)
        updates, state = tx.update(gradients, state, params)
        return loss, eqx.apply_updates(field, updates), state

    losses = []
    for _ in range(steps):
        loss, field, state = step(field, state)
        losses.append(float(loss))
    return losses, field, state


def test_it_learns_the_paths():
    tx, traces = counted(adamod(0.02, b3=0.9))
    losses, _, state = train(tx, 150)
    assert sum(traces) == 1
    assert losses[-1] < 0.01 < 0.3 < losses[0]
    rates = learning_rates(state, 0.02).bounded
    assert rates.mlp.layers[0].weight.shape == (16, 2)


def test_without_a_bound_it_is_adam():
    ours, adams = (train(tx, 10)[0] for tx in (adamod(0.02, b3=0), optax.adam(0.02)))
    np.testing.assert_allclose(ours, adams, rtol=1e-3)


def test_a_run_goes_on_from_its_serialised_leaves():
    tx, kept = adamod(0.02, b3=0.9), io.BytesIO()
    _, field, state = train(tx, 5)
    eqx.tree_serialise_leaves(kept, (field, state))
    kept.seek(0)
    fresh = new_field()
    like = fresh, tx.init(eqx.filter(fresh, eqx.is_inexact_array))
    restored = eqx.tree_deserialise_leaves(kept, like)
    chex.assert_trees_all_equal(restored[1], state)
    assert train(tx, 5, *restored)[0] == train(tx, 5, field, state)[0]
