"""Are averages in 8 bits small, unbiased, and the same everywhere?"""

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

from helpers import COUNT, make_mesh
from optax_adamod import (
    Float8Array,
    adamod,
    adamodw,
    from_adam,
    from_torch,
    held_by_bound,
    learning_rates,
    scale_by_adamod,
)

FLOAT8 = {f"{name}_dtype": "float8" for name in ("mu", "nu", "bound")}


def is_float8(x):
    return isinstance(x, Float8Array)


def noise(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def dequantized(state):
    return jax.tree.map(
        lambda x: x.dequantize() if is_float8(x) else x, state, is_leaf=is_float8
    )


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


def test_short_vectors_stay_in_float32():
    """As of norms and biases; a long one is a model that was flattened."""
    shapes = {"norm": 4096, "flat": 2**16, "odd": (4, 100)}
    state = scale_by_adamod(**FLOAT8).init({k: jnp.ones(s) for k, s in shapes.items()})
    assert {k for k, x in state.nu.items() if is_float8(x)} == {"flat"}
    assert state.nu["norm"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("factory", "convention"), [(adamod, "paper"), (adamodw, "torch")]
)
def test_three_bytes_a_parameter(factory, convention):
    params = {"w": jnp.ones((8, 256)), "b": jnp.ones(100)}
    tx = factory(0.1, convention=convention, **FLOAT8)
    updates, state = trained(tx, params)
    averages = [optax.tree.get(state, name) for name in ("mu", "nu", "bound")]
    size = sum(x.nbytes for x in jax.tree.leaves([a["w"] for a in averages]))
    assert size / params["w"].size <= 3.05
    assert all(a["b"].dtype == jnp.float32 for a in averages)
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


@pytest.mark.parametrize("name", ["mu", "nu", "bound"])
def test_each_average_alone(name):
    params = jnp.ones((4, 128))
    _, state = trained(adamod(0.1, **{f"{name}_dtype": "float8"}), params)
    _, expected = trained(adamod(0.1), params)
    for other in ("mu", "nu", "bound"):
        average = optax.tree.get(state, other)
        assert is_float8(average) == (other == name)
        chex.assert_trees_all_close(
            dequantized(average), optax.tree.get(expected, other), rtol=0.5, atol=2e-2
        )
    assert "float8[4,128]" in repr(optax.tree.get(state, name))


def test_exponents_that_a_mesh_does_not_divide_are_replicated():
    mesh = make_mesh(("x",))
    sharding = NamedSharding(mesh, P(None, "x"))
    params = jax.device_put(jnp.ones((4, 128)), sharding)
    state = adamod(0.1, **FLOAT8).init(params)[0]
    assert state.nu.codes.sharding.is_equivalent_to(sharding, 2)
    assert state.nu.exponents.sharding.is_fully_replicated
    updates, state = trained(adamod(0.1, **FLOAT8), params)
    expected, _ = trained(adamod(0.1, **FLOAT8), jnp.ones((4, 128)))
    np.testing.assert_allclose(updates, expected, rtol=1e-4)


def test_restart():
    tx = scale_by_adamod(**FLOAT8)
    g = noise((8, 256))

    @jax.jit
    def two_steps(state):
        for _ in range(2):
            _, state = tx.update(g, state)
        return state

    state = two_steps(tx.init(g))
    saved = jax.tree.map(jnp.asarray, jax.device_get(state))
    chex.assert_trees_all_equal(two_steps(saved), two_steps(state))


def test_adam_state_and_diagnostics():
    params = {"w": noise((4, 128)), "b": jnp.ones(3)}
    adam = optax.adam(0.1)
    _, adam_state = trained(adam, params)
    tx = adamod(0.1, b3=0.9, **FLOAT8)
    state = from_adam(adam_state, tx.init(params))
    np.testing.assert_allclose(
        optax.tree.get(state, "nu")["w"].dequantize(), adam_state[0].nu["w"], rtol=0.07
    )
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
    rates = learning_rates(state, 0.1)
    assert rates.adaptive["w"].shape == (4, 128)
    # Rates are those that the update used: rate times the corrected momentum.
    count = optax.tree.get(state, "count")
    momentum = optax.tree.get(state, "mu")["w"].dequantize() / (1 - 0.9**count)
    np.testing.assert_allclose(updates["w"], -rates.bounded["w"] * momentum, rtol=1e-4)
    assert held_by_bound(rates).share["w"] > 0.9


def test_scan_cond_donation_and_injected_hyperparameters():
    params = noise((2, 128))
    tx = optax.inject_hyperparams(adamod)(0.1, b3=0.5, **FLOAT8)

    def body(carry, _):
        params, state = carry
        updates, new = tx.update(params, state, params)
        state = jax.lax.cond(state.count % 2 == 0, lambda: new, lambda: new)
        return (optax.apply_updates(params, updates), state), jnp.sum(params**2)

    _, losses = jax.lax.scan(body, (params, tx.init(params)), None, 20)
    assert losses[-1] < 0.1 * losses[0]
    plain = adamod(0.1, **FLOAT8)
    state = plain.init(params)
    step = jax.jit(plain.update, donate_argnums=(0, 1))
    leaves = jax.tree.leaves(state)
    step(noise((2, 128)), state)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_map_params():
    params = {"w": jnp.ones((4, 128)), "b": jnp.ones(3)}
    tx = adamod(0.1, **FLOAT8)
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda x: f"{x.shape}", state, is_leaf=is_float8, transform_non_params=str
    )
    assert marked[0].nu == {"w": "(4, 128)", "b": "(3,)"}


