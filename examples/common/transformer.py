"""A Post-LN Transformer language model, in Flax NNX."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

BYTES = 256


class Block(nnx.Module):
    """Attention and feed-forward, each normalised after its residual sum (Post-LN).

    The layers that feed the sums start with ``variance`` times that of the others.
    """

    def __init__(
        self,
        variance: float,
        width: int,
        heads: int,
        dtype: DTypeLike | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        residual = nnx.initializers.variance_scaling(variance, "fan_in", "normal")
        self.attention = nnx.MultiHeadAttention(
            heads,
            width,
            out_kernel_init=residual,
            decode=False,
            dtype=dtype,
            deterministic=True,
            rngs=rngs,
        )
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.contract = nnx.Linear(
            4 * width, width, kernel_init=residual, dtype=dtype, rngs=rngs
        )
        self.feed_forward_norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.feed_forward_norm(x + self.contract(nnx.relu(self.expand(x))))


class Transformer(nnx.Module):
    """Predicts the next token, by default a byte, at every position.

    Unless ``variance`` is given, the layers that feed the residual sums start
    1/sqrt(depth) as large as the others, so that all blocks together add as much
    variance to the residual stream as one would. Matrices are multiplied in ``dtype``,
    by default that of the parameters.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        context: int,
        variance: float | None = None,
        vocabulary: int = BYTES,
        dtype: DTypeLike | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        variance = 1 / depth if variance is None else variance
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(variance, width, heads, dtype, rngs=rngs) for _ in range(depth)]
        )
        self.logits = nnx.Linear(width, vocabulary, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.logits(x)


def next_token_losses(model: nnx.Module, windows: jax.Array) -> jax.Array:
    """Returns the loss of every token but the first, in nats: float32[batch, N - 1]."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), windows[:, 1:]
    )
