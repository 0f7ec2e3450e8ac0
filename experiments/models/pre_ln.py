"""A Pre-LN Transformer language model: that of the examples, normalised elsewhere."""

import jax
from flax import nnx

from examples.common.transformer import BYTES, Block, Transformer


class PreBlock(Block):
    """Attention and feed-forward, the input of each normalised (Pre-LN)."""

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.contract(nnx.relu(self.expand(self.feed_forward_norm(x))))


class PreTransformer(Transformer):
    """Predicts the next token; its last layer reads a normalised sum."""

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        context: int,
        variance: float | None = None,
        vocabulary: int = BYTES,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(0, width, heads, context, 1.0, vocabulary, rngs=rngs)
        variance = 1 / depth if variance is None else variance
        self.blocks = nnx.List(
            [PreBlock(variance, width, heads, rngs=rngs) for _ in range(depth)]
        )
        self.logits = nnx.Sequential(nnx.LayerNorm(width, rngs=rngs), self.logits)
