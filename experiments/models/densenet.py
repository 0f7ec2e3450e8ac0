"""DenseNets for small images, in Flax NNX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

MOMENTUM = 0.9  # of the statistics, as in the authors' PyTorch code


def normalised(inputs: int, outputs: int, size: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """Normalisation, ReLU and a convolution."""
    return nnx.Sequential(
        nnx.BatchNorm(inputs, momentum=MOMENTUM, rngs=rngs),
        nnx.relu,
        nnx.Conv(inputs, outputs, (size, size), use_bias=False, rngs=rngs),
    )


class DenseLayer(nnx.Module):
    """Appends ``growth`` channels to its input, made through a bottleneck."""

    def __init__(self, inputs: int, growth: int, *, rngs: nnx.Rngs):
        self.bottleneck = normalised(inputs, 4 * growth, 1, rngs)
        self.convolution = normalised(4 * growth, growth, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.convolution(self.bottleneck(x)), x], axis=-1)


class Transition(nnx.Module):
    """Halves channels and image."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.convolution = normalised(inputs, inputs // 2, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.avg_pool(self.convolution(x), (2, 2), strides=(2, 2))


class DenseNet(nnx.Module):
    """Blocks in which every layer sees all before it, with transitions between.

    ``blocks=(6, 12, 24, 16)`` and ``growth=32`` are DenseNet-121 in its CIFAR form.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        growth: int,
        channels: int,
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        features = 2 * growth
        self.stem = nnx.Conv(channels, features, (3, 3), use_bias=False, rngs=rngs)
        self.layers = nnx.List([])
        for index, count in enumerate(blocks):
            if index:
                self.layers.append(Transition(features, rngs=rngs))
                features //= 2
            for _ in range(count):
                self.layers.append(DenseLayer(features, growth, rngs=rngs))
                features += growth
        self.norm = nnx.BatchNorm(features, momentum=MOMENTUM, rngs=rngs)
        self.logits = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return self.logits(nnx.relu(self.norm(x)).mean(axis=(1, 2)))
