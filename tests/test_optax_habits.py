"""Does what Optax asks of its own optimizers hold for these?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod, adamodw, scale_by_adamod

PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.full(3, 0.5, np.float32),
}
GRADIENTS = jax.tree.map(lambda p: np.cos(5 * p), PARAMS)
FACTORIES = pytest.mark.parametrize("factory", [adamod, adamodw])


def follow(tx, steps=4, params=PARAMS, gradients=GRADIENTS):
    """Returns parameters and state after some steps with constant gradients."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@FACTORIES
def test_unexpected_extra_arguments_are_ignored(factory):
    tx = factory(0.1)
    state = tx.init(PARAMS)
    expected = tx.update(GRADIENTS, state, PARAMS)
    actual = tx.update(GRADIENTS, state, PARAMS, value=1.0, unheard_of=None)
    chex.assert_trees_all_equal(actual, expected)


def float32_hyperparameters(**settings):
    """What float32 arrays make of Python floats: 1 - 0.999 is off by 1.3e-5."""
    return {k: float(np.float32(v)) for k, v in settings.items()}


@pytest.mark.parametrize(("factory", "b3"), [(adamod, 0.999), (adamodw, 0.9)])
def test_injected_hyperparameters(factory, b3):
    settings = dict(learning_rate=0.1, b1=0.9, b2=0.999, b3=b3, eps=1e-8)
    injected, state = follow(optax.inject_hyperparams(factory)(**settings))
    plain, expected = follow(factory(**float32_hyperparameters(**settings)))
    chex.assert_trees_all_close(injected, plain, rtol=1e-6)
    for name in ("mu", "nu", "bound"):
        mine, theirs = (optax.tree.get(s, name) for s in (state.inner_state, expected))
        chex.assert_trees_all_close(mine, theirs, rtol=2e-6)
    assert state.hyperparams["b3"] == np.float32(b3)


@pytest.mark.parametrize("factory", [adamod, adamodw])
def test_injected_b3_of_0(factory):
    """An array of 0 would keep a bound, and not be Adam."""
    with pytest.raises(ValueError, match=r"b3 is an array of 0.*static_args='b3'"):
        optax.inject_hyperparams(factory)(0.1, b3=0).init(PARAMS)
    inject = optax.inject_hyperparams(factory, static_args="b3")
    injected, state = follow(inject(0.1, b3=0))
    plain, _ = follow(factory(0.1, b3=0))
    chex.assert_trees_all_close(injected, plain, rtol=1e-5)
    assert optax.tree.get(state, "bound") is None


def test_restarted_schedules_warm_up():
    """Inside the schedule, or by the one count that inject_hyperparams has."""

    def restarted(tx, edit=lambda state: state):
        _, state = follow(tx, steps=20)
        updates, _ = tx.update(GRADIENTS, edit(state), PARAMS)
        return np.abs(updates["b"])

    once = optax.cosine_decay_schedule(0.1, 20)
    expected = restarted(adamod(optax.join_schedules([once, once], [20]), b3=0.9))
    assert np.all(expected < 0.04)
    tx = optax.inject_hyperparams(adamod, static_args="b3")(once, b3=0.9)
    first = tx.init(PARAMS).hyperparams_states
    actual = restarted(tx, lambda state: state._replace(hyperparams_states=first))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    # What the page warns of: the schedule's own count alone.
    start = optax.ScaleByScheduleState(jnp.int32(0))
    unwarmed = restarted(adamod(once, b3=0.9), lambda state: (state[0], start))
    np.testing.assert_allclose(unwarmed, 0.1, rtol=1e-3)


def test_injected_schedule_and_dtypes():
    schedule = optax.linear_schedule(0.0, 0.1, 3)
    injected, state = follow(
        optax.inject_hyperparams(adamod)(schedule, b3=0.5, mu_dtype="bfloat16")
    )
    plain, _ = follow(adamod(schedule, b3=0.5, mu_dtype="bfloat16"))
    chex.assert_trees_all_close(injected, plain, rtol=1e-5)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.bfloat16


