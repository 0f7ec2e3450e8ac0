"""Does a training that Adam began go on with Adam's averages and at its step?"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from helpers import make_mesh
from optax_adamod import (
    ScaleByAdamodState,
    adamod,
    adamodw,
    from_adam,
    scale_by_adamod,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULE = optax.linear_schedule(0.1, 0.0, 50)


class Params(NamedTuple):
    """Names that states have too."""

    mu: jax.Array
    nu: jax.Array
    count: jax.Array


PARAMS = {
    "plain": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)},
    "dictionary": {
        "mu": jnp.ones(2),
        "nu": {"count": jnp.ones(3)},
        "bound": jnp.ones(1),
    },
    "named tuple": Params(jnp.ones(2), jnp.ones(3), jnp.ones(())),
}
# How Adam was used, and how AdaMod goes on.
CHAINS = {
    "adam": (optax.adam(0.1), adamod(0.1)),
    "schedules": (optax.adam(SCHEDULE), adamod(SCHEDULE)),
    "decay": (optax.adamw(SCHEDULE), adamodw(SCHEDULE)),
    "chain": (
        optax.chain(optax.clip(1.0), optax.adam(0.1)),
        optax.chain(optax.clip(1.0), optax.ema(0.5), adamod(SCHEDULE)),
    ),
    "injected": (
        optax.inject_hyperparams(optax.adam)(SCHEDULE),
        optax.inject_hyperparams(adamod)(SCHEDULE),
    ),
    "accumulated": (
        optax.MultiSteps(optax.adam(SCHEDULE), 1),
        optax.MultiSteps(adamod(SCHEDULE), 1),
    ),
}


def follow(tx, params, steps=3):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, steps + 1):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(step * p), params)
        _, state = update(gradients, state, params)
    return state


def counts(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [
        int(x)
        for path, x in leaves
        if path[-1:] == (jax.tree_util.GetAttrKey("count"),)
        and jnp.issubdtype(x.dtype, jnp.integer)
    ]


def the(state, name):
    ((_, found),) = optax.tree.get_all_with_path(state, name)
    return found


@pytest.mark.parametrize(
    ("chain", "names"),
    [
        ("adam", "plain"),
        ("adam", "dictionary"),
        ("decay", "named tuple"),
        ("schedules", "dictionary"),
        ("chain", "dictionary"),
        ("chain", "named tuple"),
        ("injected", "plain"),
        ("injected", "named tuple"),
        ("accumulated", "named tuple"),
    ],
)
def test_state_of_adam(chain, names):
    params, (before, after) = PARAMS[names], CHAINS[chain]
    adam_state, fresh = follow(before, params), after.init(params)
    state = from_adam(adam_state, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
    adam, ours = the(adam_state, "ScaleByAdamState"), the(state, "ScaleByAdamodState")
    chex.assert_trees_all_equal(ours.mu, adam.mu)
    chex.assert_trees_all_equal(ours.nu, adam.nu)
    assert not any(np.any(x) for x in jax.tree.leaves(ours.bound))
    steps = counts(state)
    assert steps == [0 if chain == "chain" and i == 0 else 3 for i in range(len(steps))]
    _, state = after.update(params, state, params)
    assert counts(state) == [step + 1 for step in steps]


def test_without_a_bound_it_is_adam_that_goes_on():
    params = PARAMS["plain"]
    state = from_adam(
        follow(optax.adam(SCHEDULE), params), adamod(SCHEDULE, b3=0.0).init(params)
    )
    updates, _ = adamod(SCHEDULE, b3=0.0).update(params, state)
    adam = optax.adam(SCHEDULE)
    expected, _ = adam.update(params, follow(adam, params))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_averages_take_the_dtypes_of_the_new_state():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    fresh = adamod(0.1, mu_dtype="float32", bound_dtype="bfloat16").init(params)
    adam_state = follow(optax.adam(0.1), params)
    assert adam_state[0].nu["w"].dtype == jnp.bfloat16
    state = from_adam(adam_state, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
    chex.assert_trees_all_equal(
        state[0].nu["w"], adam_state[0].nu["w"].astype(jnp.float32)
    )


def test_averages_are_placed_as_the_new_state():
    mesh = make_mesh(("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jnp.arange(16.0)}
    fresh = adamod(0.1).init(jax.device_put(params, sharding))
    state = from_adam(follow(optax.adam(0.1), params), fresh)
    for name in ("mu", "nu", "bound"):
        assert getattr(state[0], name)["w"].sharding == sharding


def test_under_jit():
    params, tx = PARAMS["plain"], adamod(SCHEDULE)
    adam_state = follow(optax.adam(0.1), params)
    jitted = jax.jit(lambda s, params: from_adam(s, tx.init(params)))
    chex.assert_trees_all_equal(
        jitted(adam_state, params), from_adam(adam_state, tx.init(params))
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx, other: optax.chain(tx, optax.contrib.reduce_on_plateau(0.5, 2)),
        lambda tx, other: optax.chain(optax.ema(0.9), tx),
        lambda tx, other: optax.MultiSteps(tx, 4),
        lambda tx, other: optax.apply_if_finite(tx, 3),
        lambda tx, other: optax.partition({"w": tx, "b": other}, {"w": "w", "b": "b"}),
    ],
    ids=["plateau", "ema", "MultiSteps", "apply_if_finite", "another optimizer"],
)
def test_what_counts_something_else_stays_as_it_is(wrap):
    def others(state):
        leaves = jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, ScaleByAdamodState)
        )
        return [x for x in leaves if not isinstance(x, ScaleByAdamodState)]

    params = PARAMS["plain"]
    before = wrap(optax.adam(0.1), optax.sgd(0.1)).init(params)
    before = optax.tree.set(before, count=jnp.asarray(9, jnp.int32))
    fresh = wrap(adamod(0.1), optax.adam(0.1)).init(params)
    state = from_adam(before, fresh)
    assert the(state, "ScaleByAdamodState").count == 9
    chex.assert_trees_all_equal(others(state), others(fresh))


def test_a_schedule_goes_on_at_its_own_step():
    """That of the mini-steps, outside ``MultiSteps``, and not Adam's."""

    def accumulated(optimizer):
        return optax.inject_hyperparams(
            lambda lr: optax.MultiSteps(optimizer(lr), 4).gradient_transformation()
        )(lr=optax.linear_schedule(1.0, 0.0, 100))

    params = PARAMS["plain"]
    before = follow(accumulated(optax.adam), params, steps=8)
    tx = accumulated(adamod)
    state = from_adam(before, tx.init(params))
    assert state.count == before.count == 8
    assert the(state, "ScaleByAdamodState").count == 2
    _, state = tx.update(params, state, params)
    assert state.hyperparams["lr"] == pytest.approx(0.92)


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.mu = nnx.Linear(3, 2, rngs=rngs)
        self.nu = nnx.Linear(3, 2, rngs=rngs)
        self.count = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.count * (self.mu(x) + self.nu(x))


