"""A DenseNet, by SGD, AdamW and AdaMod at the learning rates of the authors' release.

The paper's DenseNet-121 on CIFAR-100 at full size, a smaller one on digits by default:

    python -m experiments.densenet
    python -m experiments.densenet --size full
"""

from experiments.common.command import command
from experiments.tasks.images import Options, compare, densenet

# The best of each that the authors found on CIFAR-100.
LEARNING_RATES = {"SGD": (0.05,), "AdamW": (1e-3,), "AdaMod": (1e-3,)}
MODELS = {"laptop": ((2, 2, 2), 8), "full": ((6, 12, 24, 16), 32)}


def main(options: Options) -> None:
    model = densenet(*MODELS[options.size])
    compare("densenet", options.images(100), model, LEARNING_RATES, options)


if __name__ == "__main__":
    command(main, Options, __doc__)
