"""Shows AdaMod's learning rates in TensorBoard, from inside a Flax NNX loop.

python -m examples.watch_training
tensorboard --logdir outputs/watch_training
"""

from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from tensorboardX import SummaryWriter
from tqdm import tqdm

from optax_adamod import adamod, held_by_bound, learning_rates, log10_histogram

LEARNING_RATE = 3e-3
BINS = np.linspace(-5, 3, 41)  # powers of ten


@jax.jit  # so that no more than counts and shares leave the device
def watch(opt_state):
    rates = learning_rates(opt_state, LEARNING_RATE)
    return log10_histogram(rates.bounded, BINS), held_by_bound(rates)


def write(writer: SummaryWriter, opt_state: optax.OptState, step: int) -> None:
    """Adds a histogram of the learning rates, and what the bound does to each layer."""
    histogram, held = jax.device_get(watch(opt_state))
    counts = np.array([histogram.below, *histogram.counts, histogram.above])
    limits = np.array([*BINS, 2 * BINS[-1] - BINS[-2]])  # upper ones
    writer.add_histogram_raw(
        "log10_learning_rate",
        limits[0], limits[-1], counts.sum(), counts @ limits, counts @ limits**2,
        limits, counts, step,
    )  # fmt: skip
    for name, tree in held._asdict().items():
        for path, value in nnx.to_flat_state(tree):
            layer = "/".join(map(str, path))
            writer.add_scalar(f"bound_{name}/{layer}", value[...].item(), step)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def main(steps: int = 600, output: Path = Path("outputs/watch_training")) -> None:
    """Trains a classifier of digits, and looks at it every tenth step."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, adamod(LEARNING_RATE, b3=0.99), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    with SummaryWriter(str(output)) as writer:
        for step in tqdm(range(1, steps + 1), unit="step"):
            batch = rng.integers(len(images), size=64)
            loss = train_step(model, optimizer, images[batch], labels[batch])
            if step % 10 == 0:
                writer.add_scalar("loss", loss.item(), step)
                write(writer, optimizer.opt_state, step)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
