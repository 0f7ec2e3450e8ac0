"""Does Orbax save and restore the whole state, on any devices, without a bit lost?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COUNT, assert_equal_but_for_few_roundings, make_mesh
from optax_adamod import ScaleByAdamodState, adamod

SCHEDULE = optax.linear_schedule(0.1, 0.0, 20)
TX = optax.chain(
    optax.clip(1.0),
    adamod(SCHEDULE, b3=0.9, mu_dtype="bfloat16", bound_dtype="bfloat16"),
)
SHAPES = {"w": (8, 16), "b": (16,)}


def arrays(step):
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def put(tree, devices):
    """On a mesh of so many devices."""
    mesh = make_mesh(("fsdp", "data"), devices=devices)
    split, whole = NamedSharding(mesh, P("data", "fsdp")), NamedSharding(mesh, P())
    return jax.tree.map(
        lambda x: jax.device_put(x, split if x.ndim == 2 else whole), tree
    )


def train(params, state, steps, devices):
    """Updates with gradients that are data: no sum whose order a mesh decides."""
    update = jax.jit(TX.update)
    for step in steps:
        updates, state = update(put(arrays(step), devices), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, state


def save(folder, step, state):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))


def restore(folder, step, like):
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(like))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the checkpoint of step 3 on all devices; its steps 3 and 6."""
    params = put(arrays(0), COUNT)
    third = train(params, TX.init(params), range(1, 4), COUNT)
    folder = tmp_path_factory.mktemp("run")
    save(folder, 3, third)
    return folder, third, train(*third, range(4, 7), COUNT)


@pytest.mark.parametrize("devices", sorted({1, COUNT // 2 or 1, COUNT}))
def test_restored_on_other_devices(run, devices):
    folder, third, sixth = run
    like = put(third, devices)
    restored = restore(folder, 3, like)
    chex.assert_trees_all_equal(*jax.device_get((restored, third)))
    chex.assert_trees_all_equal_dtypes(restored, third)
    assert jax.tree.structure(restored) == jax.tree.structure(third)
    for x, y in zip(*map(jax.tree.leaves, (restored, like)), strict=True):
        assert len(x.sharding.device_set) == devices
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    continued, sixth = jax.device_get((train(*restored, range(4, 7), devices), sixth))
    if devices == COUNT:
        chex.assert_trees_all_equal(continued, sixth)
    # Sums on shards of another shape may round otherwise.
    assert_equal_but_for_few_roundings(continued, sixth)


@nnx.jit
def nnx_step(model, optimizer):
    gradients = nnx.grad(lambda model: jnp.mean((model(jnp.eye(4)) - 1) ** 2))(model)
    optimizer.update(model, gradients)


def test_through_nnx(tmp_path):
    models = [nnx.Linear(4, 8, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    run, restored = ((x, nnx.Optimizer(x, TX, wrt=nnx.Param)) for x in models)
    for _ in range(3):
        nnx_step(*run)
    save(tmp_path, 3, nnx.state(run))
    nnx.update(restored, restore(tmp_path, 3, nnx.state(restored)))
    _, (adamod_state, _) = restored[1].opt_state
    assert type(adamod_state) is ScaleByAdamodState
    assert adamod_state.count[...] == 3
    for each in (run, restored):
        nnx_step(*each)
    chex.assert_trees_all_equal(*map(nnx.state, (restored, run)))
