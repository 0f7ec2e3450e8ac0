"""Does the experiment on narrow averages train each of its cases, in their bytes?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.common.transformer import Transformer
from experiments import low_precision
from optax_adamod import Float8Array, adamod


@pytest.mark.slow
def test_low_precision_table(tmp_path, capsys):
    options = low_precision.Options(steps=20, depth=1, width=8, output=tmp_path)
    runs = low_precision.main(options)
    printed = capsys.readouterr().out
    model = Transformer(1, 8, low_precision.HEADS, 64, rngs=nnx.Rngs(0))
    total = optax.tree.size(nnx.state(model, nnx.Param))
    in_groups = (8 + 1) * 256  # of the logits alone the last dimension is 128 or more
    float8 = 12 - (12 - 3 * (1 + 1 / 128)) * in_groups / total
    sizes = (12, 6, float8, float8, 8, 6)
    for (name, losses), size in zip(runs.items(), sizes, strict=True):
        mean = np.mean(np.asarray(losses)[:, -low_precision.FINAL :])
        assert f"| {name} | {size:.2f} | {mean:.3f} |" in printed
    # Every row is another run: rounding changes the losses, though not by much.
    finals = [losses[0][-1] for losses in runs.values()]
    assert len(set(finals)) == len(runs)
    assert max(finals) - min(finals) < 0.1


def test_rounded_to_nearest_between_steps():
    """What a step reads is what the one before left in bfloat16, to nearest."""
    gradients = {"w": jnp.linspace(0.1, 3.0, 100)}
    tx = adamod(0.1, b3=0.9)
    nearest = low_precision.bfloat16_to_nearest(tx)
    state, expected = nearest.init(gradients), tx.init(gradients)

    def rounded(name):
        (average,) = jax.tree.leaves(optax.tree.get(expected, name))
        return {"w": average.astype(jnp.bfloat16)}

    for _ in range(3):
        updates, state = nearest.update(gradients, state)
        expected_updates, expected = tx.update(gradients, expected)
        chex.assert_trees_all_equal(updates, expected_updates)
        for name in ("mu", "nu", "bound"):
            average = rounded(name)
            chex.assert_trees_all_equal(optax.tree.get(state, name), average)
            wide = {"w": average["w"].astype(jnp.float32)}
            assert np.any(wide["w"] != optax.tree.get(expected, name)["w"])
            expected = optax.tree.set(expected, **{name: wide})
    assert optax.tree.get(state, "count") == 3


def test_8_bits_to_nearest_are_kept_between_steps():
    """A step that is less than half a spacing leaves the code where it is."""
    gradients = {"w": jnp.linspace(0.1, 3.0, 128), "b": jnp.ones(3)}
    nearest = low_precision.float8_to_nearest(adamod(0.1, b3=0.999))
    state = nearest.init(gradients)
    update = jax.jit(nearest.update)
    for _ in range(303):
        _, state = update(gradients, state)
    bound = optax.tree.get(state, "bound")
    assert bound["b"].dtype == jnp.float32
    assert isinstance(bound["w"], Float8Array)
    share = 1 - 0.999**303
    np.testing.assert_allclose(bound["b"], 0.1 * share, rtol=1e-3)
    stalled = bound["w"].dequantize() / (0.1 / gradients["w"])
    assert np.mean(stalled) < 0.5 * share
