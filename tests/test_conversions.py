"""Do the averages of other states go on, in the dtypes and places of the new one?"""

import collections
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COUNT, make_mesh
from optax_adamod import (
    Float8Array,
    ScaleByAdamodState,
    adamod,
    adamodw,
    from_adam,
    from_adamod,
    from_torch,
    round_updates_stochastically,
    scale_by_adamod,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULE = optax.linear_schedule(0.1, 0.0, 50)
FIELDS = ("mu", "nu", "bound")
TORCH = ("exp_avg", "exp_avg_sq", "exp_avg_lr")
STORAGES = {
    "float32": {},
    "bfloat16": {f"{field}_dtype": "bfloat16" for field in FIELDS},
    "float8": {f"{field}_dtype": "float8" for field in FIELDS},
    "mixed": {"mu_dtype": "float16", "nu_dtype": "float8", "bound_dtype": "bfloat16"},
}
PARAMS = {"w": jnp.ones((2, 256)), "b": jnp.ones(3)}
X = {"a": jnp.ones(2)}


def the(state, name):
    ((_, found),) = optax.tree.get_all_with_path(state, name)
    return found


def from_pytorch(state, fresh):
    """``from_torch``, of the averages of an AdaMod in a dictionary as PyTorch's."""
    ours = the(state, "ScaleByAdamodState")
    _, treedef = jax.tree.flatten(ours.mu)
    averages = zip(*[jax.tree.leaves(ours._asdict()[x]) for x in FIELDS], strict=True)
    stored = {
        i: {"step": ours.count, **dict(zip(TORCH, map(np.asarray, x), strict=True))}
        for i, x in enumerate(averages)
    }
    groups = [{"params": [i]} for i in stored]
    return from_torch(
        {"state": stored, "param_groups": groups},
        [f"parameter {i}" for i in stored],
        lambda arrays: treedef.unflatten(arrays.values()),
        fresh,
    )


# How the old state is called in messages, and what made it.
CONVERSIONS = {
    from_adam: ("adam_state's mu", optax.adam),
    from_adamod: ("adamod_state's mu", adamod),
    from_pytorch: ("to_tree's exp_avg", adamod),
}
ALL = pytest.mark.parametrize("convert", CONVERSIONS)


# Names that states have too.
Params = collections.namedtuple("Params", ["mu", "nu", "count"])
NAMED = Params(jnp.ones(2), jnp.ones(3), jnp.ones(()))
DICTIONARY = {"mu": jnp.ones(2), "nu": {"count": jnp.ones(3)}, "bound": jnp.ones(1)}
PLAIN = {"w": jnp.ones((2, 128), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}


def aged(state):
    """As after a training: other numbers, and every counter at a step of its own."""
    steps = itertools.count(3)

    def older(x):
        if x.dtype == bool or x.ndim:
            return jnp.asarray(np.arange(x.size) % 7 + 1, x.dtype).reshape(x.shape)
        step = next(steps) if jnp.issubdtype(x.dtype, jnp.integer) else 1.5
        return jnp.asarray(step, x.dtype)

    return jax.tree.map(older, state)


def counts_and_others(state):
    """The steps of all counters, and what is neither AdaMod's nor a step."""
    ours = {id(x) for x in jax.tree.leaves(the(state, "ScaleByAdamodState"))}
    counts, others = [], []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if path[-1:] == (jax.tree_util.GetAttrKey("count"),) and x.dtype == jnp.int32:
            counts.append(int(x))
        elif id(x) not in ours:
            others.append(x)
    return counts, others


def in_mini_steps(make):
    def inner(lr):
        tx = optax.chain(make(lr), optax.scale_by_schedule(SCHEDULE))
        return optax.MultiSteps(tx, 4).gradient_transformation()

    return optax.inject_hyperparams(inner)(lr=SCHEDULE)


INJECTED_SCALE = optax.inject_hyperparams(optax.scale)(SCHEDULE)
SGD, ROUND = optax.sgd(SCHEDULE), round_updates_stochastically()
ONE = {"w": 0, "b": 1}
# Around both: the parameters, and what the new state's counters hold, of the numbers
# from 3 on that `aged` gives the old one's integers in order, mini-steps included.
WRAPPERS = [
    (lambda make: make(SCHEDULE), DICTIONARY, [3, 4]),
    (lambda make: optax.chain(make(SCHEDULE), ROUND), PLAIN, [3, 4, 5]),
    (lambda make: optax.chain(make(0.1), INJECTED_SCALE), NAMED, [3, 4, 4]),
    (lambda make: optax.inject_hyperparams(make)(SCHEDULE), NAMED, [3, 3, 5]),
    (lambda make: optax.MultiSteps(make(SCHEDULE), 1), NAMED, [5, 6]),
    (in_mini_steps, PLAIN, [3, 3, 7, 8]),  # lr counts mini-steps, Adam does not
    (lambda make: optax.masked(make(0.1), {"w": True, "b": False}), PLAIN, [3]),
    (lambda make: optax.apply_if_finite(make(0.1), 3), PLAIN, [5]),
    (lambda make: optax.partition({0: make(0.1), 1: SGD}, ONE), PLAIN, [3, 4]),
]
PLATEAU = optax.contrib.reduce_on_plateau(0.5, 2)
AFTER_EMA = optax.chain(optax.ema(0.5), adamod(SCHEDULE))
INJECTED = optax.inject_hyperparams(adamod)(SCHEDULE)
IN_8_BITS = functools.partial(adamod, **STORAGES["float8"])


@pytest.mark.parametrize(
    ("convert", "before", "after", "params", "steps"),
    [
        *[(from_adam, f(optax.adam), f(adamod), *row) for f, *row in WRAPPERS],
        *[(from_adamod, f(IN_8_BITS), f(IN_8_BITS), *row) for f, *row in WRAPPERS],
        (from_adam, optax.adam(0.1), scale_by_adamod(), PLAIN, [3]),
        (from_adam, optax.adamw(SCHEDULE), adamodw(SCHEDULE), NAMED, [3, 4]),
        (from_adam, optax.adam(SCHEDULE), adamod(SCHEDULE, b3=0), PLAIN, [3, 4]),
        (from_adam, optax.adam(0.1), AFTER_EMA, NAMED, [0, 3, 3]),
        (from_adam, optax.adam(0.1), optax.chain(adamod(0.1), PLATEAU), PLAIN, [3, 0]),
        (from_pytorch, adamod(0.1), AFTER_EMA, NAMED, [0, 3, 3]),
        (from_pytorch, adamod(0.1), INJECTED, NAMED, [3, 3, 3]),
        # Only one of them has a bound.
        (from_pytorch, adamod(0.1), adamod(0.1, b3=0), PLAIN, [3]),
        (from_adamod, adamod(0.1), adamod(0.1, b3=0), PLAIN, [3]),
        (from_adamod, adamod(0.1, b3=0), adamod(0.1), PLAIN, [3]),
    ],
)
def test_averages_and_steps_go_on(convert, before, after, params, steps):
    """And all else stays as it is, in copies, so that either may be donated."""
    old, fresh = aged(before.init(params)), after.init(params)
    new = convert(old, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, fresh)
    kind = "ScaleByAdamState" if convert is from_adam else "ScaleByAdamodState"
    theirs, ours = the(old, kind), the(new, "ScaleByAdamodState")
    chex.assert_trees_all_equal((ours.mu, ours.nu), (theirs.mu, theirs.nu))
    bound = the(fresh, "ScaleByAdamodState").bound
    if bound is not None and getattr(theirs, "bound", None) is not None:
        bound = theirs.bound
    chex.assert_trees_all_equal(ours.bound, bound)
    actual, others = counts_and_others(new)
    assert actual == steps
    chex.assert_trees_all_equal(others, counts_and_others(fresh)[1])
    update = optax.with_extra_args_support(after).update
    jax.eval_shape(update, params, new, params, value=jnp.ones(()))
    for x in jax.tree.leaves(new):
        x.delete()
    assert not any(x.is_deleted() for x in jax.tree.leaves(old))


def test_a_bound_on_one_side_is_refused():
    bounded, unbounded = adamod(0.1), adamod(0.1, b3=0)
    for tx, other, b3 in ((bounded, unbounded, "not 0"), (unbounded, bounded, "0")):
        with pytest.raises(ValueError, match=f"b3 is {b3}.*from_adamod"):
            tx.update(PARAMS, other.init(PARAMS), PARAMS)


def as_numbers(state, field):
    average = getattr(state, field)["w"]
    narrow = isinstance(average, Float8Array)
    return np.asarray(average.dequantize() if narrow else average, float)


def at_step_3(storage="float32", params=PARAMS):
    """A state of AdaMod at step 3, with averages as of gradients of many sizes."""
    rng = np.random.default_rng(0)
    g = {k: rng.normal(size=x.shape).astype(np.float32) for k, x in params.items()}
    averages = g, optax.tree.mul(g, g), {k: 1 / (abs(x) + 0.1) for k, x in g.items()}
    fresh = scale_by_adamod(**STORAGES[storage]).init(params)
    return from_adamod(ScaleByAdamodState(3, *averages), fresh)


def as_old_state(convert, state):
    """Of the optimizer whose states are converted."""
    return optax.ScaleByAdamState(*state[:3]) if convert is from_adam else state


# Half a spacing, relative to the number. Far below the largest of a group 8 bits are
# spaced evenly.
ROUNDING = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "float8": 2**-4}


@pytest.mark.parametrize(
    ("convert", "old", "new"),
    [
        (from_adam, "bfloat16", "float32"), (from_adam, "float32", "mixed"),
        (from_adamod, "float32", "float8"), (from_adamod, "float8", "float32"),
        (from_adamod, "float8", "bfloat16"), (from_adamod, "mixed", "float8"),
        (from_pytorch, "float32", "mixed"), (from_pytorch, "float32", "float8"),
    ],
)  # fmt: skip
def test_averages_in_the_dtypes_of_the_new_state(convert, old, new):
    state = at_step_3(old)
    fresh = scale_by_adamod(**STORAGES[new]).init(PARAMS)
    converted = convert(as_old_state(convert, state), fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, fresh)
    assert converted.count == 3
    for field in FIELDS[: 2 if convert is from_adam else 3]:
        expected, actual = as_numbers(state, field), as_numbers(converted, field)
        rounding = ROUNDING[STORAGES[new].get(f"{field}_dtype", "float32")]
        floor = 2**-18 * abs(expected).max() if rounding == 2**-4 else 0
        np.testing.assert_allclose(actual, expected, 1.001 * rounding, floor)
    if new == "mixed":  # of which mu is in float16, whose largest number is 65504
        large = state._replace(mu=optax.tree.scale(1e6, state.nu))
        assert jnp.max(convert(as_old_state(convert, large), fresh).mu["w"]) == 65504
    if (old, new) == ("float8", "float32"):  # which holds all the numbers of 8 bits
        again = from_adamod(converted, state)
        for field in FIELDS:
            assert np.all(as_numbers(again, field) == as_numbers(state, field))
        # As Orbax restores it without a template.
        mapped = state._replace(nu={**state.nu, "w": state.nu["w"]._asdict()})
        chex.assert_trees_all_equal(from_adamod(mapped, fresh), converted)
        with pytest.raises(TypeError, match="from_adamod"):
            scale_by_adamod().update(PARAMS, mapped, PARAMS)


@ALL
def test_placed_as_the_new_state(convert):
    """And under jit the same."""
    sharding = NamedSharding(make_mesh(("x",)), P(None, "x"))
    params = {"w": np.ones((2, 128 * COUNT), np.float32)}
    tx = scale_by_adamod(mu_dtype="bfloat16", nu_dtype="float8")
    old, fresh = as_old_state(convert, at_step_3("float32", params)), tx.init(params)
    expected = convert(old, fresh)
    assert not any(x.committed for x in jax.tree.leaves(expected))
    converted = convert(old, tx.init(jax.device_put(params, sharding)))
    for leaf in jax.tree.leaves(converted[1:]):
        assert leaf.sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_equal(*jax.device_get((converted, expected)))
    if convert is not from_pytorch:
        chex.assert_trees_all_equal(jax.jit(convert)(old, fresh), expected)


def test_nothing_is_nan_on_the_way():
    """So that jax.debug_nans does not raise, outside jit either."""
    params = {"w": jnp.ones((1, 128))}
    tx = scale_by_adamod(**STORAGES["float8"])
    zeros, state = np.zeros((1, 128)), at_step_3("float32", params)
    large = state._replace(mu={"w": zeros}, nu={"w": zeros + 1e38})
    with jax.debug_nans(True):
        for old in (state, large, optax.tree.zeros_like(state)):
            new = from_adam(as_old_state(from_adam, old), tx.init(params))
            new = from_adamod(new, scale_by_adamod().init(params))
            new = from_adamod(new, tx.init(params))
            new = from_pytorch(old, new)
            tx.update(params, new, params)


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.mu = nnx.Linear(3, 128, rngs=rngs)
        self.nu = nnx.Linear(128, 2, rngs=rngs)
        self.count = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.count * self.nu(self.mu(x))


def test_in_flax_nnx():
    model = Encoder(nnx.Rngs(0))
    txs = optax.adam(0.1), adamod(SCHEDULE), IN_8_BITS(SCHEDULE)
    adam, wide, new = (nnx.Optimizer(model, tx, wrt=nnx.Param) for tx in txs)
    adam.opt_state = aged(adam.opt_state)
    wide.opt_state = from_adam(adam.opt_state, wide.opt_state)
    kept = [nnx.to_pure_dict(nnx.state(x.opt_state[0].mu)) for x in (adam, wide)]
    chex.assert_trees_all_equal(*kept)
    expected = from_adamod(wide.opt_state, new.opt_state)
    # Mappings by nnx.state keep their form.
    nnx.update(wide, from_adam(nnx.state(adam), nnx.state(wide)))
    nnx.update(new, from_adamod(nnx.state(wide), nnx.state(new)))
    chex.assert_trees_all_equal(new.opt_state, expected)

    @nnx.jit
    def step(model, optimizer):
        x = jnp.ones((5, 3))
        gradients = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, gradients)

    step(model, new)
    assert new.opt_state[0].count[...] == new.opt_state[1].count[...] == 4