def test_in_flax_nnx():
    model = Encoder(nnx.Rngs(0))
    x = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, gradients)

    old = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    for _ in range(3):
        step(model, old)
    new = nnx.Optimizer(model, adamod(SCHEDULE), wrt=nnx.Param)
    new.opt_state = from_adam(old.opt_state, new.opt_state)
    kept = nnx.to_pure_dict(nnx.state(new.opt_state[0].mu))
    chex.assert_trees_all_equal(kept, nnx.to_pure_dict(nnx.state(old.opt_state[0].mu)))
    step(model, new)
    assert new.opt_state[0].count[...] == new.opt_state[1].count[...] == 4


def test_parameters_that_are_a_dataclass():
    """As those of Equinox and Flax's struct are."""

    @chex.dataclass
    class Model:
        mu: jax.Array
        count: jax.Array

    params = Model(mu=jnp.ones(2), count=jnp.ones(3))
    adam_state = follow(optax.adam(0.1), params)
    state = from_adam(adam_state, adamod(0.1).init(params))
    chex.assert_trees_all_equal(state[0].mu, adam_state[0].mu)
    assert state[0].count == 3


@pytest.mark.parametrize(
    ("adam_state", "state", "message"),
    [
        (
            optax.sgd(0.1).init(jnp.ones(2)),
            adamod(0.1).init(jnp.ones(2)),
            "adam_state must hold one ScaleByAdamState, and holds 0",
        ),
        (
            optax.chain(optax.scale_by_adam(), optax.adam(0.1)).init(jnp.ones(2)),
            adamod(0.1).init(jnp.ones(2)),
            "adam_state must hold one ScaleByAdamState, and holds 2",
        ),
        (
            optax.adam(0.1).init(jnp.ones(2)),
            optax.adam(0.1).init(jnp.ones(2)),
            "^state must hold one ScaleByAdamodState, and holds 0",
        ),
        (
            optax.adam(0.1).init({"a": jnp.ones(2)}),
            adamod(0.1).init({"b": jnp.ones(2)}),
            "adam_state's mu is PyTreeDef.*'a'.*, and the parameters are .*'b'",
        ),
        (
            optax.adam(0.1).init({"a": jnp.ones(2)}),
            adamod(0.1).init({"a": jnp.ones(3)}),
            r"adam_state's mu at \['a'\] has shape \(2,\), and the parameter has",
        ),
        (
            optax.adam(0.1).init({"a": jnp.ones(2, complex)}),
            adamod(0.1).init({"a": jnp.ones(2)}),
            r"adam_state's mu at \['a'\] is complex, and the parameter is real",
        ),
        (
            jax.vmap(optax.adam(0.1).init)(jnp.ones((3, 2))),
            adamod(0.1).init(jnp.ones((3, 2))),
            r"adam_state is a stack of \(3,\) states: call this function under jax.vmap",
        ),
    ],
    ids=["of SGD", "several", "swapped", "structure", "shape", "complex", "stack"],
)
def test_other_states_are_refused(adam_state, state, message):
    with pytest.raises(ValueError, match=message):
        from_adam(adam_state, state)


def test_the_chain_of_ones_own():
    params = PARAMS["plain"]
    tx = optax.chain(scale_by_adamod(), optax.scale_by_learning_rate(0.1))
    state = from_adam(follow(optax.adam(0.1), params), tx.init(params))
    assert state[0].count == 3
