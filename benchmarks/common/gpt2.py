"""GPT-2 in plain JAX, of the parameters of :func:`benchmarks.trees.gpt2`."""

import jax
import jax.numpy as jnp

from benchmarks.common import trees

Params = dict[str, jax.Array]


def initialised(tree: trees.Tree) -> Params:
    """Returns parameters: norms of 1, biases of 0, and small random numbers."""

    def fresh(name: str, leaf: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.full(leaf.shape, float(name.endswith("scale")), leaf.dtype)
        return 0.02 * jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)

    return {name: fresh(name, leaf, i) for i, (name, leaf) in enumerate(tree.items())}


def _normalised(x: jax.Array, params: Params, name: str) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide -= wide.mean(-1, keepdims=True)
    wide *= jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    scale, bias = (params[f"{name}/{part}"] for part in ("scale", "bias"))
    return (wide * scale[None, None] + bias[None, None]).astype(x.dtype)


def _linear(x: jax.Array, params: Params, name: str) -> jax.Array:
    kernel, bias = (params[f"{name}/{part}"] for part in ("kernel", "bias"))
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None, None]


def loss(params: Params, tokens: jax.Array) -> jax.Array:
    """Returns the mean loss of the tokens but the first; activations are bfloat16."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    table = params["tokens"].astype(jnp.bfloat16)
    positions = params["positions"][: inputs.shape[1]].astype(jnp.bfloat16)
    x = table[inputs] + positions[None]
    block = 0
    while f"block{block}/norm1/scale" in params:
        name = f"block{block}"
        y = _linear(
            _normalised(x, params, f"{name}/norm1"), params, f"{name}/attention"
        )
        heads = (*y.shape[:2], -1, 64)
        query, key, value = (part.reshape(heads) for part in jnp.split(y, 3, -1))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += _linear(y.reshape(x.shape), params, f"{name}/projection")
        y = _linear(_normalised(x, params, f"{name}/norm2"), params, f"{name}/expand")
        x += _linear(jax.nn.gelu(y), params, f"{name}/contract")
        block += 1
    logits = (_normalised(x, params, "norm") @ table.T).astype(jnp.float32)
    right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - right).mean()