@pytest.mark.parametrize("convert", [from_adamod, from_pytorch])
def test_bounds_of_8_bits_beside_coordinates_without_gradients(convert):
    """Whose bound, 1 / eps, leaves no room for others in their group."""
    v = np.exp2(np.linspace(-40, -20, 128, dtype=np.float32))[None]
    v[:, ::7] = 0
    bound = 1e-3 / (np.sqrt(v) + 1e-15)
    fresh = scale_by_adamod(**STORAGES["float8"]).init({"w": v})

    def converted(bound):
        averages = ({"w": jnp.asarray(x)} for x in (np.sqrt(v), v, bound))
        return convert(ScaleByAdamodState(jnp.int32(7), *averages), fresh)

    actual = converted(bound).bound["w"].dequantize()
    np.testing.assert_allclose(actual[v > 0], bound[v > 0], rtol=0.07)
    awake = np.where(v > 0, bound, 1.0)
    for lost, number in ((1e-20, "1"), (-1.0, "109")):  # the latter spoils all
        awake[0, 1] = lost
        message = rf"(bound|exp_avg_lr) at \['w'\] .* 8 bits: {number} of .* negative"
        with pytest.raises(ValueError, match=message):
            converted(awake)


@ALL
def test_states_that_do_not_fit_are_refused(convert):
    name, make = CONVERSIONS[convert]
    old, fresh = make(0.1).init(X), adamod(0.1).init(X)
    stacked = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
    of_b, of_3 = (adamod(0.1).init(x) for x in ({"b": X["a"]}, {"a": jnp.ones(3)}))
    complex_old = make(0.1).init({"a": jnp.ones(2, complex)})
    stack, one = r"is a stack of \(2,\) states.* under jax.vmap", "must hold one"
    shapes = r"at \['a'\] has shape \(2,\), and the parameter has \(3,\)"
    cases = [
        (old, (), f"^state {one} ScaleByAdamodState, and holds 0: it is made of tuple"),
        (old, (fresh, fresh), f"^state {one} ScaleByAdamodState, and holds 2"),
        (old, stacked(fresh), f"^state {stack}"),
        (old, of_b, rf"\['a'\] in {name} alone, and \['b'\] in the parameters alone"),
        (old, of_3, f"^{name} {shapes}"),
        (complex_old, fresh, r"(mu|exp_avg) (at \['a'\]|of 'parameter 0') is complex"),
    ]
    if convert is not from_pytorch:
        name = name.split("'")[0]
        cases += [
            (optax.sgd(0.1).init(X), fresh, f"^{name} {one} Scale.*, and holds 0"),
            ((old, old), fresh, f"^{name} {one} Scale.*, and holds 2"),
            (stacked(old), fresh, f"^{name} {stack}"),
        ]
    for old, fresh, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(old, fresh)


