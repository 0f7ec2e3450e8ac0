"""Do the kernels of GPUs and TPUs compute what XLA does, however a leaf is split?

On a CPU they run interpreted; on a GPU or TPU its own runs compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COLLECTIVE, COUNT, FLOAT8, assert_same_codes, make_mesh, noise
from optax_adamod import _kernels, adamod, scale_by_adamod

pytestmark = pytest.mark.usefixtures("quick_compilation")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BOTH = P(None, ("x", "y"))


def steps(form, tx, gradients):
    """Returns the updates and the state after each of some gradients."""
    with _kernels.forced(form):
        # Of a function of its own, so that nothing is remembered of another form.
        update = jax.jit(lambda g, state: tx.update(g, state, g))
        state = tx.init(gradients[0])
        for g in gradients:
            updates, state = update(g, state)
            yield updates, state


SCHEDULE = optax.linear_schedule(0.1, 0.0, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "settings"),
    [
        ((1, 128), "bfloat16", {"nesterov": True}),
        # The last blocks reach beyond; exponents lie transposed on a TPU.
        ((130, 384), "float32", {"convention": "torch"}),
        ((2, 1, 3, 128), "float32", {"b3": 0.0, "learning_rate": SCHEDULE}),
        ((2, 40 * 128), "bfloat16", {"b1": 0.0, "eps_root": 1e-8}),
    ],
    ids=["one group", "blocks", "adam", "long rows"],
)
def test_codes_are_those_of_xla(shape, dtype, settings):
    settings = {"learning_rate": 0.1, "b3": 0.9, **FLOAT8, **settings}
    if settings["b3"] == 0.0:
        del settings["bound_dtype"]
    tx = adamod(**settings)
    gradients = [noise(shape, i).astype(dtype) for i in range(3)]
    *_, (expected, expected_state) = steps("xla", tx, gradients)
    for form in ("gpu", "tpu"):
        *_, (actual, state) = steps(form, tx, gradients)
        assert_same_codes(state, expected_state)
        assert actual.dtype == dtype
        far = np.abs(actual.astype("float32") - expected.astype("float32")) > 1e-4
        assert np.mean(far) <= 2e-4


def test_extreme_gradients():
    g, zero = noise((2, 128)), jnp.zeros((2, 128))
    special = [0.0, -0.0, 1e-42, 1e-30, 3e38, -3e38, 1e19, -1e-19]
    special = g.at[0, :8].set(jnp.asarray(special))
    spoiled = special.at[0, 8:11].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    gradients = [special, g, zero, spoiled, g, zero]
    tx = adamod(0.1, b3=0.9, **FLOAT8)
    expected = list(steps("xla", tx, gradients))
    for form in ("gpu", "tpu"):
        actual = list(steps(form, tx, gradients))
        for i in (2, 5):  # the last before the spoiled, and after
            assert_same_codes(actual[i][1], expected[i][1])
            is_nan = np.isnan(actual[i][0])
            np.testing.assert_array_equal(is_nan, np.isnan(expected[i][0]))
            assert is_nan[0].all() == (i == 5)


@pytest.fixture(scope="module")
def on_one_device():
    """Two gradients, and what the form of XLA makes of them."""
    gradients = [noise((16, 1024), i) for i in range(2)]
    *_, (_, state) = steps("xla", adamod(0.1, b3=0.9, **FLOAT8), gradients)
    return gradients, state


@pytest.mark.parametrize(
    ("form", "types", "spec"),
    [
        *[("gpu", (AUTO, AUTO), spec) for spec in (P("x"), P("x", "y"), BOTH)],
        # libtpu has no custom_partitioning: with automatic axes XLA's form runs there.
        *[("tpu", (EXPLICIT, EXPLICIT), spec) for spec in (P(), P("x", "y"), BOTH)],
        ("gpu", (EXPLICIT, EXPLICIT), P("x", "y")),
        ("gpu", (EXPLICIT, AUTO), P("x")),
        ("xla", (AUTO, AUTO), P("x", "y")),
        ("xla", (EXPLICIT, EXPLICIT), BOTH),
    ],
    ids=str,
)
def test_sharded_codes_are_those_of_one_device(on_one_device, form, types, spec):
    tx = adamod(0.1, b3=0.9, **FLOAT8)
    gradients, expected = on_one_device
    mesh = make_mesh(("x", "y"), types)
    with jax.set_mesh(mesh), _kernels.forced(form):
        sharding = NamedSharding(mesh, spec)
        gradients = [jax.device_put(g, sharding) for g in gradients]
        state = tx.init(gradients[0])
        text = str(jax.make_jaxpr(lambda g, s: tx.update(g, s))(gradients[0], state))
        alike = types[0] == types[1]  # meshes with axes of both kinds run XLA's form
        assert ("pallas_call" in text) == (form != "xla" and alike)
        update = jax.jit(tx.update).lower(gradients[0], state).compile()
        for g in gradients:
            _, state = update(g, state)
    assert_same_codes(state, expected)
    for leaf in jax.tree.leaves(state[0][1:]):
        assert leaf.sharding.is_equivalent_to(sharding, 2)
    assert not COLLECTIVE.findall(update.as_text())


def test_shards_that_cut_groups_are_put_together():
    """Under automatic axes, which init does not know."""
    if COUNT == 1:
        pytest.skip("one device cuts no group")
    tx = scale_by_adamod(b3=0.9, **FLOAT8)
    g = noise((4, 384))  # of 3 groups, whose number has no factor of the mesh
    ((_, expected),) = steps("xla", tx, [g])
    mesh = make_mesh(("x",), AxisType.Auto)
    with jax.set_mesh(mesh), _kernels.forced("gpu"):
        state = tx.init(g)
        g = jax.device_put(g, NamedSharding(mesh, P(None, "x")))
        _, actual = jax.jit(tx.update)(g, state)
    assert_same_codes(actual, expected)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_inside_shard_map_and_pmap(how):
    """Each shard is a leaf, whose rows are numbered from 0."""
    tx = scale_by_adamod(b3=0.9, **FLOAT8)

    def run(form):
        def one_step(g):
            return tx.update(g, tx.init(g))[1].bound.codes

        sharded = jax.shard_map(
            one_step, mesh=make_mesh(("x",)), in_specs=P("x"), out_specs=P("x"),
            # Interpreted kernels do not follow varying axes; compiled ones do.
            check_vma=False,
        )  # fmt: skip
        with _kernels.forced(form):
            if how == "pmap":
                return jax.pmap(one_step)(noise((COUNT, 2, 256)))
            return jax.jit(sharded)(noise((16, 256)))

    expected = run("xla")
    for form in ("gpu", "tpu") if how == "shard_map" else ("gpu",):
        assert_same_codes(run(form), expected)


def test_scan_cond_checkpoint_and_donation():
    tx = optax.MultiSteps(adamod(0.1, b3=0.5, **FLOAT8), 2)
    g = noise((4, 256))

    def run(form):
        update = jax.checkpoint(lambda state: tx.update(g, state, g)[1])

        def four_steps(state):
            return jax.lax.fori_loop(0, 4, lambda _, s: update(s), state)

        with _kernels.forced(form):
            return jax.jit(four_steps, donate_argnums=0)(tx.init(g))

    expected = run("xla")
    for form in ("gpu", "tpu"):
        assert_same_codes(run(form), expected)


@pytest.mark.parametrize("form", ["gpu", "tpu"])
def test_which_form_runs(monkeypatch, form):
    """XLA's on older GPUs, and of averages of which one is not in 8 bits."""
    g = noise((2, 128))

    def has_kernel(**dtypes):
        tx = scale_by_adamod(**dtypes)
        with _kernels.forced(form):
            text = jax.make_jaxpr(lambda g: tx.update(g, tx.init(g)))(g)
        return "pallas_call" in str(text)

    assert has_kernel(**FLOAT8)
    assert not has_kernel(mu_dtype="float8", bound_dtype="float8")

    class Gpu:
        platform = "gpu"

    for capability in ("7.5", "9.0", "gfx942"):
        Gpu.compute_capability = capability
        monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
        jax.clear_caches()  # of leaves that were traced for another GPU
        assert has_kernel(**FLOAT8) == (form == "tpu" or capability == "9.0")
