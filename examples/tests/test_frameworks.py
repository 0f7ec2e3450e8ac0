"""Do the examples of each framework learn, and keep AdaMod's state?"""

import re

import chex
import equinox as eqx
import jax
import numpy as np
import optax
import pytest

from examples import equinox_mlp, flax_linen, plain_jax

STEPS = 150


def linen():
    state = flax_linen.main(steps=STEPS)
    assert int(state.step) == STEPS
    return state.params, state.opt_state


def equinox():
    model, opt_state = equinox_mlp.main(steps=STEPS)
    return eqx.filter(model, eqx.is_inexact_array), opt_state


def plain():
    return plain_jax.main(steps=STEPS)


@pytest.mark.parametrize("train", [linen, equinox, plain])
def test_it_learns_and_keeps_the_averages(train, capsys):
    params, opt_state = train()
    ((loss, accuracy),) = re.findall(
        r"^loss ([\d.]+), test accuracy ([\d.]+)%$", capsys.readouterr().out, re.M
    )
    assert float(loss) < 1.0  # ln 10 = 2.3 before the first step
    assert float(accuracy) > 85
    assert sum(x.size for x in jax.tree.leaves(params)) == 65 * 128 + 129 * 10
    for name in ("mu", "nu", "bound"):
        chex.assert_trees_all_equal_shapes_and_dtypes(
            optax.tree.get(opt_state, name), params
        )
    # Even a weight without a gradient has a rate, 1 / eps, of which the bound knows.
    for bound in jax.tree.leaves(optax.tree.get(opt_state, "bound")):
        assert np.all(np.asarray(bound) > 0)
    counts = [int(x) for _, x in optax.tree.get_all_with_path(opt_state, "count")]
    assert counts == [STEPS, STEPS]  # of AdaMod, and of the schedule
