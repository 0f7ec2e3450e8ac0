"""Is a state in another storage refused, and does from_adamod turn it into this one?"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from helpers import make_mesh
from optax_adamod import (
    Float8Array,
    adamod,
    from_adam,
    from_adamod,
    from_torch,
    round_updates_stochastically,
    scale_by_adamod,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULE = optax.linear_schedule(0.1, 0.0, 50)
FIELDS = ("mu", "nu", "bound")
STORAGES = {
    "float32": {},
    "bfloat16": {f"{field}_dtype": "bfloat16" for field in FIELDS},
    "float8": {f"{field}_dtype": "float8" for field in FIELDS},
    "mixed": {"mu_dtype": "float16", "nu_dtype": "float8", "bound_dtype": "bfloat16"},
}
PARAMS = {"w": jnp.linspace(-1, 1, 1024).reshape(4, 256), "b": jnp.ones(3)}


def is_float8(x):
    return isinstance(x, Float8Array)


def follow(tx, params=PARAMS, steps=3):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, steps + 1):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(step * p), params)
        _, state = update(gradients, state, params)
    return state


@functools.cache
def followed(storage):
    return follow(adamod(SCHEDULE, **STORAGES[storage]))


def numbers(state, field):
    return jax.tree.map(
        lambda x: np.asarray(x.dequantize() if is_float8(x) else x, np.float32),
        optax.tree.get(state, field),
        is_leaf=is_float8,
    )


PAIRS = list(itertools.permutations(STORAGES, 2))


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_another_storage_is_refused(old, new):
    tx = scale_by_adamod(**STORAGES[new])
    state = scale_by_adamod(**STORAGES[old]).init(PARAMS)
    message = r"(?s)state's \w+\['[bw]'\] is in \w+, and.*ask for \w+.*from_adamod"
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(TypeError, match=message):
            update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ("float8", None),
        ("float8", "float32"),
        ("float32", "float8"),
        ("bfloat16", "float8"),
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float64", "float32"),
        ("float32", "float64"),
    ],
)
def test_the_error_names_path_and_dtypes(field, kept, asked, x64):
    def tx(dtype):
        return scale_by_adamod(**{f"{field}_dtype": dtype})

    params = {"layer": jnp.ones((2, 128), jnp.float32)}
    state = tx(kept).init(params)
    wanted = asked or "float32"
    if (kept, asked) == ("float8", None):  # the parameter's, which may be wider
        wanted = "the dtype of the parameter"
    message = rf"{field}\['layer'\] is in {kept}, and .* ask for {wanted}\. Convert it"
    with pytest.raises(TypeError, match=message):
        tx(asked).update(params, state, params)
    state = from_adamod(state, tx(asked).init(params))
    jax.eval_shape(tx(asked).update, params, state, params)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("g", ["bfloat16", "float32"])
def test_what_init_made_passes(storage, dtype, g):
    """Whatever the dtype of gradients, of parameters, and which leaves there are."""
    if dtype == "complex64":
        g = dtype
        if storage == "float8":
            pytest.skip("mu in 8 bits is for real parameters")
    params = {**PARAMS, "none": None, "masked": optax.MaskedNode(), "v": jnp.ones(128)}
    gradients = optax.tree.cast(params, g)
    tx = optax.masked(
        adamod(0.1, **STORAGES[storage]), {**params, "w": True, "b": False, "v": True}
    )
    params = optax.tree.cast(params, dtype)
    state = tx.init(params)
    narrower = [optax.tree.cast(params, "bfloat16")] if dtype == "float32" else []
    for given in (params, None, *narrower):
        _, new = jax.eval_shape(tx.update, gradients, state, given)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_shards_and_members_of_long_vectors_pass():
    """In 8 bits outside, though shorter inside than what 8 bits are for."""
    params = {"w": jnp.ones(2**17)}
    tx = adamod(0.1, **STORAGES["float8"])
    state = tx.init(params)
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, state)
    tall = jax.tree.map(lambda x: x.reshape(8, -1) if x.ndim else x, state)
    gradients = {"w": jnp.ones((8, 2**14))}
    jax.eval_shape(jax.vmap(tx.update, in_axes=(0, axes)), gradients, tall)


# Half a spacing, relative to the number. Far below the largest of a group 8 bits are
# spaced evenly.
ROUNDING = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "float8": 2**-4}


@pytest.mark.parametrize("old", STORAGES)
@pytest.mark.parametrize("new", STORAGES)
def test_numbers_and_steps_go_on(old, new):
    before, after = (adamod(SCHEDULE, **STORAGES[x]) for x in (old, new))
    state, fresh = followed(old), after.init(PARAMS)
    converted = from_adamod(state, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, fresh)
    assert converted[0].count == converted[1].count == 3
    for field in FIELDS:
        expected = numbers(state, field)
        rounding = ROUNDING[STORAGES[new].get(f"{field}_dtype", "float32")]
        floor = 2**-18 * np.abs(expected["w"]).max() if rounding == 2**-4 else 0
        chex.assert_trees_all_close(
            numbers(converted, field), expected, rtol=1.001 * rounding, atol=floor
        )
    jax.eval_shape(after.update, PARAMS, converted, PARAMS)
    if new in ("float32", old):  # which holds all the numbers of the other
        back = from_adamod(converted, before.init(PARAMS))
        for field in FIELDS:
            chex.assert_trees_all_equal(numbers(back, field), numbers(state, field))


WRAPPERS = {
    "chain": lambda tx: optax.chain(
        optax.clip(1.0), tx, round_updates_stochastically()
    ),
    "inject_hyperparams": lambda tx: optax.chain(
        tx, optax.inject_hyperparams(optax.scale)(SCHEDULE)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {0: tx, 1: optax.sgd(SCHEDULE)}, {"w": 0, "b": 1}
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_to_the_same_storage_nothing_changes(name):
    """Every counter goes on, so the next update is the one without a conversion."""
    params = optax.tree.cast(PARAMS, "bfloat16")
    tx = WRAPPERS[name](adamod(SCHEDULE, **STORAGES["float8"]))
    state = follow(tx, params)
    converted = from_adamod(state, tx.init(params))
    update = jax.jit(tx.update)
    (actual, _), (expected, _) = (update(params, s, params) for s in (converted, state))
    chex.assert_trees_all_equal(actual, expected)


def test_bounds_of_one_side():
    bounded, unbounded = adamod(0.1, nu_dtype="bfloat16"), adamod(0.1, b3=0)
    state = from_adamod(follow(bounded), unbounded.init(PARAMS))
    assert state[0].bound is None
    chex.assert_trees_all_equal(numbers(state, "nu"), numbers(follow(bounded), "nu"))
    unbounded.update(PARAMS, state, PARAMS)
    fresh = bounded.init(PARAMS)
    fresh = optax.tree.set(fresh, bound=PARAMS)
    state = from_adamod(follow(unbounded), fresh)
    chex.assert_trees_all_equal(state[0].bound, PARAMS)
    assert state[0].count == 3
    for tx, other, message in (
        (bounded, unbounded, "b3 is not 0.*from_adamod"),
        (unbounded, bounded, "b3 is 0.*from_adamod"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(PARAMS, other.init(PARAMS), PARAMS)


@pytest.mark.parametrize(("old", "new"), [("float32", "float8"), ("float8", "float32")])
def test_restored_by_orbax(tmp_path, old, new):
    before, after = (adamod(SCHEDULE, **STORAGES[x]) for x in (old, new))
    state = followed(old)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", before.init(PARAMS))
        plain = checkpointer.restore(tmp_path / "state")
    with pytest.raises(TypeError, match="from_adamod"):
        after.update(PARAMS, restored, PARAMS)
    expected = from_adamod(state, after.init(PARAMS))
    chex.assert_trees_all_equal(from_adamod(restored, after.init(PARAMS)), expected)
    # Without a template averages in 8 bits come back as mappings.
    parts = {field: plain[0][field] for field in FIELDS}
    mapped = (state[0]._replace(**parts), *state[1:])
    chex.assert_trees_all_equal(from_adamod(mapped, after.init(PARAMS)), expected)
    with pytest.raises(TypeError, match="from_adamod"):
        after.update(PARAMS, mapped, PARAMS)


def test_under_jit_in_nnx_and_on_a_mesh():
    sharding = NamedSharding(make_mesh(("x",)), PartitionSpec(None, "x"))
    params = {"w": jax.device_put(jnp.ones((2, 1024)), sharding)}
    tx = adamod(SCHEDULE, **STORAGES["float8"])
    state, fresh = follow(adamod(SCHEDULE), {"w": np.ones((2, 1024))}), tx.init(params)
    converted = from_adamod(state, fresh)
    for leaf in jax.tree.leaves(converted[0][1:]):
        assert leaf.sharding.is_equivalent_to(sharding, 2)
    jitted = jax.jit(lambda s, params: from_adamod(s, tx.init(params)))
    chex.assert_trees_all_equal(*jax.device_get((jitted(state, params), converted)))

    model = nnx.Linear(8, 128, rngs=nnx.Rngs(0))
    old, new = (
        nnx.Optimizer(model, adamod(0.1, **STORAGES[x]), wrt=nnx.Param)
        for x in ("float32", "float8")
    )
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    update = nnx.jit(lambda optimizer, model: optimizer.update(model, gradients))
    update(old, model)
    new.opt_state = from_adamod(old.opt_state, new.opt_state)
    update(new, model)
    assert new.opt_state[0].count[...] == 2


def test_either_state_may_be_donated():
    """The arrays are copies, of Adam's too."""
    for convert, old, new in (
        (from_adam, optax.adam(SCHEDULE), adamod(SCHEDULE)),
        (from_adamod, *[adamod(SCHEDULE)] * 2),
        (from_adamod, *[adamod(SCHEDULE, **STORAGES["float8"])] * 2),
    ):
        state = follow(old)
        converted = convert(state, new.init(PARAMS))
        jax.jit(new.update, donate_argnums=1)(PARAMS, converted, PARAMS)
        assert not any(x.is_deleted() for x in jax.tree.leaves(state))
        assert any(x.is_deleted() for x in jax.tree.leaves(converted))
        old.update(PARAMS, state, PARAMS)


