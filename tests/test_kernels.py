"""Do the kernels of GPUs and TPUs compute what XLA does, however a leaf is split?

On a CPU they run interpreted; on a GPU or TPU its own runs compiled.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COUNT, make_mesh
from optax_adamod import _kernels, adamod, scale_by_adamod

FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}
FORMS = pytest.mark.parametrize("form", ["gpu", "tpu"])


def noise(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def steps(form, tx, gradients, *, params=None, jit=jax.jit):
    """Returns the updates and the state after some gradients."""
    params = gradients[0] if params is None else params
    state, updates = tx.init(params), None
    with _kernels.forced(form):
        update = jit(lambda g, state: tx.update(g, state, params))
        for g in gradients:
            updates, state = update(g, state)
    return updates, state


def assert_same_codes(actual, expected):
    """Fused multiply-adds may turn one code of 10,000, by one."""
    far = total = 0
    for a, b in zip(
        *map(jax.tree.leaves, jax.device_get((actual, expected))), strict=True
    ):
        assert a.shape == b.shape
        if a.dtype in (np.int8, np.uint8):
            apart = np.abs(a.astype(int) - b.astype(int))
            assert apart.max() <= 1
            far, total = far + np.sum(apart), total + apart.size
    assert total > 0
    assert far <= 1e-4 * total + 1


@FORMS
@pytest.mark.parametrize(
    ("shape", "dtype", "settings"),
    [
        ((1, 128), "bfloat16", {}),
        ((5, 384), "float32", {"convention": "torch"}),
        ((3, 2, 256), "bfloat16", {"nesterov": True}),
        ((2, 1, 3, 128), "float32", {"b3": 0.0}),
        ((257, 128), "float32", {"b1": 0.0, "eps_root": 1e-8}),
        (
            (2, 40 * 128),
            "float32",
            {"learning_rate": optax.linear_schedule(0.1, 0.0, 3)},
        ),
    ],
    ids=["one group", "torch", "nesterov", "adam", "b1 = 0", "schedule"],
)
def test_codes_are_those_of_xla(form, shape, dtype, settings):
    settings = {"learning_rate": 0.1, "b3": 0.9, **FLOAT8, **settings}
    if settings["b3"] == 0.0:
        del settings["bound_dtype"]
    tx = adamod(**settings)
    gradients = [noise(shape, i).astype(dtype) for i in range(3)]
    actual, expected = (steps(x, tx, gradients) for x in (form, "xla"))
    assert_same_codes(actual[1], expected[1])
    assert actual[0].dtype == dtype
    difference = np.abs(actual[0].astype("float32") - expected[0].astype("float32"))
    assert np.mean(difference > 1e-4) <= 2e-4


@FORMS
def test_extreme_gradients(form):
    g = noise((2, 128))
    special = [0.0, -0.0, 1e-42, 1e-30, 3e38, -3e38, 1e19, -1e-19]
    spoiled = [jnp.nan, jnp.inf, -jnp.inf]
    for bad in (special, special + spoiled):
        gradients = [g.at[0, : len(bad)].set(jnp.asarray(bad)), g, jnp.zeros_like(g)]
        actual, expected = (
            steps(x, adamod(0.1, b3=0.9, **FLOAT8), gradients) for x in (form, "xla")
        )
        assert_same_codes(actual[1], expected[1])
        np.testing.assert_array_equal(np.isnan(actual[0]), np.isnan(expected[0]))
        assert np.isnan(actual[0][0]).all() == (bad != special)


SPECS = [P("x"), P("x", "y"), P(None, ("x", "y")), P(), P(("x", "y"))]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@functools.cache
def on_one_device():
    """What the form of XLA makes of two gradients."""
    gradients = [noise((16, 1024), i) for i in range(2)]
    return gradients, steps("xla", adamod(0.1, b3=0.9, **FLOAT8), gradients)[1]


@pytest.mark.parametrize(
    ("form", "types", "spec"),
    [
        *[("gpu", (AUTO, AUTO), spec) for spec in SPECS],
        *[("gpu", (EXPLICIT, EXPLICIT), spec) for spec in SPECS[1:3]],
        # libtpu has no custom_partitioning: with automatic axes XLA's form runs there.
        *[("tpu", (EXPLICIT, EXPLICIT), spec) for spec in SPECS],
        ("gpu", (EXPLICIT, AUTO), P("x")),
        *[("xla", (AUTO, AUTO), spec) for spec in SPECS[1:3]],
        ("xla", (EXPLICIT, EXPLICIT), SPECS[1]),
    ],
    ids=str,
)
def test_sharded_codes_are_those_of_one_device(form, types, spec):
    tx = adamod(0.1, b3=0.9, **FLOAT8)
    gradients, expected = on_one_device()
    mesh = make_mesh(("x", "y"), types)
    with jax.set_mesh(mesh), _kernels.forced(form):
        sharding = NamedSharding(mesh, spec)
        gradients = [jax.device_put(g, sharding) for g in gradients]
        state = tx.init(gradients[0])
        update = jax.jit(tx.update).lower(gradients[0], state).compile()
        for g in gradients:
            _, state = update(g, state)
    assert_same_codes(state, expected)
    for leaf in jax.tree.leaves(state[0][1:]):
        assert leaf.sharding.is_equivalent_to(sharding, 2)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in update.as_text()


def test_shards_that_cut_groups_are_put_together():
    """Under automatic axes, which init does not know."""
    if COUNT == 1:
        pytest.skip("one device cuts no group")
    tx = scale_by_adamod(b3=0.9, **FLOAT8)
    g = noise((4, 384))  # of 3 groups, whose number has no factor of the mesh
    _, expected = steps("xla", tx, [g])
    mesh = make_mesh(("x",), AxisType.Auto)
    with jax.set_mesh(mesh), _kernels.forced("gpu"):
        state = tx.init(g)
        g = jax.device_put(g, NamedSharding(mesh, P(None, "x")))
        _, actual = jax.jit(tx.update)(g, state)
    assert_same_codes(actual, expected)


@pytest.mark.parametrize(
    ("how", "check_vma"),
    [
        ("shard_map", True),
        ("shard_map", False),
        ("vmap of shard_map", True),
        ("pmap", False),
    ],
)
def test_inside_shard_map_and_pmap(how, check_vma):
    """Each shard is a leaf, whose rows are numbered from 0."""
    mesh = make_mesh(("x",))
    tx = scale_by_adamod(b3=0.9, **FLOAT8)

    def one_step(g):
        return tx.update(g, tx.init(g))[1].bound.codes

    def run(form):
        with _kernels.forced(form):
            if how == "pmap":  # of a function of its own, so that nothing is remembered
                return jax.pmap(lambda g: one_step(g))(noise((COUNT, 2, 256)))
            f = jax.shard_map(
                one_step, mesh=mesh, in_specs=P("x"), out_specs=P("x"),
                check_vma=check_vma,
            )  # fmt: skip
            if how == "shard_map":
                return jax.jit(f)(noise((16, 256)))
            return jax.jit(jax.vmap(f))(noise((2, 16, 256)))

    expected = run("xla")
    if check_vma and how == "shard_map":
        pytest.skip("interpreted kernels do not follow varying axes; compiled ones do")
    for form in ("gpu", "tpu"):
        assert_same_codes(run(form), expected)


@FORMS
@pytest.mark.parametrize(
    ("how", "wrap"),
    [
        ("scan", lambda tx: optax.MultiSteps(tx, 2)),
        ("checkpoint", lambda tx: optax.apply_if_finite(tx, 3)),
        ("donated", optax.with_extra_args_support),
    ],
    ids=["scan", "checkpoint", "donated"],
)
def test_transformations(form, how, wrap):
    tx = wrap(adamod(0.1, b3=0.5, **FLOAT8))
    g = noise((4, 256))

    def run(form):
        state = tx.init(g)
        with _kernels.forced(form):
            if how == "scan":
                body = lambda s, _: (tx.update(g, s, g)[1], None)  # noqa: E731
                return jax.jit(lambda s: jax.lax.scan(body, s, None, 3)[0])(state)
            update = tx.update if how == "donated" else jax.checkpoint(tx.update)
            donated = (1,) if how == "donated" else ()
            update = jax.jit(update, donate_argnums=donated)
            for _ in range(3):
                _, state = update(g, state, g)
            return state

    assert_same_codes(run(form), run("xla"))


@FORMS
def test_vmap_and_derivatives_are_those_of_xla(form):
    tx = adamod(0.1, b3=0.5, **FLOAT8)
    g = noise((3, 2, 128))

    def member(g):
        return tx.update(g, tx.init(g))

    def derivative(scale):
        return jnp.sum(tx.update(scale * g[0], tx.init(g[0]))[0] ** 2)

    def run(form):
        with _kernels.forced(form):
            members = jax.jit(jax.vmap(member))(g)
            # A function of its own each time, so that nothing is remembered.
            gradients = [
                transform(functools.partial(derivative))(1.5)
                for transform in (jax.grad, jax.jacfwd)
            ]
        return members, gradients

    (actual, slopes), (expected, expected_slopes) = run(form), run("xla")
    assert_same_codes(actual, expected)
    chex.assert_trees_all_close(slopes, expected_slopes, rtol=1e-2)
    assert slopes[0] != 0


@pytest.mark.parametrize("capability", ["7.5", "8.0", "9.0"])
def test_older_gpus_run_the_form_of_xla(monkeypatch, capability):
    class Gpu:
        platform = "gpu"
        compute_capability = capability

    tx, g = scale_by_adamod(**FLOAT8), noise((2, 128))
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    jax.clear_caches()  # of leaves that were traced for another GPU
    with _kernels.forced("gpu"):
        text = str(jax.make_jaxpr(lambda g: tx.update(g, tx.init(g)))(g))
    assert ("pallas_call" in text) == (capability != "7.5")


def test_mixed_storage_runs_the_form_of_xla():
    tx = scale_by_adamod(mu_dtype="float8", bound_dtype="float8")
    g = noise((2, 128))
    for form in ("gpu", "tpu"):
        with _kernels.forced(form):
            text = jax.make_jaxpr(lambda g: tx.update(g, tx.init(g)))(g)
        assert "pallas_call" not in str(text)
    narrow = scale_by_adamod(**FLOAT8)
    for form in ("gpu", "tpu"):
        with _kernels.forced(form):
            text = jax.make_jaxpr(lambda g: narrow.update(g, narrow.init(g)))(g)
        assert "pallas_call" in str(text)
