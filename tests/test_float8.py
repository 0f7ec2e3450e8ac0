"""Are averages in 8 bits small, and at home where arrays are?"""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COUNT, FLOAT8, make_mesh, noise
from optax_adamod import (
    Float8Array,
    adamod,
    adamodw,
    from_adam,
    held_by_bound,
    learning_rates,
    scale_by_adamod,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
AVERAGES = ("mu", "nu", "bound")
PARAMS = {"w": jnp.ones((4, 128)), "b": jnp.ones(100)}


def is_float8(x):
    return isinstance(x, Float8Array)


def trained(tx, params, steps=4):
    state, update = tx.init(params), jax.jit(tx.update)
    updates = params
    for step in range(steps):
        gradients = jax.tree.map(
            lambda p, step=step: jax.device_put(noise(p.shape, step), p.sharding),
            params,
        )
        updates, state = update(gradients, state, params)
    return updates, state


@functools.cache
def exact():
    """The last update and state of AdaMod in float32."""
    return trained(adamod(0.1), PARAMS)


def test_short_vectors_stay_in_float32():
    """As of norms and biases; a long one is a model that was flattened."""
    shapes = {"norm": 4096, "flat": 2**16, "odd": (4, 100)}
    state = scale_by_adamod(**FLOAT8).init({k: jnp.ones(s) for k, s in shapes.items()})
    assert {k for k, x in state.nu.items() if is_float8(x)} == {"flat"}
    assert state.nu["norm"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("factory", "settings", "size"),
    [
        (adamod, FLOAT8, 3.05),
        (adamodw, {"convention": "torch", **FLOAT8}, 3.05),
        (adamod, {"mu_dtype": "float8", "nu_dtype": "float8", "b3": 0}, 2.05),
    ],
    ids=["paper", "torch", "adam"],
)
def test_a_byte_for_each_average(factory, settings, size):
    tx = factory(0.1, **settings)
    updates, state = trained(tx, PARAMS)
    averages = [optax.tree.get(state, name) for name in AVERAGES]
    stored = jax.tree.leaves([a["w"] for a in averages if a is not None])
    assert sum(x.nbytes for x in stored) / PARAMS["w"].size <= size
    assert all(a["b"].dtype == jnp.float32 for a in averages if a is not None)
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
    if "b3" in settings:  # it is Adam
        assert averages[2] is None
        expected, _ = trained(optax.adam(0.1), PARAMS)
        error = np.mean(np.abs(updates["w"] - expected["w"]))
        assert error / np.mean(np.abs(expected["w"])) < 0.15
        rates = learning_rates(state, 0.1)
        chex.assert_trees_all_equal(rates.adaptive, rates.bounded)


@pytest.mark.parametrize("name", AVERAGES)
def test_each_average_alone(name):
    _, state = trained(adamod(0.1, **{f"{name}_dtype": "float8"}), PARAMS)
    for other in AVERAGES:
        average, expected = (optax.tree.get(s, other)["w"] for s in (state, exact()[1]))
        assert is_float8(average) == (other == name)
        if other == name:
            assert "float8[4,128]" in repr(average)
            average = average.dequantize()
        np.testing.assert_allclose(average, expected, rtol=0.5, atol=2e-2)


def test_exponents_that_a_mesh_does_not_divide_are_replicated():
    sharding = NamedSharding(make_mesh(("x",)), P(None, "x"))
    params = jax.device_put(PARAMS["w"], sharding)
    tx = adamod(0.1, **FLOAT8)
    state = tx.init(params)[0]
    assert state.nu.codes.sharding.is_equivalent_to(sharding, 2)
    assert state.nu.exponents.sharding.is_fully_replicated
    updates, _ = trained(tx, params, steps=2)
    expected, _ = trained(tx, PARAMS["w"], steps=2)
    np.testing.assert_allclose(updates, expected, rtol=1e-4)


def test_adam_state_and_diagnostics():
    params = {"w": noise((4, 128)), "b": jnp.ones(3)}
    _, adam_state = trained(optax.adam(0.1), params)
    tx = adamod(0.1, b3=0.9, **FLOAT8)
    state = from_adam(adam_state, tx.init(params))
    np.testing.assert_allclose(
        optax.tree.get(state, "nu")["w"].dequantize(), adam_state[0].nu["w"], rtol=0.07
    )
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(params, state, params)
    rates = learning_rates(state, 0.1)
    # Rates are those that the update used: rate times the corrected momentum.
    count = optax.tree.get(state, "count")
    momentum = optax.tree.get(state, "mu")["w"].dequantize() / (1 - 0.9**count)
    np.testing.assert_allclose(updates["w"], -rates.bounded["w"] * momentum, rtol=1e-4)
    assert held_by_bound(rates).share["w"] > 0.9


def test_map_params():
    tx = adamod(0.1, **FLOAT8)
    marked = optax.tree.map_params(
        tx,
        lambda x: f"{x.shape}",
        tx.init(PARAMS),
        is_leaf=is_float8,
        transform_non_params=str,
    )
    assert marked[0].nu == {"w": "(4, 128)", "b": "(100,)"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.codes, "codes of a Float8Array"),
        (lambda x: Float8Array(x.codes, x.exponents[:1]), "exponents of shape"),
        (lambda x: {"codes": x.codes}, "differ in structure"),
    ],
    ids=["codes alone", "another shape", "a dictionary of codes"],
)
def test_codes_without_exponents_are_refused(spoil, message):
    tx, params = scale_by_adamod(**FLOAT8), PARAMS["w"]
    state = tx.init(params)
    with pytest.raises((TypeError, ValueError), match=message):
        tx.update(params, state._replace(nu=spoil(state.nu)))


