"""How often an optimizer is traced."""

import optax


def counted(tx):
    """Returns the transformation, and a list that grows with each trace of it."""
    tx, traces = optax.with_extra_args_support(tx), []

    def update_fn(updates, state, params=None, **extra_args):
        traces.append(1)  # under jit, Python runs only while it is traced
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn), traces
