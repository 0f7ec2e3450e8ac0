"""How far off may the learning rate be? ResNets, by SGD, AdamW and AdaMod.

The paper's ResNet-34 on CIFAR-10 at full size, a smaller one on digits by default:

    python -m experiments.robustness
    python -m experiments.robustness --size full
"""

from examples.common.resnet import ResNet
from experiments.command import command
from experiments.data.images import cifar, digits
from experiments.image_classification import Options, compare

LEARNING_RATES = (1e-3, 1e-2, 1e-1)  # the paper's


def main(options: Options) -> None:
    full = options.size == "full"
    images = cifar(10, options.data) if full else digits()
    blocks, width = ((3, 4, 6, 3), 64) if full else ((1, 1, 1), 8)
    compare(
        "robustness",
        images,
        lambda rngs: ResNet(blocks, width, images.channels, images.classes, rngs=rngs),
        dict.fromkeys(("SGD", "AdamW", "AdaMod"), LEARNING_RATES),
        options,
    )


if __name__ == "__main__":
    command(main, Options, __doc__)
