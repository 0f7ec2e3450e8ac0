"""Trees of parameters, as shapes and one dtype: ``{name: jax.ShapeDtypeStruct}``."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = dict[str, jax.ShapeDtypeStruct]
Shapes = dict[str, tuple[int, ...]]


def _tree(shapes: Shapes, dtype: DTypeLike) -> Tree:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def size(tree: Tree) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in tree.values())


def equal_leaves(parameters: int, leaves: int, dtype: DTypeLike = jnp.float32) -> Tree:
    """Vectors of one size."""
    return _tree({f"leaf{i}": (parameters // leaves,) for i in range(leaves)}, dtype)


def equal_matrices(
    parameters: int, leaves: int, dtype: DTypeLike = jnp.float32
) -> Tree:
    """Matrices of one size, about square, with columns in groups of 128.

    They have fewer parameters than are asked for, by less than a row each.
    """
    each = parameters // leaves
    columns = max(1, round(each**0.5 / 128)) * 128
    if each < columns:
        return equal_leaves(parameters, leaves, dtype)
    shape = (each // columns, columns)
    return _tree({f"leaf{i}": shape for i in range(leaves)}, dtype)


def mixed_leaves(dtype: DTypeLike = jnp.float32) -> Tree:
    """Twelve leaves of unlike shapes: six matrices, four vectors, two of rank 3."""
    return _tree(
        {
            "embed": (32768, 2048),
            "query": (2048, 2048),
            "key": (2048, 512),
            "up": (2048, 8192),
            "down": (8192, 2048),
            "logits": (2048, 32768),
            "norm": (2048,),
            "wide_norm": (8192,),
            "bias": (4096,),
            "logits_bias": (32768,),
            "heads": (2048, 16, 128),
            "experts": (8, 2048, 1024),
        },
        dtype,
    )


def one_leaf(*shape: int, dtype: DTypeLike = jnp.float32) -> Tree:
    """One array of this shape."""
    return _tree({"kernel": shape}, dtype)


def resnet50(dtype: DTypeLike = jnp.float32) -> Tree:
    """ResNet-50: 25.6 million parameters."""
    shapes: Shapes = {}

    def convolution(name: str, size: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}/kernel"] = (size, size, inputs, outputs)
        shapes[f"{name}/scale"] = shapes[f"{name}/shift"] = (outputs,)

    convolution("stem", 7, 3, 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(
        zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)
    ):
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            convolution(f"{name}/reduce", 1, inputs, width)
            convolution(f"{name}/middle", 3, width, width)
            convolution(f"{name}/expand", 1, width, 4 * width)
            if block == 0:
                convolution(f"{name}/shortcut", 1, inputs, 4 * width)
            inputs = 4 * width
    shapes["logits/kernel"], shapes["logits/bias"] = (2048, 1000), (1000,)
    return _tree(shapes, dtype)


def gpt2_small(dtype: DTypeLike = jnp.float32) -> Tree:
    """GPT-2 small: 124.4 million parameters."""
    return gpt2(12, 768, 50257, dtype)


def gpt2(
    blocks: int, width: int, vocabulary: int, dtype: DTypeLike = jnp.float32
) -> Tree:
    """GPT-2 of this size."""
    shapes: Shapes = {"tokens": (vocabulary, width), "positions": (1024, width)}
    for block in range(blocks):
        for name, inputs, outputs in (
            ("attention", width, 3 * width),
            ("projection", width, width),
            ("expand", width, 4 * width),
            ("contract", 4 * width, width),
        ):
            shapes[f"block{block}/{name}/kernel"] = (inputs, outputs)
            shapes[f"block{block}/{name}/bias"] = (outputs,)
        for norm in ("norm1", "norm2"):
            for name in ("scale", "bias"):
                shapes[f"block{block}/{norm}/{name}"] = (width,)
    shapes["norm/scale"] = shapes["norm/bias"] = (width,)
    return _tree(shapes, dtype)


def llama3(parameters: str, dtype: DTypeLike = jnp.float32) -> Tree:
    """Llama 3 of '1B', '8B', '70B' or '405B': 1.2 to 405.9 billion parameters.

    That of '1B', Llama 3.2, has keys of 64 numbers, and its logits are made by the
    table of tokens.
    """
    blocks, width, hidden, head = {
        "1B": (16, 2048, 8192, 64),
        "8B": (32, 4096, 14336, 128),
        "70B": (80, 8192, 28672, 128),
        "405B": (126, 16384, 53248, 128),
    }[parameters]
    vocabulary, key_value = 128256, 8 * head
    shapes: Shapes = {"tokens": (vocabulary, width), "norm": (width,)}
    if parameters != "1B":
        shapes["logits"] = (width, vocabulary)
    for block in range(blocks):
        for name, shape in (
            ("query", (width, width)),
            ("key", (width, key_value)),
            ("value", (width, key_value)),
            ("output", (width, width)),
            ("gate", (width, hidden)),
            ("up", (width, hidden)),
            ("down", (hidden, width)),
            ("attention_norm", (width,)),
            ("feed_forward_norm", (width,)),
        ):
            shapes[f"block{block}/{name}"] = shape
    return _tree(shapes, dtype)
