"""Does the experiment on narrow averages train each of its cases, in their bytes?"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import low_precision
from experiments.common.nearest import float8_to_nearest
from experiments.common.training import Task, in_bfloat16
from optax_adamod import Float8Array, adamod

SIZES = {
    "float32": (12, 20),
    "8 bits": (3, 11),
    "8 bits, bfloat16 weights": (3, 7),
    "8 bits, rounded to nearest": (3, 11),
    "Adam": (8, 16),
    "Adam, bfloat16 weights": (4, 8),
}
CASES = tuple(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "words", "digits", "translation"])
def test_every_task_by_every_case(tmp_path, capsys, task):
    cases = CASES if task == "text" else CASES[2:3]
    options = low_precision.Options(
        task=task, steps=6, seeds=1, cases=cases, output=tmp_path
    )
    history = low_precision.main(options)
    printed = capsys.readouterr().out
    assert [run.optimizer for run in history] == list(cases)
    for name, size in SIZES.items():
        if name in cases:
            held, total = (
                float(x)
                for x in re.findall(rf"\| {name} \| ([\d.]+) \| ([\d.]+) \|", printed)[
                    0
                ]
            )
            assert (held, total) == pytest.approx(size, abs=0.1)
    # Every row is another run: rounding changes the losses, though not by much.
    finals = {run.optimizer: rows[-1]["loss"] for run, rows in history.items()}
    assert len(set(finals.values())) == len(history)
    adamods = [x for name, x in finals.items() if "Adam" not in name]
    assert max(adamods) - min(adamods) < 0.1


def test_weights_in_bfloat16_and_gradients_too():
    task = in_bfloat16(
        Task(
            create_model=lambda rngs: nnx.Linear(4, 2, rngs=rngs),
            loss=lambda model, batch: jnp.sum(model(batch["x"])),
            batches=lambda seed: [{"x": np.full((1, 4), 1 / 3, np.float32)}],
            steps=1,
            row_every=1,
        )
    )
    model = task.create_model(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    chex.assert_trees_all_equal_dtypes(
        params, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    )
    batch = task.batches(0)[0]
    loss, gradients = nnx.value_and_grad(task.loss)(model, batch)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}


def test_8_bits_to_nearest_are_kept_between_steps():
    """A step that is less than half a spacing leaves the code where it is."""
    gradients = {"w": jnp.linspace(0.1, 3.0, 128), "b": jnp.ones(3)}
    nearest = float8_to_nearest(adamod(0.1, b3=0.999))
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
