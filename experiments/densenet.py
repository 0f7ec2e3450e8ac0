"""A DenseNet, by SGD, AdamW and AdaMod at the learning rates of the authors' release.

The paper's DenseNet-121 on CIFAR-100 at full size, a smaller one on digits by default:

    python -m experiments.densenet
    python -m experiments.densenet --size full
"""

from experiments.command import command
from experiments.data.images import cifar, digits
from experiments.image_classification import Options, compare
from experiments.models.densenet import DenseNet

# The best of each that the authors found on CIFAR-100.
LEARNING_RATES = {"SGD": (0.05,), "AdamW": (1e-3,), "AdaMod": (1e-3,)}


def main(options: Options) -> None:
    full = options.size == "full"
    images = cifar(100, options.data) if full else digits()
    blocks, growth = ((6, 12, 24, 16), 32) if full else ((2, 2, 2), 8)
    compare(
        "densenet",
        images,
        lambda rngs: DenseNet(
            blocks, growth, images.channels, images.classes, rngs=rngs
        ),
        LEARNING_RATES,
        options,
    )


if __name__ == "__main__":
    command(main, Options, __doc__)
