"""Classifies scikit-learn's digits with AdaMod in an Equinox loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_adamod import adamod


@eqx.filter_value_and_grad
def loss_and_gradients(model, images, labels):
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps: int = 600, learning_rate: float = 3e-3, b3: float = 0.99):
    """Trains, prints loss and test accuracy, and returns the model and the state."""
    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        (images / 16).astype(np.float32), labels, random_state=0
    )
    model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
    tx = adamod(optax.cosine_decay_schedule(learning_rate, steps), b3=b3)
    # The activation is a leaf of the model too, and has no average.
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, opt_state, images, labels):
        loss, gradients = loss_and_gradients(model, images, labels)
        updates, opt_state = tx.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    rng = np.random.default_rng(0)
    loss = np.nan
    for _ in tqdm(range(steps), unit="step"):
        batch = rng.integers(len(images), size=64)
        model, opt_state, loss = train_step(
            model, opt_state, images[batch], labels[batch]
        )
    logits = jax.vmap(model)(jnp.asarray(test_images))
    accuracy = np.mean(logits.argmax(axis=1) == test_labels)
    print(f"loss {loss:.3f}, test accuracy {accuracy:.1%}")
    return model, opt_state


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