def test_bad_input():
    with pytest.raises(ValueError, match="no sign"):
        adamod(-0.1, bound_dtype="float8")
    with pytest.raises(TypeError, match="is complex"):
        adamod(0.1, mu_dtype="float8").init(jnp.ones((1, 128), jnp.complex64))
    params = jnp.ones((1, 128))
    with pytest.raises(ValueError, match="b3 is not 0"):
        scale_by_adamod().update(params, scale_by_adamod(b3=0).init(params))
    with pytest.raises(ValueError, match="state has a bound"):
        scale_by_adamod(b3=0).update(params, scale_by_adamod().init(params))


def test_bytes_and_exported_programs():
    """What tools do that take a state for a tree of arrays."""
    tx, params = adamod(0.1, **FLOAT8), {"w": noise((4, 128))}
    _, state = trained(tx, params, steps=1)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    (n,) = jax.export.symbolic_shape("n")
    rows = {"w": jax.ShapeDtypeStruct((n, 128), jnp.float32)}
    program = jax.export.export(jax.jit(tx.update))(
        rows, jax.eval_shape(tx.init, rows), rows
    )
    actual = program.call(params, state, params)
    expected = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-5)


def test_flax_nnx_and_train_state():
    model = nnx.Linear(8, 128, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = adamod(0.1, b3=0.5, **FLOAT8)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
    step = nnx.jit(lambda model, optimizer, g: optimizer.update(model, g))
    for update in (step, step, lambda m, o, g: o.update(m, g)):  # outside jit too
        gradients = jax.tree.map(lambda p: 2 * p + 1, nnx.state(model, nnx.Param))
        update(model, optimizer, gradients)
        gradients = jax.tree.map(lambda p: 2 * p + 1, state.params)
        state = state.apply_gradients(grads=gradients)
    np.testing.assert_allclose(
        nnx.state(model)["kernel"][...], state.params["kernel"], rtol=1e-2, atol=1e-2
    )
    expected = learning_rates(state.opt_state, 0.1).bounded["kernel"]
    for opt_state in (optimizer.opt_state, nnx.state(optimizer)):
        mine = learning_rates(opt_state, 0.1).bounded["kernel"]
        np.testing.assert_allclose(mine[...], expected, rtol=0.3)


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        (
            (8, 64 * COUNT),
            P(None, "x"),
            rf"\['w'\] has shape \(8, {64 * COUNT}\) in shards of 64 columns",
        ),
        ((2**17 + 2**10,), P("x"), None),
        ((3, 16, 256), P(None, "x"), None),
    ],
    ids=str,
)
def test_explicit_shards_may_not_cut_groups(shape, spec, message):
    if message and COUNT == 1:
        pytest.skip("one device cuts no groups")
    mesh = make_mesh(("x",), AxisType.Explicit)
    tx = adamod(0.1, **FLOAT8)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))}
        if message is None:
            updates, _ = trained(tx, params, steps=1)
            assert updates["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
            return
        for init in (tx.init, jax.jit(tx.init)):
            with pytest.raises(ValueError, match=message):
                init(params)


def test_orbax(tmp_path):
    """The codes are those that were saved, and the next step's are near at hand."""
    tx, fewer = adamod(0.1, **FLOAT8), min(4, COUNT)

    def put(tree, devices):
        mesh = make_mesh(("x",), devices=devices)
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim else P())),
            tree,
        )

    params = put({"w": jnp.ones((16, 256))}, COUNT)
    _, state = trained(tx, params)
    fresh = tx.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", put(fresh, fewer))
        plain = checkpointer.restore(tmp_path / "state")
        without = {"w": state[0].nu["w"]._replace(exponents=None)}
        template = (state[0]._replace(nu=without), *state[1:])
        # Orbax passes over what is missing, in a template and on disk; update does not.
        lacking = [checkpointer.restore(tmp_path / "state", template)]
        checkpointer.save(tmp_path / "lacking", template)
        checkpointer.wait_until_finished()
        lacking.append(checkpointer.restore(tmp_path / "lacking", fresh))
    for incomplete in lacking:
        with pytest.raises(TypeError, match="exponents of the state's nu"):
            tx.update(params, incomplete)
    assert len(restored[0].nu["w"].codes.sharding.device_set) == fewer
    chex.assert_trees_all_equal(*jax.device_get((restored, state)))
    # Without a template Orbax returns mappings, which stand for the same.
    mapped = (state[0]._replace(**{k: plain[0][k] for k in AVERAGES}), *state[1:])
    update = jax.jit(tx.update)
    expected = update(params, state, params)
    chex.assert_trees_all_equal(update(params, mapped, params), expected)
    _, after = update(put(params, fewer), restored, put(params, fewer))
    for a, b in zip(*map(jax.tree.leaves, (after, expected[1])), strict=True):
        apart = np.abs(np.asarray(a, int) - np.asarray(b, int))
        assert apart.max() <= 1
        assert apart.sum() <= 1e-4 * apart.size + 1