def test_static_b3_is_exact():
    def bound(tx):
        return optax.tree.get(follow(tx)[1], "bound")

    expected = bound(adamod(0.1))
    inject = optax.inject_hyperparams(adamod, static_args=("b1", "b2", "b3", "eps"))
    chex.assert_trees_all_close(bound(inject(0.1)), expected, rtol=1e-6)
    inexact = bound(optax.inject_hyperparams(adamod)(0.1))
    assert np.all(np.abs(inexact["b"] / expected["b"] - 1) > 1e-5)


def test_injected_hyperparameters_with_half_precision_parameters():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADIENTS)
    inject = optax.inject_hyperparams(adamod, hyperparam_dtype=jnp.float32)
    injected, _ = follow(inject(0.1, b3=0.5), params=params, gradients=gradients)
    plain, _ = follow(adamod(0.1, b3=0.5), params=params, gradients=gradients)
    chex.assert_trees_all_equal_dtypes(injected, params)
    # One unit in bfloat16's last place: the updates are float32 and bfloat16.
    chex.assert_trees_all_close(injected, plain, rtol=2**-7)


def test_half_precision_decay_rates_are_refused():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    with pytest.raises(
        TypeError, match=r"b1 was given as an array of bfloat16.*hyperparam_dtype"
    ):
        optax.inject_hyperparams(adamod)(0.1).init(params)


def test_hyperparameters_change_while_training():
    tx = optax.inject_hyperparams(adamod)(0.1)
    state = tx.init(PARAMS)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    _, state = update(GRADIENTS, state, PARAMS)
    before, _ = update(GRADIENTS, state, PARAMS)
    # Strongly typed, as the state is: a Python float would be another trace.
    state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
    after, _ = update(GRADIENTS, state, PARAMS)
    assert np.all(np.abs(after["b"]) > 1.1 * np.abs(before["b"]))


@FACTORIES
def test_gradient_accumulation(factory):
    tx = optax.MultiSteps(factory(0.1), every_k_schedule=3)
    halves = jax.tree.map(lambda g: np.stack([0.5 * g, g, 1.5 * g]), GRADIENTS)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for i in range(6):
        gradients = jax.tree.map(lambda g, i=i: g[i % 3], halves)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    expected, inner_state = follow(factory(0.1), steps=2)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    # The update does not depend on the gradients' unit, so compare what does.
    chex.assert_trees_all_close(state.inner_opt_state, inner_state, rtol=1e-5)


def test_masked_leaves_pass_through():
    tx = optax.masked(scale_by_adamod(), {"w": True, "b": False})
    state = tx.init(PARAMS)
    assert isinstance(state.inner_state.mu["b"], optax.MaskedNode)
    updates, state = tx.update(GRADIENTS, state, PARAMS)
    chex.assert_trees_all_equal(updates["b"], GRADIENTS["b"])
    chex.assert_trees_all_equal(
        updates["w"],
        scale_by_adamod().update(
            {"w": GRADIENTS["w"]}, scale_by_adamod().init({"w": PARAMS["w"]})
        )[0]["w"],
    )


def test_partition_leaves_integers_alone():
    params = {**PARAMS, "steps": np.int32(3)}
    gradients = {**GRADIENTS, "steps": np.int32(0)}
    tx = optax.partition(
        {"train": adamod(0.1), "freeze": optax.set_to_zero()},
        {"w": "train", "b": "train", "steps": "freeze"},
    )
    actual, _ = follow(tx, params=params, gradients=gradients)
    assert actual.pop("steps") == 3
    chex.assert_trees_all_close(actual, follow(adamod(0.1))[0])


