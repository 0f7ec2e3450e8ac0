"""Images with their classes: scikit-learn's digits, CIFAR-10 and CIFAR-100."""

import dataclasses
from typing import Any

import grain
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data.hub import load

PADDING = 4  # pixels, on each side, before a random crop
FLIPPED = 0.5  # of the images


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with their classes; channels have mean 0 and deviation 1 in training."""

    train_images: np.ndarray  # float32[N, height, width, channels]
    train_labels: np.ndarray  # int32[N]
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    augment: bool = False

    @property
    def channels(self) -> int:
        return self.train_images.shape[-1]

    def batches(self, seed: int, size: int) -> grain.MapDataset:
        """Returns the training batch of every step, shuffled anew in every epoch."""
        # Grain types a source by its methods, which a list has.
        source: Any = list(range(len(self.train_images)))
        data = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        data = data.random_map(self._example)
        return data.batch(size)

    def _example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = self.train_images[index]
        if self.augment:
            image = crop(image, rng)[:, :: -1 if rng.random() < FLIPPED else 1]
        return {"image": image, "label": self.train_labels[index]}


def crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the image moved by up to ``PADDING`` pixels, with zeros beyond it."""
    height, width, _ = image.shape
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    top, left = rng.integers(2 * PADDING + 1, size=2)
    return padded[top : top + height, left : left + width]


def digits() -> Images:
    """Returns scikit-learn's 1,797 digits of 8 x 8 pixels, a fifth of them to test."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels.reshape(-1, 8, 8, 1), labels, test_size=0.2, random_state=0,
        stratify=labels,
    )  # fmt: skip
    train, test, train_labels, test_labels = map(np.asarray, parts)
    return standardised(train, test, train_labels, test_labels, 10, augment=False)


def cifar(classes: int, source: str | None = None) -> Images:
    """Returns CIFAR-10 or CIFAR-100, its training images cropped and flipped at random.

    Args:
      classes: 10 or 100.
      source: Name on the Hugging Face hub or folder of Parquet files; by default
        ``uoft-cs/cifar10`` or ``uoft-cs/cifar100``.

    Raises:
      OSError: They cannot be loaded; the message says where to put them.
    """
    name = source or f"uoft-cs/cifar{classes}"
    label = "label" if classes == 10 else "fine_label"
    parts = [load(name, split, {"img", label}) for split in ("train", "test")]
    arrays = []
    for part in parts:
        arrays.append(np.stack([np.asarray(x.convert("RGB")) for x in part["img"]]))
        arrays.append(np.asarray(part[label]))
    train_images, train_labels, test_images, test_labels = arrays
    return standardised(
        train_images, test_images, train_labels, test_labels, classes, augment=True
    )


def standardised(
    train_images: np.ndarray,
    test_images: np.ndarray,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    augment: bool,
) -> Images:
    mean = train_images.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = train_images.std(axis=(0, 1, 2), dtype=np.float64)

    def scale(images: np.ndarray) -> np.ndarray:
        return ((images - mean) / deviation).astype(np.float32)

    return Images(
        scale(train_images), train_labels.astype(np.int32),
        scale(test_images), test_labels.astype(np.int32),
        classes, augment,
    )  # fmt: skip
