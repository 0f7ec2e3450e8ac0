"""The encoder-decoder Transformer of fairseq's transformer_iwslt_de_en, in Flax NNX.

Post-LN, sinusoidal positions, embeddings scaled by sqrt(width), the decoder's input and
output embeddings shared, and fairseq's initialisation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.translation import END, PAD

XAVIER = nnx.initializers.xavier_uniform()
# Query, key and value as one Xavier-initialised matrix of width by 3 * width.
PROJECTION = nnx.initializers.variance_scaling(0.5, "fan_in", "uniform")
LAYER_NORM_EPSILON = 1e-5

KeysValues = tuple[jax.Array, jax.Array]  # each [batch, length, heads, width / heads]


class Cache(NamedTuple):
    """What the decoder keeps of a batch while it writes, a pair for each layer."""

    written: list[KeysValues]  # of the target so far
    source: list[KeysValues]
    source_mask: jax.Array  # bool[batch, 1, 1, source length]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Returns sines and cosines of each position: float32[length, width]."""
    half = width // 2
    frequencies = np.exp(-math.log(10_000) / (half - 1) * np.arange(half))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1, dtype=np.float32)


class Attention(nnx.Module):
    """Attention of several heads; keys and values are made apart, to be kept."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Linear(width, width, kernel_init=PROJECTION, rngs=rngs)
        self.key_value = nnx.Linear(width, 2 * width, kernel_init=PROJECTION, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=XAVIER, rngs=rngs)

    def keys_values(self, x: jax.Array) -> KeysValues:
        keys, values = jnp.split(self.key_value(x), 2, axis=-1)
        return self._split(keys), self._split(values)

    def __call__(
        self, x: jax.Array, keys_values: KeysValues, mask: jax.Array
    ) -> jax.Array:
        attended = jax.nn.dot_product_attention(
            self._split(self.query(x)), *keys_values, mask=mask
        )
        return self.out(attended.reshape(x.shape))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class Residual(nnx.Module):
    """Normalises the sum of an input and a layer's output, which it drops out."""

    def __init__(self, width: int, dropout: float, *, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, output: jax.Array) -> jax.Array:
        return self.norm(x + self.dropout(output))


