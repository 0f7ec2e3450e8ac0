"""Classifies scikit-learn's digits with AdaMod in plain JAX, without a framework."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_adamod import adamod


def apply(params, images):
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params, images, labels):
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps: int = 600, learning_rate: float = 3e-3, b3: float = 0.99):
    """Trains, prints loss and test accuracy, and returns parameters and state."""
    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        (images / 16).astype(np.float32), labels, random_state=0
    )
    initializer = jax.nn.initializers.lecun_normal()
    key1, key2 = jax.random.split(jax.random.key(0))
    params = {
        "w1": initializer(key1, (64, 128)),
        "b1": jnp.zeros((1, 128)),
        "w2": initializer(key2, (128, 10)),
        "b2": jnp.zeros((1, 10)),
    }
    tx = adamod(optax.cosine_decay_schedule(learning_rate, steps), b3=b3)
    opt_state = tx.init(params)

    # What is donated is overwritten; it is returned in the same order.
    @functools.partial(jax.jit, donate_argnames=("params", "opt_state"))
    def train_step(params, opt_state, images, labels):
        loss, gradients = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(0)
    loss = np.nan
    for _ in tqdm(range(steps), unit="step"):
        batch = rng.integers(len(images), size=64)
        params, opt_state, loss = train_step(
            params, opt_state, images[batch], labels[batch]
        )
    accuracy = np.mean(apply(params, test_images).argmax(axis=1) == test_labels)
    print(f"loss {loss:.3f}, test accuracy {accuracy:.1%}")
    return params, opt_state


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