def test_derivatives_pass_through_the_rounding():
    first = jnp.linspace(0.5, 2, 128).reshape(1, 128)

    def derivative(**dtypes):
        tx = adamod(1.0, b3=0.5, **dtypes)
        _, state = tx.update(first, tx.init(first))
        return jax.jacfwd(lambda scale: tx.update(scale * first, state)[0])(-0.5)

    exact = derivative()
    for name, dtype in FLOAT8.items():
        chex.assert_trees_all_close(derivative(**{name: dtype}), exact, rtol=0.3)


def test_adam_without_a_bound_takes_two_bytes():
    params = {"w": jnp.ones((4, 128))}
    tx = adamod(0.1, b3=0, mu_dtype="float8", nu_dtype="float8")
    updates, state = trained(tx, params)
    assert state[0].bound is None
    assert sum(x.nbytes for x in jax.tree.leaves(state[0][1:])) / 512 <= 2.05
    expected, _ = trained(optax.adam(0.1), params)
    error = np.mean(np.abs(updates["w"] - expected["w"]))
    assert error / np.mean(np.abs(expected["w"])) < 0.15
    exact, _ = trained(adamod(0.1, b3=0), params)
    np.testing.assert_allclose(exact["w"], expected["w"], rtol=1e-3)
    rates = learning_rates(state, 0.1)
    chex.assert_trees_all_equal(rates.adaptive, rates.bounded)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.codes, "codes of a Float8Array"),
        (lambda x: Float8Array(x.codes, None), "exponents of the state's nu"),
        (lambda x: Float8Array(x.codes, x.exponents[:1]), "exponents of shape"),
        (lambda x: {"codes": x.codes}, "differ in structure"),
    ],
    ids=["codes alone", "None", "another shape", "a dictionary of codes"],
)
def test_codes_without_exponents_are_refused(spoil, message):
    params = jnp.ones((4, 128))
    tx = scale_by_adamod(**FLOAT8)
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


