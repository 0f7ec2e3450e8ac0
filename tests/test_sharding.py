"""Is the state placed as its parameters, always, and are the updates the same?"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import (
    BFLOAT16,
    COLLECTIVE,
    COUNT,
    FLOAT8,
    assert_equal_but_for_few_roundings,
    assert_few_units_apart,
    make_mesh,
    trained,
)
from optax_adamod import (
    adamod,
    adamodw,
    round_updates_stochastically,
    scale_by_adamod,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
SPECS = {"w": P("data", "fsdp"), "v": P(None, "fsdp"), "b": P("fsdp"), "scale": P()}
SHAPES = {"w": (8, 16), "v": (3, 8), "b": (12,), "scale": ()}
DTYPES = {"w": "float16", "v": "bfloat16", "b": "float32", "scale": "float32"}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
AXIS_NAMES = ("fsdp", "data")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def shard(tree, mesh):
    return {
        k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()
    }


def averages(state):
    return [optax.tree.get(state, name) for name in ("mu", "nu", "bound")]


@pytest.mark.parametrize(
    ("axis_type", "dtypes", "jitted"),
    [
        (AUTO, {}, True),
        (AUTO, BFLOAT16, False),
        (EXPLICIT, {}, False),
        (EXPLICIT, BFLOAT16, True),
    ],
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


@pytest.mark.parametrize(
    ("axis_type", "settings"),
    [
        (AUTO, {}),
        (EXPLICIT, {"convention": "torch", **BFLOAT16}),
    ],
)
def test_the_same_as_on_one_device(axis_type, settings):
    """Within a few units in the last place: XLA rounds shards of each shape otherwise.

    And averages in bfloat16 by the same random bits.
    """
    tx = adamodw(optax.linear_schedule(0.1, 0.0, 8), b3=0.9, **settings)
    expected = trained(tx, jax.tree.map(jnp.asarray, arrays()))
    mesh = make_mesh(AXIS_NAMES, axis_type)
    with jax.set_mesh(mesh):
        actual = trained(tx, shard(arrays(), mesh))
    assert np.any(expected[0]["w"] != 0)
    if "mu_dtype" in settings:
        assert_equal_but_for_few_roundings(actual, expected)
    else:
        assert_few_units_apart(actual, expected)


@pytest.mark.parametrize(
    ("axis_type", "in_context", "tx"),
    [
        (AUTO, True, adamodw(0.1, **BFLOAT16)),
        (AUTO, False, adamod(0.1, **FLOAT8)),
        (AUTO, True, round_updates_stochastically()),
        (EXPLICIT, False, adamodw(0.1, **BFLOAT16)),
        (EXPLICIT, True, adamod(0.1, **FLOAT8)),
    ],
)
def test_devices_compute_their_shards_alone(axis_type, in_context, tx):
    """Without collectives; of the random bits too, which come from the shape alone."""
    mesh = make_mesh(AXIS_NAMES, axis_type)
    large = NamedSharding(mesh, P("data", "fsdp"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        small = {k: x for k, x in arrays().items() if k in ("b", "scale")}
        params = optax.tree.cast(shard(small, mesh), "bfloat16")
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
def test_explicit_shards_outside_the_context_of_their_mesh(devices):
    """A mesh of one device is part of the type too."""
    mesh = make_mesh(AXIS_NAMES, EXPLICIT, devices)
    sharding = NamedSharding(mesh, P("data", "fsdp"))
    params = jax.device_put(jnp.ones((32, 1024), "bfloat16"), sharding)
    tx = optax.chain(scale_by_adamod(**FLOAT8), round_updates_stochastically())
    updates, state = tx.update(params, tx.init(params), params)
    for leaf in (updates, state[0].nu.codes):
        assert leaf.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    ("axis_type", "spec"), [(AUTO, P("x")), (EXPLICIT, P("x")), (AUTO, P(None, "x"))]
)
def test_init_of_sharded_shapes_is_that_of_arrays(axis_type, spec):
    """In 8 bits too, whose exponents have a shape of their own."""
    tx = scale_by_adamod(**FLOAT8)
    mesh = make_mesh(("x",), axis_type)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        params = jax.device_put(jnp.ones((2 * COUNT, 256)), sharding)
        shape = jax.ShapeDtypeStruct(params.shape, params.dtype, sharding=sharding)
        state, expected = tx.init(shape), tx.init(params)
        assert state.nu.codes.sharding.is_equivalent_to(sharding, 2)
        # Two groups that a mesh does not divide are replicated.
        few = spec != P("x") and COUNT > 2
        exponents = NamedSharding(mesh, P()) if few else sharding
        assert state.nu.exponents.sharding.is_equivalent_to(exponents, 2)
        for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            assert jax.typeof(a) == jax.typeof(b)
