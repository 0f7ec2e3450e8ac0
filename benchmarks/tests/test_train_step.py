"""Do training steps train the models that they name, and is their memory counted?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import train_step, whole_step
from benchmarks.common import optimizers, trees
from examples.common.resnet import ResNet


@pytest.mark.usefixtures("quick_compilation")
def test_training_steps_train():
    training = train_step.Training("GPT-2 tiny", optimizers.ADAMOD, 2)
    before = jax.tree.map(np.asarray, training.state[0])
    training.run(3)
    params, opt_state, _ = training.state
    assert opt_state[0].count == 3
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, params)
    assert all(jax.tree.leaves(moved))
    sizes = [x.size for x in jax.tree.leaves(params)]
    assert trees.size(training.parameters) == sum(sizes)


@pytest.mark.parametrize(
    ("model", "leaves", "parameters"),
    [("Transformer", 100, 1_263_616), ("ResNet-34", 110, 21_282_122)],
)
def test_models_have_their_sizes_and_gradients(model, leaves, parameters):
    def step():
        params, rest, loss, batch = train_step.MODELS[model](2)
        return (params, rest), jax.grad(loss, has_aux=True)(params, rest, *batch)

    before, after = jax.eval_shape(step)
    assert before == after
    sizes = [x.size for x in jax.tree.leaves(before[0])]
    assert (len(sizes), sum(sizes)) == (leaves, parameters)


def test_resnet_halves_images():
    model = nnx.eval_shape(lambda: ResNet((1, 1), 4, 1, 3, rngs=nnx.Rngs(0)))
    features = jnp.ones((2, 8, 8, 4))
    halved = nnx.eval_shape(lambda m: m.blocks[1](m.blocks[0](features)), model)
    assert halved.shape == (2, 4, 4, 8)


@pytest.mark.usefixtures("quick_compilation")
def test_whole_steps_train_and_are_weighed(tmp_path):
    name = optimizers.ADAMOD_7_BYTES
    options = whole_step.Options((name,), tokens=32, small=True, output=tmp_path)
    facts = whole_step.train(name, dataclasses.replace(options, steps=2))
    losses = [float(x) for x in facts["losses"].split()]
    assert losses == pytest.approx([np.log(256)] * 2, rel=0.05)
    ((row,),) = whole_step.main(options).values()
    held = 1e9 * row["arguments, GB"] / 393_856
    assert held == pytest.approx(2 + 3 * (1 + 1 / 128), abs=0.01)
    assert row["peak, GB"] > row["arguments, GB"]
    assert row["fits 80 GB"] == "yes"
    assert "32 tokens" in (tmp_path / "whole_step.md").read_text()
