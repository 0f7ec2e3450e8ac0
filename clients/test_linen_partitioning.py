"""Does Linen's logical partitioning shard the state, as lm1b and MaxText do it?"""

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = pytest.mark.clients
RULES = (("batch", "data"), ("embed", None), ("mlp", "model"))
X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(1), (16, 16)))
EIGHT_BITS = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}


class Network(nn.Module):
    """Two layers, whose kernels have logical axes."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        for features, axes in ((256, ("embed", "mlp")), (16, ("mlp", "embed"))):
            kernel = nn.with_logical_partitioning(init, axes)
            x = jnp.tanh(nn.Dense(features, kernel_init=kernel)(x))
            x = nn.with_logical_constraint(x, ("batch", axes[1]))
        return x


def mesh_of(data, model):
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return jax.sharding.Mesh(devices, ("data", "model"))


def sharded_state(tx, mesh):
    """Returns a state made in its shards, still in its boxes, and the shardings."""

    def init_fn(key):
        params = Network().init(key, X)["params"]
        return TrainState.create(apply_fn=Network().apply, params=params, tx=tx)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        abstract = jax.eval_shape(init_fn, jax.random.key(2))
        logical = nn.get_partition_spec(abstract)
        shardings = nn.logical_to_mesh_sharding(logical, mesh, RULES)
        init = jax.jit(init_fn, out_shardings=shardings)
        return init(jax.random.key(2)), shardings


def train(tx, steps, mesh):
    state, shardings = sharded_state(tx, mesh)
    batch_sharding = NamedSharding(mesh, PartitionSpec("data"))

    def step(state, x, y):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    step = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding, batch_sharding),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    losses = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        for _ in range(steps):
            state, value = step(state, X, Y)
            losses.append(float(value))
    return losses, state


def kernel(tree):
    return tree["Dense_0"]["kernel"].value  # in the box of its logical axes


@pytest.mark.parametrize("dtypes", [{}, EIGHT_BITS], ids=["float32", "float8"])
def test_it_learns_in_the_shards_of_the_parameters(dtypes):
    tx, traces = counted(adamod(0.01, b3=0.9, **dtypes))
    losses, state = train(tx, 200, mesh_of(2, 2))
    assert sum(traces) == 1
    assert losses[-1] < 0.1 * losses[0]
    expected = NamedSharding(mesh_of(2, 2), PartitionSpec(None, "model"))
    assert kernel(state.params).sharding.is_equivalent_to(expected, 2)
    for name in ("mu", "nu", "bound"):
        average = optax.tree.get(state.opt_state, name)
        for array in jax.tree.leaves(average["Dense_0"]["kernel"]):
            # In 8 bits too: two groups of 128 share an exponent each.
            assert array.sharding.is_equivalent_to(expected, 2)
    with jax.set_mesh(mesh_of(2, 2)):  # NetKet's import has set one of all devices
        rates = learning_rates(state.opt_state, 0.01).bounded
    assert kernel(rates).shape == (16, 256)


@pytest.mark.parametrize("data", [1, 2, 4])
def test_without_a_bound_it_is_adam(data):
    ours, _ = train(adamod(0.01, b3=0), 10, mesh_of(data, 4 // data))
    adams, _ = train(optax.adam(0.01), 10, mesh_of(1, 1))
    np.testing.assert_allclose(ours, adams, rtol=1e-3)


def test_boxed_leaves_survive_msgpack():
    tx = adamod(0.01, b3=0.9)
    _, state = train(tx, 3, mesh_of(2, 2))
    fresh, _ = sharded_state(tx, mesh_of(2, 2))
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored.opt_state, state.opt_state)
    chex.assert_trees_all_equal(restored.params, state.params)