def test_nothing_is_nan_on_the_way():
    """So that jax.debug_nans does not raise, outside jit either."""
    tx = adamod(0.1, convention="torch", **STORAGES["float8"])
    averages = [np.zeros((2, 128)), np.full((2, 128), 1e38), np.eye(2, 128)]
    stored = dict(zip(("exp_avg", "exp_avg_sq", "exp_avg_lr"), averages, strict=True))
    state_dict = {
        "state": {0: {"step": 7, **stored}},
        "param_groups": [{"params": [0]}],
    }
    params = {"w": jnp.ones((2, 128))}
    adam = optax.adam(0.1)
    with jax.debug_nans(True):
        state = from_adam(adam.init(params), tx.init(params))
        state = from_adam(adam.update(params, adam.init(params))[1], state)
        state = from_adamod(state, adamod(0.1).init(params))
        state = from_adamod(state, tx.init(params))
        state = from_torch(state_dict, ["w"], dict, state)
        tx.update(params, state, params)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda s: optax.sgd(0.1).init(PARAMS),
            ValueError,
            "adamod_state must hold one",
        ),
        (lambda s: (s, s), ValueError, "adamod_state must hold one .* and holds 2"),
        (
            lambda s: s._replace(nu={"w": s.nu["w"]}),
            ValueError,
            "adamod_state's nu is PyTreeDef.*, and the parameters are",
        ),
        (
            lambda s: s._replace(nu={**s.nu, "w": jnp.ones((4, 128))}),
            ValueError,
            r"adamod_state's nu at \['w'\] has shape \(4, 128\), and the parameter has",
        ),
        (
            lambda s: s._replace(nu={**s.nu, "w": s.nu["w"].codes}),
            TypeError,
            r"adamod_state's nu at \['w'\] has dtype uint8, which is no average",
        ),
        (
            lambda s: s._replace(nu={**s.nu, "w": s.nu["w"]._replace(exponents=None)}),
            TypeError,
            r"the exponents of adamod_state's nu at \['w'\] must be an array",
        ),
    ],
    ids=["of SGD", "two", "structure", "shape", "codes alone", "no exponents"],
)
def test_other_states_are_refused(edit, error, message):
    (state, *_) = adamod(0.1, **STORAGES["float8"]).init(PARAMS)
    with pytest.raises(error, match=message):
        from_adamod(edit(state), adamod(0.1).init(PARAMS))


