"""The optimizers that are compared, and the update that is measured."""

from collections.abc import Callable
from typing import Any

import optax

from optax_adamod import adamod

ADAM = "Adam"
ADAMOD = "AdaMod"
ADAMOD_BFLOAT16 = "AdaMod, bfloat16 mu and bound"
ADAMOD_FLOAT8 = "AdaMod, 8 bits"

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    ADAM: lambda: optax.adam(1e-3),
    ADAMOD: lambda: adamod(1e-3),
    ADAMOD_BFLOAT16: lambda: adamod(1e-3, mu_dtype="bfloat16", bound_dtype="bfloat16"),
    ADAMOD_FLOAT8: lambda: adamod(
        1e-3, mu_dtype="float8", nu_dtype="float8", bound_dtype="float8"
    ),
    "AMSGrad": lambda: optax.amsgrad(1e-3),
    "AdaBelief": lambda: optax.adabelief(1e-3),
    "RAdam": lambda: optax.radam(1e-3),
    "Lion": lambda: optax.lion(1e-3),
}

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def step(tx: optax.GradientTransformation) -> Step:
    """Returns the whole update, to be jitted with :data:`DONATED` donated.

    What is donated has the order of the outputs: in any other XLA copies.
    """

    def update(params, opt_state, gradients):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


DONATED = (0, 1)
