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


def sharding(devices):
    """A function of a leaf, for a mesh of so many devices."""
    mesh = make_mesh(("fsdp", "data"), devices=devices)

    def of(leaf):
        return NamedSharding(mesh, P("data", "fsdp") if leaf.ndim == 2 else P())

    return of


def arrays(step):
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def put(tree, of):
    return jax.tree.map(lambda x: jax.device_put(x, of(x)), tree)


def abstract(tree, of):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of(x)), tree
    )


def train(params, state, steps, of):
    """Updates with gradients that are data: no sum whose order a mesh decides."""
    update = jax.jit(TX.update)
    for step in steps:
        updates, state = update(put(arrays(step), of), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, state


def save(folder, step, state):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))


def restore(folder, step, like):
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(like))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the checkpoint of step 3 on all devices; its steps 3 and 6."""
    of = sharding(COUNT)
    params = put(arrays(0), of)
    third = train(params, TX.init(params), range(1, 4), of)
    folder = tmp_path_factory.mktemp("run")
    save(folder, 3, third)
    return folder, third, train(*third, range(4, 7), of)


@pytest.mark.parametrize("devices", sorted({1, COUNT // 2 or 1, COUNT}))
def test_restored_on_other_devices(run, devices):
    folder, third, sixth = run
    of = sharding(devices)
    restored = restore(folder, 3, abstract(third, of))
    for leaf in jax.tree.leaves(restored):
        assert len(leaf.sharding.device_set) == devices
        assert leaf.sharding.is_equivalent_to(of(leaf), leaf.ndim)
    chex.assert_trees_all_equal(*jax.device_get((restored, third)))
    chex.assert_trees_all_equal_dtypes(restored, third)
    assert jax.tree.structure(restored) == jax.tree.structure(third)
    _, (adamod_state, schedule_state) = restored[1]
    assert type(adamod_state) is ScaleByAdamodState
    assert type(schedule_state) is optax.ScaleByScheduleState
    continued, sixth = jax.device_get((train(*restored, range(4, 7), of), sixth))
    if devices == COUNT:
        chex.assert_trees_all_equal(continued, sixth)
    # Sums on shards of another shape may round otherwise.
    assert_equal_but_for_few_roundings(continued, sixth)


def nnx_run(seed):
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x):
    gradients = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
    optimizer.update(model, gradients)


def test_through_nnx(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 16, 4)).astype(np.float32)
    run, restored = nnx_run(seed=0), nnx_run(seed=1)
    for step in range(3):
        nnx_step(*run, x[step])
    save(tmp_path, 3, nnx.state(run))
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(restored))
    nnx.update(restored, restore(tmp_path, 3, like))
    _, (adamod_state, _) = restored[1].opt_state
    assert type(adamod_state) is ScaleByAdamodState
    assert adamod_state.count[...] == 3
    for each in (run, restored):
        nnx_step(*each, x[3])
    chex.assert_trees_all_equal(*map(nnx.state, (restored, run)))


def test_orbax_itself_names_the_missing_tree(tmp_path):
    params = {name: jnp.asarray(x) for name, x in arrays(0).items()}
    save(tmp_path, 1, {"params": params, "opt_state": optax.adam(0.1).init(params)})
    like = {"params": params, "opt_state": adamod(0.1).init(params)}
    with pytest.raises(ValueError, match=r"do not match:\nopt_state.*bound:"):
        restore(tmp_path, 1, like)