def test_non_finite_gradients_propagate_as_in_adam():
    for bad in (np.nan, np.inf):
        gradients = {**GRADIENTS, "b": np.asarray([1.0, bad, 1.0], np.float32)}
        ours, _ = follow(adamod(0.1), gradients=gradients)
        adam, _ = follow(optax.adam(0.1), gradients=gradients)
        chex.assert_trees_all_equal(
            jax.tree.map(np.isnan, ours), jax.tree.map(np.isnan, adam)
        )
        assert np.isnan(ours["b"]).tolist() == [False, True, False]


def test_apply_if_finite_skips_a_bad_step():
    tx = optax.apply_if_finite(adamod(0.1), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    bad = {**GRADIENTS, "w": np.full((2, 3), np.nan, np.float32)}
    params, state = PARAMS, tx.init(PARAMS)
    for gradients in (GRADIENTS, bad, GRADIENTS, bad, bad, GRADIENTS):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert state.total_notfinite == 3
    expected, inner = follow(adamod(0.1), steps=3)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-6)


def test_lookahead():
    tx = optax.lookahead(adamod(0.1), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    fast, _ = follow(adamod(0.1), steps=2)
    midway = jax.tree.map(lambda a, b: (a + b) / 2, PARAMS, fast)
    chex.assert_trees_all_close(params.slow, midway, rtol=1e-6)


def test_chain_with_clipping():
    tx = optax.chain(optax.clip_by_global_norm(0.1), adamod(0.1))
    scale = 0.1 / optax.tree.norm(GRADIENTS)
    assert scale < 0.1
    params, state = follow(tx)
    expected, expected_state = follow(
        adamod(0.1), gradients=optax.tree.scale(scale, GRADIENTS)
    )
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    chex.assert_trees_all_close(state[1], expected_state, rtol=1e-5)


def test_state_is_found_and_mapped():
    tx = optax.chain(optax.clip(1.0), adamodw(0.1))
    _, state = follow(tx)
    assert optax.tree.get(state, "count") == 4
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "bound"), PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    for name in ("mu", "nu", "bound"):
        chex.assert_trees_all_equal(
            optax.tree.get(doubled, name),
            optax.tree.scale(2, optax.tree.get(state, name)),
        )
    assert optax.tree.get(doubled, "count") == 4


def rosenbrock(params):
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def parabola(params):
    return sum(
        jnp.sum(jnp.abs(p - target) ** 2)
        for p, target in zip((params["x"], params["y"]), (0.7, -0.3), strict=True)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("convention", ["paper", "torch"])
@pytest.mark.parametrize(
    ("objective", "start", "goal", "learning_rate", "steps"),
    [
        (parabola, (-1.0, 2.0), (0.7, -0.3), 0.1, 1000),
        (rosenbrock, (-0.5, 0.5), (1.0, 1.0), 0.1, 4000),
    ],
    ids=["parabola", "rosenbrock"],
)
def test_convergence(objective, start, goal, learning_rate, steps, convention, dtype):
    if dtype == jnp.complex64 and objective is rosenbrock:
        # The real function of both parts, whose minimum is at the same place.
        def loss(params):
            real, imaginary = (
                rosenbrock(jax.tree.map(part, params)) for part in (jnp.real, jnp.imag)
            )
            return real + imaginary

        goal = tuple(x + 1j * x for x in goal)
        start = tuple(x + 1j * x for x in start)
    else:
        loss = objective
    params = dict(zip("xy", (jnp.asarray(x, dtype) for x in start), strict=True))
    tx = adamod(
        optax.cosine_decay_schedule(learning_rate, steps),
        b3=0.99,
        convention=convention,
    )

    def step(carry, _):
        params, state = carry
        gradients = jax.tree.map(jnp.conj, jax.grad(loss)(params))
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(
        (params, tx.init(params))
    )
    chex.assert_trees_all_close(
        params,
        {k: jnp.asarray(v, dtype) for k, v in zip("xy", goal, strict=True)},
        rtol=1e-2,
    )