@pytest.mark.parametrize(
    ("field", "other", "part", "message"),
    [
        (
            "nu",
            "nu",
            "alone",
            r"adamod_state's nu at \['w'\] has dtype uint8, which is no",
        ),
        (
            "nu",
            "nu",
            "without exponents",
            r"the exponents of .*nu at \['w'\] must be an array",
        ),
        # As of zeros that were made like another average.
        ("mu", "nu", None, "codes of .*mu.*w'. are uint8; those of mu are int8"),
        ("nu", "mu", None, "codes of .*nu.*w'. are int8; those of mu are int8"),
        ("bound", "mu", None, "codes of .*bound.*w'. are int8; those of mu are int8"),
    ],
)
def test_codes_that_mean_something_else_are_refused(field, other, part, message):
    tx = scale_by_adamod(**STORAGES["float8"])
    state = tx.init(PARAMS)
    codes = getattr(state, other)["w"]
    codes = {"alone": codes.codes, None: codes}.get(
        part, codes._replace(exponents=None)
    )
    state = state._replace(**{field: {**PARAMS, "w": codes}})
    for fresh in (tx.init(PARAMS), scale_by_adamod().init(PARAMS)):
        with pytest.raises(TypeError, match=message):
            from_adamod(state, fresh)
    if part is None:
        with pytest.raises(TypeError, match=message):
            tx.update(PARAMS, state)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ("float8", None), ("float8", "float32"), ("float32", "float8"),
        ("bfloat16", "float8"), ("bfloat16", None), ("bfloat16", "float32"),
        ("float32", "bfloat16"), ("float64", "float32"), ("float32", "float64"),
    ],
)  # fmt: skip
def test_another_storage_is_refused(field, kept, asked, x64):
    """With the path and the dtypes, under jit too."""

    def tx(dtype):
        return scale_by_adamod(**{f"{field}_dtype": dtype})

    params = {"layer": jnp.ones((2, 128), jnp.float32)}
    state = tx(kept).init(params)
    wanted = asked or "float32"
    if (kept, asked) == ("float8", None):  # the parameter's, which may be wider
        wanted = "the dtype of the parameter"
    message = rf"{field}\['layer'\] is in {kept}, and .* ask for {wanted}\. Convert it"
    for update in (tx(asked).update, jax.jit(tx(asked).update)):
        with pytest.raises(TypeError, match=message):
            update(params, state, params)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("float32", "float16"), ("float32", "complex64"), ("bfloat16", "bfloat16"),
        ("bfloat16", "complex64"), ("float8", "bfloat16"), ("float8", "float32"),
        ("mixed", "float32"), ("mixed", "complex64"),
    ],
)  # fmt: skip
def test_what_init_made_passes(storage, dtype):
    """Whatever the dtype of gradients, of parameters, and which leaves there are."""
    params = {**PARAMS, "none": None, "masked": optax.MaskedNode(), "v": jnp.ones(128)}
    other = {"float32": "bfloat16"}.get(dtype, "float32")
    gradients = optax.tree.cast(params, dtype if dtype == "complex64" else other)
    tx = optax.masked(
        adamod(0.1, **STORAGES[storage]), {**params, "w": True, "b": False, "v": True}
    )
    params = optax.tree.cast(params, dtype)
    state = jax.eval_shape(tx.init, params)
    for given in (params, None, *([gradients] if dtype == "float32" else [])):
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
