"""Classifies scikit-learn's digits with AdaMod in a Flax Linen loop."""

import jax
import numpy as np
import optax
import tyro
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_adamod import adamod


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


def main(steps: int = 600, learning_rate: float = 3e-3, b3: float = 0.99):
    """Trains, prints loss and test accuracy, and returns the state of the training."""
    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        (images / 16).astype(np.float32), labels, random_state=0
    )
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), images[:1])["params"],
        tx=adamod(optax.cosine_decay_schedule(learning_rate, steps), b3=b3),
    )
    rng = np.random.default_rng(0)
    loss = np.nan
    for _ in tqdm(range(steps), unit="step"):
        batch = rng.integers(len(images), size=64)
        state, loss = train_step(state, images[batch], labels[batch])
    logits = state.apply_fn({"params": state.params}, test_images)
    accuracy = np.mean(logits.argmax(axis=1) == test_labels)
    print(f"loss {loss:.3f}, test accuracy {accuracy:.1%}")
    return state


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
