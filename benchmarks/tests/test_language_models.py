"""Are GPT-2 and Llama language models, whose tokens see no later ones?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import gpt2, llama, trees

VOCABULARY = 8
LLAMA = llama.SMALL._replace(vocabulary=VOCABULARY)


def test_llama_is_initialised_in_its_shapes():
    initialise = functools.partial(llama.initialised, LLAMA, "bfloat16")
    fresh = jax.eval_shape(initialise, jax.random.key(0))
    assert fresh == llama.shapes(LLAMA, "bfloat16")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("model", ["GPT-2", "Llama"])
def test_probabilities_of_all_continuations_add_up_to_one(model):
    """They would not if a token saw the one that it is to foretell."""
    if model == "GPT-2":
        params, loss = gpt2.initialised(trees.gpt2(1, 64, VOCABULARY)), gpt2.loss
    else:
        params = llama.initialised(LLAMA, "float32", jax.random.key(0))
        loss = functools.partial(llama.loss, heads=LLAMA.heads)
    tokens = jnp.indices((VOCABULARY,) * 3).reshape(3, -1).T  # all of three

    @jax.jit
    def losses(params):
        return jax.vmap(lambda x: loss(params, x[None]))(tokens)

    assert losses(params).mean() == pytest.approx(np.log(VOCABULARY), rel=0.05)
    params = jax.tree.map(lambda x: 5 * x, params)  # to see more of each other
    chances = jnp.exp(-2 * losses(params)).reshape((VOCABULARY,) * 3)
    np.testing.assert_allclose(chances.sum((1, 2)), 1, 1e-4)
    gradients = jax.jit(jax.grad(lambda params: losses(params).mean()))(params)
    assert all(x.any() for x in jax.tree.leaves(gradients)), "a parameter does nothing"
