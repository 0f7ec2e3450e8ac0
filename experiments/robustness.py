"""How far off may the learning rate be? ResNets, by SGD, AdamW and AdaMod.

The paper's ResNet-34 on CIFAR-10 at full size, a smaller one on digits by default:

    python -m experiments.robustness
    python -m experiments.robustness --size full
"""

from experiments.common.command import command
from experiments.tasks.images import Options, compare, resnet

LEARNING_RATES = (1e-3, 1e-2, 1e-1)  # the paper's
MODELS = {"laptop": ((1, 1, 1), 8), "full": ((3, 4, 6, 3), 64)}


def main(options: Options) -> None:
    rates: dict[str, tuple[float, ...]] = dict.fromkeys(
        ("SGD", "AdamW", "AdaMod"), LEARNING_RATES
    )
    model = resnet(*MODELS[options.size])
    compare("robustness", options.images(10), model, rates, options)


if __name__ == "__main__":
    command(main, Options, __doc__)
