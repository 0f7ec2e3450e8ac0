"""Is the state placed as its parameters, always, and are the updates the same?"""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import BFLOAT16, COUNT, FLOAT8, assert_few_units_apart, make_mesh
from optax_adamod import (
    adamod,
    adamodw,
    round_updates_stochastically,
    scale_by_adamod,
)

SPECS = {"w": P("data", "fsdp"), "v": P(None, "fsdp"), "b": P("fsdp"), "scale": P()}
SHAPES = {"w": (8, 16), "v": (3, 8), "b": (12,), "scale": ()}
DTYPES = {"w": "float16", "v": "bfloat16", "b": "float32", "scale": "float32"}
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|"
    r"reduce-scatter)(-start)?\("
)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
AXES = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)
AXIS_NAMES = ("fsdp", "data")


def arrays(step=0):
    """Parameters, or the gradients of a step: data, whatever the optimizer does."""
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def shard(tree, mesh):
    return {
        k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()
    }


def averages(state):
    return [optax.tree.get(state, name) for name in ("mu", "nu", "bound")]


def train(tx, put, steps=3):
    """Returns the parameters, updates and state after some steps."""
    params = put(arrays())
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates = None
    for step in range(1, steps + 1):
        updates, state = update(put(arrays(step)), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, updates, state


@pytest.mark.parametrize(
    ("axis_type", "dtypes", "jitted"),
    [
        (AUTO, {}, True),
        (AUTO, BFLOAT16, False),
        (EXPLICIT, {}, False),
        (EXPLICIT, BFLOAT16, True),
    ],
    ids=["auto-jitted", "auto-bfloat16", "explicit", "explicit-bfloat16-jitted"],
)
def test_the_state_is_sharded_as_its_parameters(axis_type, dtypes, jitted):
    """From init on, where no device may hold, or send, more than its own shards.

    Shape, dtype and, with explicit axes, sharding are an array's type.
    """
    mesh = make_mesh(AXIS_NAMES, axis_type)
    tx = adamodw(0.1, **dtypes)
    params = shard({k: x.astype(DTYPES[k]) for k, x in arrays().items()}, mesh)
    with jax.set_mesh(mesh), jax.transfer_guard_device_to_device("disallow_explicit"):
        state = tx.init(params)
    with jax.set_mesh(mesh):
        update = jax.jit(tx.update) if jitted else tx.update
        updates, new_state = update(params, state, params)
        types = jax.tree.map(jax.typeof, (state, params))
        assert jax.tree.map(jax.typeof, (new_state, updates)) == types
        if jitted:
            in_jit = jax.jit(tx.init)(params)
            assert jax.tree.map(jax.typeof, in_jit) == types[0]
    for average in (*averages(state), *averages(new_state)):
        for name, leaf in average.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
            assert len(leaf.addressable_shards) == COUNT
            if axis_type == EXPLICIT:
                assert jax.typeof(leaf).sharding.spec == SPECS[name]


@pytest.mark.parametrize("sharded", [False, True])
def test_init_keeps_the_kind_of_memory(sharded):
    mesh = make_mesh(AXIS_NAMES)
    params = shard(arrays(), mesh) if sharded else jax.tree.map(jnp.asarray, arrays())
    params = {
        k: jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
        for k, x in params.items()
    }
    for average in averages(scale_by_adamod(**BFLOAT16).init(params)):
        for name, leaf in average.items():
            assert leaf.sharding == params[name].sharding
            assert leaf.sharding.memory_kind == "pinned_host"


@pytest.mark.skipif(
    jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10),
    reason="before 0.10, JAX on CPU cannot move arrays to host memory inside jit",
)
def test_averages_in_host_memory():
    """As docs/pods.md has it: the same updates, and the state stays on the host."""
    mesh, tx = make_mesh(AXIS_NAMES), adamod(0.1, b3=0.9)
    expected, _, expected_state = train(tx, lambda tree: shard(tree, mesh))
    params = shard(arrays(), mesh)
    state = tx.init(params)
    device = optax.tree.map_params(
        tx,
        lambda x: x.sharding,
        state,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), device)
    placed = jax.tree.map(lambda x: x.sharding, params), host

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=placed)
    def step(params, state, gradients):
        updates, state = tx.update(gradients, jax.device_put(state, device), params)
        return optax.apply_updates(params, updates), jax.device_put(state, host)

    state = jax.device_put(state, host)
    for i in range(1, 4):
        params, state = step(params, state, shard(arrays(i), mesh))
        for leaf in jax.tree.leaves(state):
            assert leaf.sharding.memory_kind == "pinned_host"
    assert_few_units_apart((params, state), (expected, expected_state))


@pytest.mark.parametrize(
    ("axis_type", "convention"), [(AUTO, "paper"), (EXPLICIT, "torch")]
)
def test_the_same_as_on_one_device(axis_type, convention):
    """Within a few units in the last place: XLA rounds shards of each shape otherwise.

    Of bfloat16 averages, test_rounding.py asks the same.
    """
    tx = adamodw(optax.linear_schedule(0.1, 0.0, 8), b3=0.9, convention=convention)
    expected = train(tx, lambda tree: jax.device_put(tree, jax.devices()[0]))
    mesh = make_mesh(AXIS_NAMES, axis_type)
    with jax.set_mesh(mesh):
        actual = train(tx, lambda tree: shard(tree, mesh))
    assert_few_units_apart(actual, expected)
    assert np.any(expected[1]["w"] != 0)


