"""Classifies scikit-learn's digits with AdaMod in a Flax NNX loop."""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_adamod import adamodw

images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(
    (images / 16).astype(np.float32), labels, random_state=0
)
rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs)
)
schedule = optax.cosine_decay_schedule(3e-3, decay_steps=600)
tx = optax.chain(optax.clip_by_global_norm(1.0), adamodw(schedule, b3=0.99))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


rng = np.random.default_rng(0)
for _ in tqdm(range(600), unit="step"):
    batch = rng.integers(len(images), size=64)
    train_step(model, optimizer, images[batch], labels[batch])
accuracy = np.mean(model(test_images).argmax(axis=1) == test_labels)
print(f"test accuracy {accuracy:.1%}")