def test_shapes_alone_bytes_and_exported_programs():
    """What tools do that take a state for a tree of arrays."""
    tx, params = adamod(0.1, **FLOAT8), {"w": noise((8, 256))}
    _, state = trained(tx, params)
    shapes = {"w": jax.ShapeDtypeStruct((8, 256), jnp.float32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), state)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    model = nnx.Linear(8, 128, rngs=nnx.Rngs(0))
    read = nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
    assert learning_rates(read, 0.1).bounded["kernel"].shape == (8, 128)
    (n,) = jax.export.symbolic_shape("n")
    rows = {"w": jax.ShapeDtypeStruct((n, 256), jnp.float32)}
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

    @nnx.jit
    def step(model, optimizer):
        loss = nnx.grad(lambda m: jnp.sum(m.kernel[...] ** 2) + jnp.sum(m.bias[...]))
        optimizer.update(model, loss(model))

    for _ in range(3):
        step(model, optimizer)
        gradients = {"kernel": 2 * state.params["kernel"], "bias": jnp.ones(128)}
        state = state.apply_gradients(grads=gradients)
    for _ in range(2):  # outside jit too
        gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, gradients)
        gradients = jax.tree.map(jnp.ones_like, state.params)
        state = state.apply_gradients(grads=gradients)
    np.testing.assert_allclose(
        nnx.state(model)["kernel"][...], state.params["kernel"], rtol=1e-2, atol=1e-2
    )
    mine = learning_rates(optimizer.opt_state, 0.1).bounded["kernel"]
    expected = learning_rates(state.opt_state, 0.1).bounded["kernel"]
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
        ((24, 256), P("x"), None),
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
        if message is None:  # though shards have 3 rows, or 2
            updates, _ = trained(tx, params)
            assert updates["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
            return
        for init in (tx.init, jax.jit(tx.init)):
            with pytest.raises(ValueError, match=message):
                init(params)


def test_from_torch():
    params = {"w": jnp.ones((4, 256)), "b": jnp.ones(3)}
    values = {k: np.asarray(noise(p.shape)) for k, p in params.items()}
    state_dict = {
        "state": {
            index: {
                "step": 7,
                "exp_avg": values[name],
                "exp_avg_sq": values[name] ** 2,
                "exp_avg_lr": np.abs(values[name]),
            }
            for index, name in enumerate(values)
        },
        "param_groups": [{"params": [0, 1]}],
    }
    tx = adamod(0.1, convention="torch", **FLOAT8)
    state = from_torch(state_dict, list(values), dict, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    averages = dequantized(state[0])
    # At most half a spacing off, which is an eighth, or coarser near the sign's floor.
    np.testing.assert_allclose(averages.mu["w"], values["w"], rtol=0.0626, atol=1e-5)
    np.testing.assert_allclose(averages.nu["w"], values["w"] ** 2, rtol=0.0626)
    np.testing.assert_allclose(averages.bound["w"], np.abs(values["w"]), rtol=0.0626)
    np.testing.assert_allclose(averages.mu["b"], values["b"], rtol=1e-6)


@pytest.mark.parametrize("devices", [n for n in (1, 4) if n <= COUNT])
def test_restored_on_other_devices(tmp_path, devices):
    """The codes are those that were saved, and the next step's are near at hand."""

    def put(tree, devices):
        mesh = make_mesh(("x",), devices=devices)
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim else P())),
            tree,
        )

    params, tx = jnp.ones((16, 256)), adamod(0.1, **FLOAT8)
    _, state = trained(tx, put(params, COUNT))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", put(tx.init(params), devices)
        )
    assert len(restored[0].nu.codes.sharding.device_set) == devices
    chex.assert_trees_all_equal(*jax.device_get((restored, state)))
    update = jax.jit(tx.update)
    after = [
        jax.device_get(update(put(noise(params.shape), n), s)[1])
        for n, s in ((COUNT, state), (devices, restored))
    ]
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        apart = np.abs(np.asarray(a, int) - np.asarray(b, int))
        assert apart.max() <= 1
        assert apart.sum() <= 1e-4 * apart.size + 1


def test_orbax(tmp_path):
    params = {"w": noise((4, 256)), "b": jnp.ones(3)}
    tx = adamod(0.1, **FLOAT8)
    _, state = trained(tx, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
        plain = checkpointer.restore(tmp_path / "state")
        without = state[0].nu["w"]._replace(exponents=None)
        template = state[0]._replace(nu={**state[0].nu, "w": without})
        # Orbax passes over what is missing, in a template and on disk; update does not.
        lacking = [checkpointer.restore(tmp_path / "state", (template, *state[1:]))]
        checkpointer.save(tmp_path / "lacking", (template, *state[1:]))
        checkpointer.wait_until_finished()
        lacking.append(checkpointer.restore(tmp_path / "lacking", tx.init(params)))
    for incomplete in lacking:
        with pytest.raises(TypeError, match="exponents of the state's nu"):
            tx.update(params, incomplete)
    chex.assert_trees_all_equal(restored, state)
    # Without a template Orbax returns mappings, which stand for the same.
    again = state[0]._replace(**{k: plain[0][k] for k in ("mu", "nu", "bound")})
    step = jax.jit(tx.update)
    chex.assert_trees_all_equal(step(params, (again, *state[1:])), step(params, state))