@pytest.mark.parametrize(
    ("axis_type", "in_context", "tx"),
    [
        (AUTO, True, adamodw(0.1)),
        (AUTO, True, adamodw(0.1, **BFLOAT16)),
        (AUTO, False, adamod(0.1, **FLOAT8)),
        (AUTO, True, round_updates_stochastically()),
        (EXPLICIT, False, adamodw(0.1, **BFLOAT16)),
        (EXPLICIT, True, adamod(0.1, **FLOAT8)),
        (EXPLICIT, True, round_updates_stochastically()),
    ],
    ids=lambda x: None if isinstance(x, tuple) else str(x),
)
@pytest.mark.usefixtures("quick_compilation")
def test_devices_compute_their_shards_alone(axis_type, in_context, tx):
    """Without collectives; of the random bits too, which come from the shape alone."""
    mesh = make_mesh(AXIS_NAMES, axis_type)
    large = NamedSharding(mesh, P("data", "fsdp"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        params = optax.tree.cast(shard(arrays(), mesh), "bfloat16")
        params["large"] = jax.device_put(jnp.ones((32, 1024), "bfloat16"), large)
        # Each of 8 devices has 12, which are no whole tiles of 8.
        params["rows"] = jax.device_put(jnp.ones((96, 128), "bfloat16"), rows)
        gradients = optax.tree.cast(params, "float32")
        lowered = jax.jit(tx.update).lower(gradients, tx.init(params), params)
        text = lowered.compile().as_text()
        # What is looked for is there to be found where parts are added up.
        norm = jax.jit(optax.tree.norm).lower(params["large"]).compile().as_text()
    assert bool(COLLECTIVE.search(norm)) == (COUNT > 1)
    assert not COLLECTIVE.findall(text)
    assert "[{},{}]".format(*large.shard_shape((32, 1024))) in text
    for whole in ("[32,1024]", "[96,128]"):
        assert (whole in text) == (COUNT == 1)


@pytest.mark.parametrize("devices", sorted({1, COUNT}))
@pytest.mark.usefixtures("quick_compilation")
def test_explicit_shards_outside_the_context_of_their_mesh(devices):
    """A mesh of one device is part of the type too."""
    mesh = make_mesh(AXIS_NAMES, EXPLICIT, devices)
    sharding = NamedSharding(mesh, P("data", "fsdp"))
    params = jax.device_put(jnp.ones((32, 1024), "bfloat16"), sharding)
    tx = optax.chain(scale_by_adamod(**FLOAT8), round_updates_stochastically())
    updates, state = tx.update(params, tx.init(params), params)
    for leaf in (updates, state[0].nu.codes):
        assert leaf.sharding.is_equivalent_to(sharding, 2)


def test_ensemble_sharded_over_devices():
    """Eight members, shared out to the devices: each as if it were alone."""
    tx = adamod(0.1, b3=0.9)
    over = NamedSharding(make_mesh(AXIS_NAMES), P(("data", "fsdp")))
    members = [arrays(seed) for seed in range(8)]
    params = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *members), over)
    state = jax.jit(jax.vmap(tx.init), out_shardings=over)(params)
    update = jax.jit(jax.vmap(tx.update)).lower(params, state).compile()
    assert not COLLECTIVE.findall(update.as_text())
    updates, state = update(params, state)
    for leaf in jax.tree.leaves((updates, state)):
        assert leaf.sharding.is_equivalent_to(over, leaf.ndim)
    one_update = jax.jit(tx.update)
    for i, member in enumerate(members):
        expected = one_update(member, tx.init(member))
        actual = jax.tree.map(lambda x, i=i: np.asarray(x)[i], (updates, state))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_data_parallel_replicas_stay_alike(how):
    """Every replica averages the gradients of all, and takes the same step."""
    mesh = make_mesh(("batch",))
    tx = adamod(0.1, b3=0.9)
    gradients = np.random.default_rng(0).normal(size=(3, COUNT, 16)).astype(np.float32)
    params = np.linspace(-1, 1, 16, dtype=np.float32)

    def step(params, state, g):
        g = jax.lax.pmean(g, "batch")
        updates, state = tx.update(g.reshape(16), state, params)
        return optax.apply_updates(params, updates), state

    if how == "pmap":
        step = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
    else:
        step = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=P()
            )
        )
    actual, state = jnp.asarray(params), tx.init(params)
    expected, one_state = params, tx.init(params)
    one_update = jax.jit(tx.update)
    for g in gradients:
        actual, state = step(actual, state, g)
        updates, one_state = one_update(g.mean(axis=0), one_state, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close((actual, state), (expected, one_state), rtol=1e-5)
    for leaf in jax.tree.leaves((actual, state)):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == COUNT
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])


@AXES
def test_init_of_sharded_shapes_is_that_of_arrays(axis_type):
    """In 8 bits too, whose exponents have a shape of their own."""
    tx = scale_by_adamod(**FLOAT8)
    mesh = make_mesh(("x",), axis_type)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("x"))
        params = jax.device_put(jnp.ones((2 * COUNT, 256)), sharding)
        shape = jax.ShapeDtypeStruct(params.shape, params.dtype, sharding=sharding)
        state, expected = tx.init(shape), tx.init(params)
        for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            assert jax.typeof(a) == jax.typeof(b)