class FeedForward(nnx.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.expand = nnx.Linear(width, hidden, kernel_init=XAVIER, rngs=rngs)
        self.contract = nnx.Linear(hidden, width, kernel_init=XAVIER, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.contract(nnx.relu(self.expand(x)))


class EncoderLayer(nnx.Module):
    """Attention to the source, then feed-forward."""

    def __init__(
        self, width: int, hidden: int, heads: int, dropout: float, *, rngs: nnx.Rngs
    ):
        self.attention = Attention(width, heads, rngs=rngs)
        self.attended = Residual(width, dropout, rngs=rngs)
        self.feed_forward = FeedForward(width, hidden, rngs=rngs)
        self.fed = Residual(width, dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attended(x, self.attention(x, self.attention.keys_values(x), mask))
        return self.fed(x, self.feed_forward(x))


class DecoderLayer(nnx.Module):
    """Attention to the target so far and to the source, then feed-forward."""

    def __init__(
        self, width: int, hidden: int, heads: int, dropout: float, *, rngs: nnx.Rngs
    ):
        self.target_attention = Attention(width, heads, rngs=rngs)
        self.target_attended = Residual(width, dropout, rngs=rngs)
        self.source_attention = Attention(width, heads, rngs=rngs)
        self.source_attended = Residual(width, dropout, rngs=rngs)
        self.feed_forward = FeedForward(width, hidden, rngs=rngs)
        self.fed = Residual(width, dropout, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        target: KeysValues,
        target_mask: jax.Array,
        source: KeysValues,
        source_mask: jax.Array,
    ) -> jax.Array:
        x = self.target_attended(x, self.target_attention(x, target, target_mask))
        x = self.source_attended(x, self.source_attention(x, source, source_mask))
        return self.fed(x, self.feed_forward(x))


class Translator(nnx.Module):
    """Reads a source and predicts the next token of its translation everywhere."""

    def __init__(
        self,
        vocabulary: int,
        depth: int,
        width: int,
        hidden: int,
        heads: int,
        dropout: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.width = width
        embedding = nnx.initializers.normal(width**-0.5)
        self.source_tokens, self.target_tokens = (
            nnx.Embed(vocabulary, width, embedding_init=embedding, rngs=rngs)
            for _ in range(2)
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        layer = width, hidden, heads, dropout
        self.encoder = nnx.List([EncoderLayer(*layer, rngs=rngs) for _ in range(depth)])
        self.decoder = nnx.List([DecoderLayer(*layer, rngs=rngs) for _ in range(depth)])

    def __call__(
        self, source: jax.typing.ArrayLike, target: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns logits of the target.

        Args:
          source: int32[batch, source length], closed by END, then PAD.
          target: int32[batch, target length], likewise.

        Returns:
          float32[batch, target length, vocabulary]: of each token of ``target``, given
          those before it.
        """
        memory, source_mask = self.encode(jnp.asarray(source))
        before = jnp.roll(jnp.asarray(target), 1, axis=1).at[:, 0].set(END)
        x = self.embed(self.target_tokens, before)
        length = x.shape[1]
        # Nothing looks ahead, so no token of the target sees the PADs that follow it.
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        for layer in self.decoder:
            x = layer(
                x,
                layer.target_attention.keys_values(x),
                causal,
                layer.source_attention.keys_values(memory),
                source_mask,
            )
        return self.target_tokens.attend(x)

    def embed(
        self, tokens: nnx.Embed, chosen: jax.Array, start: jax.typing.ArrayLike = 0,
        positions: int | None = None,
    ) -> jax.Array:  # fmt: skip
        """Returns the scaled embeddings plus positions, counted from ``start``."""
        length = chosen.shape[1]
        table = jnp.asarray(sinusoids(positions or length, self.width))
        rows = jax.lax.dynamic_slice_in_dim(table, start, length)
        return self.dropout(math.sqrt(self.width) * tokens(chosen) + rows[None])

    def encode(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns what the encoder makes of the source, and where it is not PAD."""
        mask = (source != PAD)[:, None, None, :]
        x = self.embed(self.source_tokens, source)
        for layer in self.encoder:
            x = layer(x, mask)
        return x, mask

    def start(self, source: jax.typing.ArrayLike, length: int) -> Cache:
        """Reads the source; returns the cache for a translation of ``length``."""
        memory, mask = self.encode(jnp.asarray(source))
        encoded = [x.source_attention.keys_values(memory) for x in self.decoder]
        keys, _ = encoded[0]
        nothing = jnp.zeros((keys.shape[0], length, *keys.shape[2:]), keys.dtype)
        return Cache([(nothing, nothing) for _ in encoded], encoded, mask)

    def step(
        self, tokens: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Returns float32[batch, vocabulary], the logits after one more token.

        Args:
          tokens: int32[batch], the tokens at ``position`` of the decoder's input.
          position: int32[], the same for the whole batch.
          cache: Of the positions before.

        Returns:
          The logits, and the cache with this position.
        """
        length = cache.written[0][0].shape[1]
        x = self.embed(self.target_tokens, tokens[:, None], position, length)
        mask = (jnp.arange(length) <= position)[None, None, None, :]
        written = []
        for layer, before, source in zip(
            self.decoder, cache.written, cache.source, strict=True
        ):
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
                for old, new in zip(
                    before, layer.target_attention.keys_values(x), strict=True
                )
            )
            written.append((keys, values))
            x = layer(x, (keys, values), mask, source, cache.source_mask)
        return self.target_tokens.attend(x)[:, 0], cache._replace(written=written)


def label_smoothed_loss(
    logits: jax.Array, target: jax.typing.ArrayLike, smoothing: float
) -> jax.Array:
    """Returns the mean cross-entropy in nats per token that is not PAD.

    Args:
      logits: float32[batch, length, vocabulary].
      target: int32[batch, length].
      smoothing: The probability that is spread evenly over the vocabulary.

    Returns:
      float32[].
    """
    target = jnp.asarray(target)
    labels = optax.smooth_labels(nnx.one_hot(target, logits.shape[-1]), smoothing)
    losses = optax.softmax_cross_entropy(logits, labels)
    is_token = target != PAD
    return jnp.sum(losses, where=is_token) / jnp.sum(is_token)
