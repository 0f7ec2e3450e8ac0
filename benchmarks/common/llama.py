"""A Llama in plain JAX, whose layers are stacked: scanned, and rematerialised."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Size(NamedTuple):
    """Of a model."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int


LLAMA_2_7B = Size(32, 4096, 11008, 32, 32000)
SMALL = Size(2, 128, 256, 2, 256)


def shapes(size: Size, dtype: DTypeLike) -> dict[str, Any]:
    """Returns the parameters' shapes; those of all layers are one array."""
    layers, width, hidden, _, vocabulary = size

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "tokens": of(vocabulary, width),
        "blocks": {
            **{x: of(layers, width, width) for x in ("query", "key", "value", "out")},
            **{x: of(layers, width, hidden) for x in ("gate", "up")},
            "down": of(layers, hidden, width),
            **{x: of(layers, width) for x in ("attention_norm", "feed_forward_norm")},
        },
        "norm": of(width),
        "logits": of(width, vocabulary),
    }


def initialised(size: Size, dtype: DTypeLike, key: jax.Array) -> dict[str, Any]:
    """Returns parameters: norms of 1, and small random numbers."""

    def fresh(path: Any, shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if "norm" in path[-1].key:
            return jnp.ones(shape.shape, dtype)
        return 0.02 * jax.random.normal(key, shape.shape, dtype)

    tree = shapes(size, dtype)
    keys = jax.random.split(key, len(jax.tree.leaves(tree)))
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
    return jax.tree_util.tree_map_with_path(fresh, tree, keys)


def _normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    return (wide * scale[None, None]).astype(x.dtype)


def _rotated(x: jax.Array) -> jax.Array:
    """Rotates pairs of a head's numbers by angles that grow with the position."""
    half = x.shape[-1] // 2
    rates = 1e4 ** -(jnp.arange(half) / half)
    angles = jnp.outer(jnp.arange(x.shape[1]), rates)[None, :, None]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def _block(x: jax.Array, p: dict[str, jax.Array], heads: int) -> jax.Array:
    p = {name: value.astype(x.dtype) for name, value in p.items()}
    y = _normalised(x, p["attention_norm"])
    shape = (*y.shape[:2], heads, -1)
    query, key = (_rotated((y @ p[name]).reshape(shape)) for name in ("query", "key"))
    y = jax.nn.dot_product_attention(
        query, key, (y @ p["value"]).reshape(shape), is_causal=True
    )
    x += y.reshape(x.shape) @ p["out"]
    y = _normalised(x, p["feed_forward_norm"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def loss(params: dict[str, Any], tokens: jax.Array, heads: int) -> jax.Array:
    """Returns the mean loss of the tokens but the first; activations are bfloat16.

    Of each layer, and of the logits, the backward pass keeps the input alone.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    @jax.checkpoint
    def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return _block(x, p, heads), None

    @jax.checkpoint
    def losses(x: jax.Array, norm: jax.Array, weights: jax.Array) -> jax.Array:
        x = _normalised(x, norm)
        logits = (x @ weights.astype(x.dtype)).astype(jnp.float32)
        right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - right

    x = params["tokens"][inputs].astype(jnp.bfloat16)
    x, _ = jax.lax.scan(block, x, params["blocks"])
    return losses(x, params["norm"], params["logits"]).mean()
