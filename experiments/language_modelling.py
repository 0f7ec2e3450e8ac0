"""What the experiments on language models share: the loss."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.transformer import next_token_losses
from experiments.training import Batch


def loss(model: nnx.Module, batch: Batch) -> jax.Array:
    return next_token_losses(model, jnp.asarray(batch["tokens"])).mean()