def test_schedules_go_on_from_steps_of_their_own():
    """A schedule that began at another step than AdaMod, as after a restart."""
    tx = adamod(SCHEDULE)
    state = followed("float32")
    state = (state[0], state[1]._replace(count=jnp.int32(17)))
    new = from_adamod(state, tx.init(PARAMS))
    assert [int(new[0].count), int(new[1].count)] == [3, 17]


def test_coordinates_without_gradients_loosen_no_bound():
    """Whose bound, 1 / eps, leaves no room for others in their group."""
    tx = scale_by_adamod(b3=0.9, eps=1e-15)
    g = jnp.exp2(jnp.linspace(-20, 0, 128)).at[::7].set(0)[None]
    _, state = tx.update(g, tx.init(g))
    new = from_adamod(state, scale_by_adamod(**STORAGES["float8"]).init(g))
    awake = g[0] != 0
    actual, expected = new.bound.dequantize()[0, awake], state.bound[0, awake]
    np.testing.assert_allclose(actual, expected, rtol=0.07)


@pytest.mark.parametrize("field", FIELDS)
def test_codes_of_another_sign_are_refused(field):
    """As of zeros that were made like another average."""
    tx, params = scale_by_adamod(**STORAGES["float8"]), {"w": jnp.ones((2, 128))}
    state = tx.init(params)
    other = state.nu if field == "mu" else state.mu
    state = state._replace(**{field: jax.tree.map(jnp.zeros_like, other)})
    message = rf"codes of .*{field}.*\['w'\] are u?int8; those of mu are int8"
    for call in (tx.update, from_adamod):
        with pytest.raises(TypeError, match=message):
            call(params if call == tx.update else state, state)


def test_negative_bounds_are_refused_in_8_bits():
    """Of a negative learning rate; they would make their group NaN."""
    state = follow(adamod(-0.1))
    with pytest.raises(ValueError, match=r"bound at .*8 bits: .* negative"):
        from_adamod(state, adamod(0.1, bound_dtype="float8").init(PARAMS))
