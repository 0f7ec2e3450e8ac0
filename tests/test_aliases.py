"""Do the aliases equal their chains, and Adam where AdaMod is Adam?"""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_few_units_apart
from optax_adamod import adamod, adamodw, scale_by_adamod

PARAMS = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": np.ones(4, np.float32),
}

# Optax forms 1 - b**t in the default precision: equal to 1e-10 in 64-bit mode only.
WIDE = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)


def final(tx, params=PARAMS, steps=20):
    """Parameters after some steps down a loss with several minima."""

    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(lambda p: jnp.sin(3 * p) + 0.1 * p**2, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert not np.allclose(params["b"], PARAMS["b"], atol=1e-3)
    return params


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20)


@pytest.mark.parametrize(
    ("learning_rate", "settings"),
    [
        (0.1, {}),
        (SCHEDULE, {}),
        (0.1, {"nesterov": True}),
        (SCHEDULE, {"eps_root": 1e-3}),
        (SCHEDULE, {"b1": 0.5, "b2": 0.9, "eps": 1e-3}),
    ],
    ids=["constant", "schedule", "nesterov", "eps_root", "others"],
)
def test_without_memory_it_is_adam(learning_rate, settings, x64):
    chex.assert_trees_all_close(
        final(adamod(learning_rate, b3=0.0, **settings), WIDE),
        final(optax.adam(learning_rate, **settings), WIDE),
        atol=1e-10,
    )


@pytest.mark.parametrize(
    "mask", [None, {"w": True, "b": False}, lambda p: {"w": False, "b": True}]
)
def test_without_memory_it_is_adamw(mask, x64):
    chex.assert_trees_all_close(
        final(adamodw(SCHEDULE, b3=0.0, weight_decay=0.3, mask=mask), WIDE),
        final(optax.adamw(SCHEDULE, weight_decay=0.3, mask=mask), WIDE),
        atol=1e-10,
    )


def test_decay_is_masked():
    decayed = final(adamodw(0.1, weight_decay=0.3))
    masked = final(adamodw(0.1, weight_decay=0.3, mask={"w": True, "b": False}))
    plain = final(adamod(0.1))
    assert_few_units_apart(masked["w"], decayed["w"])
    assert_few_units_apart(masked["b"], plain["b"])
    assert np.all(decayed["b"] < plain["b"])


def test_decay_follows_a_schedule():
    scheduled = final(adamodw(0.1, weight_decay=lambda count: 0.3))
    chex.assert_trees_all_close(scheduled, final(adamodw(0.1, weight_decay=0.3)))


@pytest.mark.parametrize("convention", ["paper", "torch"])
def test_aliases_are_chains(convention):
    settings = {"b1": 0.8, "b2": 0.99, "b3": 0.9, "convention": convention}
    rule = scale_by_adamod(**settings, bound_learning_rate=SCHEDULE)
    step = optax.scale_by_learning_rate(SCHEDULE)
    assert_few_units_apart(
        final(adamod(SCHEDULE, **settings)), final(optax.chain(rule, step))
    )
    assert_few_units_apart(
        final(adamodw(SCHEDULE, **settings, weight_decay=0.1)),
        final(optax.chain(rule, optax.add_decayed_weights(0.1), step)),
    )


def test_constant_learning_rate_cancels():
    chex.assert_trees_all_close(
        final(optax.chain(scale_by_adamod(b3=0.9), optax.scale_by_learning_rate(0.1))),
        final(adamod(0.1, b3=0.9)),
        rtol=1e-6,
        atol=1e-6,
    )


def test_schedule_after_the_bound_is_another_algorithm():
    outside = optax.chain(
        scale_by_adamod(b3=0.9), optax.scale_by_learning_rate(SCHEDULE)
    )
    inside = final(adamod(SCHEDULE, b3=0.9))
    assert np.abs(final(outside)["w"] - inside["w"]).max() > 1e-2


def test_zero_learning_rate_leaves_parameters():
    tx = adamod(lambda count: jnp.where(count < 3, 0.0, 0.1))
    params, state = jnp.ones(3), tx.init(jnp.ones(3))
    for step in range(5):
        updates, state = tx.update(jnp.ones(3), state)
        assert np.all(updates == 0) if step < 3 else np.all(updates < 0)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite(params)


def test_count_saturates():
    tx = scale_by_adamod()
    state = tx.init(jnp.ones(2))
    state = state._replace(count=jnp.asarray(np.iinfo(np.int32).max - 1, jnp.int32))
    for _ in range(3):
        updates, state = tx.update(jnp.ones(2), state)
        chex.assert_tree_all_finite(updates)
        assert np.all(updates > 0)
    assert state.count == np.iinfo(np.int32).max


def test_signatures_agree_with_each_other_and_with_optax():
    def parameters(f):
        return {
            k: v.replace(annotation=None)
            for k, v in inspect.signature(f).parameters.items()
        }

    rule, plain, decayed = map(parameters, (scale_by_adamod, adamod, adamodw))
    assert {**rule, **plain} == {**rule, "learning_rate": plain["learning_rate"]}
    assert set(rule) - set(plain) == {"bound_learning_rate"}
    assert {**decayed, **plain} == decayed
    assert list(decayed) == [
        "learning_rate", "b1", "b2", "b3", "eps", "eps_root", "mu_dtype",
        "weight_decay", "mask", "nesterov", "nu_dtype", "bound_dtype", "convention",
    ]  # fmt: skip
    for ours, theirs in ((plain, optax.adam), (decayed, optax.adamw)):
        for name, parameter in parameters(theirs).items():
            assert ours[name] == parameter


def documented_arguments(f):
    """The entries of a docstring's Args, by name."""
    doc = inspect.getdoc(f) or ""
    (section,) = re.findall(r"^Args:\n(.*?\n)\n", doc, re.DOTALL | re.MULTILINE)
    entry = r"^  (\w+): (.*?)(?=^  \w|\Z)"
    return dict(re.findall(entry, section, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("f", [scale_by_adamod, adamod, adamodw])
def test_every_argument_is_documented(f):
    assert list(documented_arguments(f)) == list(inspect.signature(f).parameters)
    for title in ("Returns:", "Raises:", "Examples:", "References:"):
        assert f"\n{title}\n" in (inspect.getdoc(f) or "")


def test_shared_arguments_are_described_in_the_same_words():
    rule, plain, decayed = map(documented_arguments, (scale_by_adamod, adamod, adamodw))
    assert plain.items() <= decayed.items()
    for name in ("b1", "b2", "b3", "convention", "nesterov"):
        assert rule[name] == plain[name]
