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

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
OTHERS = dict(b1=0.5, b2=0.9, eps=1e-3, eps_root=1e-3, weight_decay=0.3)
DECAY = dict(weight_decay=lambda count: 0.3 / (1 + count), nesterov=True)


@pytest.mark.parametrize(
    ("ours", "adam", "learning_rate", "settings"),
    [
        (adamod, optax.adam, 0.1, dict(nesterov=True)),
        (adamodw, optax.adamw, SCHEDULE, OTHERS | dict(mask={"w": True, "b": False})),
        (adamodw, optax.adamw, 0.1, DECAY | dict(mask=lambda p: {"w": 0, "b": True})),
    ],
    ids=["adam", "others", "decay"],
)
def test_without_memory_it_is_adam(ours, adam, learning_rate, settings, x64):
    chex.assert_trees_all_close(
        final(ours(learning_rate, b3=0.0, **settings), WIDE),
        final(adam(learning_rate, **settings), WIDE),
        atol=1e-10,
    )


def test_aliases_are_chains():
    settings = dict(b1=0.8, b2=0.99, b3=0.9, convention="torch")
    chain = optax.chain(
        scale_by_adamod(**settings, bound_learning_rate=SCHEDULE),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(SCHEDULE),
    )
    alias = adamodw(SCHEDULE, **settings, weight_decay=0.1)
    assert_few_units_apart(final(alias), final(chain))
    # A constant learning rate cancels.
    chain = optax.chain(scale_by_adamod(b3=0.9), optax.scale_by_learning_rate(0.1))
    assert_few_units_apart(final(adamod(0.1, b3=0.9)), final(chain))


def test_count_saturates():
    tx = scale_by_adamod()
    last = np.iinfo(np.int32).max
    state = tx.init(jnp.ones(2))._replace(count=jnp.int32(last - 1))
    for _ in range(2):
        updates, state = tx.update(jnp.ones(2), state)
        assert state.count == last
        assert np.all((updates > 0) & np.isfinite(updates))


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


def test_arguments_are_documented_in_the_same_words():
    factories = scale_by_adamod, adamod, adamodw
    rule, plain, decayed = map(documented_arguments, factories)
    for f, arguments in zip(factories, (rule, plain, decayed), strict=True):
        assert list(arguments) == list(inspect.signature(f).parameters)
        for title in ("Returns:", "Raises:", "Examples:", "References:"):
            assert f"\n{title}\n" in (inspect.getdoc(f) or "")
    assert plain.items() <= decayed.items()
    for name in ("b1", "b2", "b3", "convention", "nesterov"):
        assert rule[name] == plain[name]
