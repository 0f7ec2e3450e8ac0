"""Are averages in 8 bits small, and at home where arrays are?"""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COUNT, FLOAT8, assert_same_codes, make_mesh, noise, trained
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


def test_short_vectors_stay_in_float32():
    """As of norms and biases; a long one is a model that was flattened."""
    shapes = {"norm": 4096, "flat": 2**16, "odd": (4, 100)}
    state = scale_by_adamod(**FLOAT8).init({k: jnp.ones(s) for k, s in shapes.items()})
    assert {k for k, x in state.nu.items() if is_float8(x)} == {"flat"}


@pytest.mark.parametrize(
    ("asked", "factory", "settings"),
    [
        (AVERAGES, adamodw, {"convention": "torch"}),
        (("mu", "nu"), adamod, {"b3": 0}),
        (("mu",), adamod, {}),
        (("nu", "bound"), adamod, {}),
    ],
)
def test_a_byte_for_each_average(asked, factory, settings):
    tx = factory(0.1, **settings, **{f"{name}_dtype": "float8" for name in asked})
    updates, state = trained(tx, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
    expected_updates, expected = trained(factory(0.1, **settings), PARAMS)
    for name in AVERAGES if settings != {"b3": 0} else asked:
        average, wide = (optax.tree.get(x, name) for x in (state, expected))
        assert average["b"].dtype == jnp.float32
        assert is_float8(average["w"]) == (name in asked)
        number = average["w"]
        if name in asked:
            assert "float8[4,128]" in repr(number)
            assert number.nbytes / PARAMS["w"].size < 1.01
            number = number.dequantize()
        atol = 2e-2 if name == "mu" else 0.0
        np.testing.assert_allclose(number, wide["w"], rtol=0.5, atol=atol)
    error = np.mean(np.abs(updates["w"] - expected_updates["w"]))
    assert error / np.mean(np.abs(expected_updates["w"])) < 0.15
    if settings == {"b3": 0}:
        assert state[0].bound is None
        rates = learning_rates(state, 0.1)
        chex.assert_trees_all_equal(rates.adaptive, rates.bounded)


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


def test_bad_input():
    tx, params = scale_by_adamod(**FLOAT8), PARAMS["w"]
    state = tx.init(params)
    codes, exponents = state.nu
    for nu, message in (
        (codes, "codes of a Float8Array"),
        (Float8Array(codes, exponents[:1]), "exponents of shape"),
        ({"codes": codes}, "differ in structure"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tx.update(params, state._replace(nu=nu))


def test_negative_learning_rates_of_a_schedule_are_nan():
    """For a bound without a sign: known ones are refused."""
    tx = adamod(lambda count: 0.1 - 0.1 * count, bound_dtype="float8")
    _, state = trained(tx, PARAMS, steps=2)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert jnp.all(jnp.isnan(updates["w"]))


def test_bytes_and_exported_programs():
    """What tools do that take a state for a tree of arrays."""
    tx, params = adamod(0.1, **FLOAT8), {"w": noise((4, 128))}
    _, state = trained(tx, params, steps=1)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    shapes = optax.tree.map_params(
        tx, lambda x: x.shape, state, is_leaf=is_float8, transform_non_params=str
    )
    assert shapes[0].nu == {"w": (4, 128)}
    (n,) = jax.export.symbolic_shape("n")
    rows = {"w": jax.ShapeDtypeStruct((n, 128), jnp.float32)}
    program = jax.export.export(jax.jit(tx.update))(
        rows, jax.eval_shape(tx.init, rows), rows
    )
    actual = program.call(params, state, params)
    expected = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spec", "fits"),
    [
        ((8, 64 * COUNT), P(None, "x"), COUNT == 1),
        ((2**17 + 2**10,), P("x"), True),
        ((3, 16, 256), P(None, "x"), True),
    ],
)
def test_explicit_shards_may_not_cut_groups(shape, spec, fits):
    mesh = make_mesh(("x",), AxisType.Explicit)
    tx = adamod(0.1, **FLOAT8)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))}
        if fits:
            updates, _ = trained(tx, params, steps=1)
            assert updates["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
            return
        for init in (tx.init, jax.jit(tx.init)):
            message = rf"\['w'\] has shape \(8, {shape[1]}\) in shards of 64 columns"
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
    assert_same_codes(after, expected[1])
