"""ResNets for small images, in Flax NNX."""

from collections.abc import Sequence

import jax
from flax import nnx

MOMENTUM = 0.9  # of the statistics, as in the authors' PyTorch code


class Block(nnx.Module):
    """Two convolutions and a shortcut, which is projected where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        def convolution(inputs: int, size: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                inputs, outputs, (size, size), stride, use_bias=False, rngs=rngs
            )

        self.convolution1 = convolution(inputs, 3, stride)
        self.norm1 = nnx.BatchNorm(outputs, momentum=MOMENTUM, rngs=rngs)
        self.convolution2 = convolution(outputs, 3, 1)
        self.norm2 = nnx.BatchNorm(outputs, momentum=MOMENTUM, rngs=rngs)
        self.shortcut = nnx.List([])
        if inputs != outputs or stride != 1:
            self.shortcut = nnx.List(
                [
                    convolution(inputs, 1, stride),
                    nnx.BatchNorm(outputs, momentum=MOMENTUM, rngs=rngs),
                ]
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.convolution1(x)))
        y = self.norm2(self.convolution2(y))
        for layer in self.shortcut:
            x = layer(x)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """Stages of residual blocks, each of which after the first halves the image.

    ``blocks=(3, 4, 6, 3)`` and ``width=64`` are ResNet-34 in its CIFAR form.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        channels: int,
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs)
        self.blocks = nnx.List([])
        inputs = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                outputs = width * 2**stage
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(Block(inputs, outputs, stride, rngs=rngs))
                inputs = outputs
        self.logits = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.logits(x.mean(axis=(1, 2)))
