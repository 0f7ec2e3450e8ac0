"""Goes on in JAX with a training that PyTorch's AdaMod began.

The packages adamod, torch_optimizer and pytorch_optimizer hold the same averages; the
last keeps the step in its groups of parameters. PyTorch need not be installed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod import ScaleByAdamodState

AVERAGES = {"mu": "exp_avg", "nu": "exp_avg_sq", "bound": "exp_avg_lr"}


def adamod_state_from_torch(
    state_dict: Mapping[str, Any],
    names: Sequence[str],
    to_tree: Callable[[dict[str, np.ndarray]], optax.Params],
    state: optax.OptState,
) -> optax.OptState:
    """Turns the state of PyTorch's AdaMod into one of ``convention='torch'``.

    Args:
      state_dict: What the PyTorch optimizer's ``state_dict()`` returned, its tensors on
        the CPU, or NumPy arrays in their place.
      names: The names of the parameters, in the order in which the optimizer got them:
        for ``model.parameters()`` the names of ``model.named_parameters()``.
      to_tree: A function from arrays by these names, in PyTorch's shapes, to a tree
        with the structure and the shapes of the JAX parameters. It may reorder numbers
        and must not change them.
      state: A fresh ``tx.init(params)``, where ``tx`` was made with
        ``convention='torch'`` and PyTorch's hyperparameters.

    Returns:
      ``state`` with the averages, in the dtypes and shardings that it has, and with
      the step in every ``count``, so that schedules go on where they were.

    Raises:
      ValueError: If ``state_dict`` is not that of an AdaMod, lacks an average or holds
        what AdaMod does not know; if parameters took different numbers of steps; if
        names, structures or shapes do not match; if ``state`` holds no AdaMod or
        several.
    """
    found = optax.tree.get_all_with_path(state, ScaleByAdamodState.__name__)
    if len(found) != 1:
        raise ValueError(f"state must hold one AdaMod, and holds {len(found)}.")
    ((_, fresh),) = found
    step, averages = _read(state_dict, names)
    trees = {
        field: _like(getattr(fresh, field), to_tree(averages[key]), key)
        for field, key in AVERAGES.items()
    }

    count = jnp.asarray(step, fresh.count.dtype)
    adamod = ScaleByAdamodState(count=count, **trees)
    state = optax.tree.set(state, **{ScaleByAdamodState.__name__: adamod})

    def set_count(path: tuple[Any, ...], leaf: Any) -> Any:
        # A parameter may have this name, and is no integer.
        is_count = path[-1] == jax.tree_util.GetAttrKey("count")
        return count if is_count and jnp.result_type(leaf) == count.dtype else leaf

    # Not by optax.tree.set, which passes over a count deep below another.
    return jax.tree.map_with_path(set_count, state)


def _read(
    state_dict: Mapping[str, Any], names: Sequence[str]
) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    """Returns the step, and the averages by PyTorch's key and by name."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "state_dict must be an optimizer's, with 'state' and 'param_groups', and "
            f"has {sorted(state_dict)}."
        )
    groups = state_dict["param_groups"]
    indices = [(index, group) for group in groups for index in group["params"]]
    if len(indices) != len(names):
        raise ValueError(
            f"the optimizer has {len(indices)} parameters, and names has {len(names)}."
        )
    given = [name for group in groups for name in group.get("param_names", ())]
    if given and given != list(names):
        raise ValueError(f"the optimizer's names are {given}, got {list(names)}.")
    if any(group.get("adam_debias") for group in groups):
        raise ValueError("adam_debias=True corrects otherwise than optax_adamod does.")

    steps: dict[str, int] = {}
    averages: dict[str, dict[str, np.ndarray]] = {k: {} for k in AVERAGES.values()}
    for name, (index, group) in zip(names, indices, strict=True):
        stored = state_dict["state"].get(index, {})
        _check_keys(name, stored)
        if "step" not in stored and "step" not in group:
            raise ValueError(f"neither the state of {name!r} nor its group has a step.")
        steps[name] = int(stored["step"] if "step" in stored else group["step"])
        for key, values in averages.items():
            values[name] = np.asarray(stored[key])
            if np.iscomplexobj(values[name]):
                raise ValueError(
                    f"{key} of {name!r} is complex; PyTorch's AdaMod treats real and "
                    "imaginary parts apart."
                )
    if len(set(steps.values())) != 1:
        raise ValueError(f"all parameters must be at one step, and are at {steps}.")
    return steps[names[0]], averages


def _check_keys(name: str, stored: Mapping[str, Any]) -> None:
    """Refuses what is not the state of an AdaMod."""
    if not stored:
        raise ValueError(
            f"{name!r} has no averages, for it never had a gradient. Leave it out of "
            "both optimizers."
        )
    if "exp_avg_lr" not in stored:
        raise ValueError(
            f"the state of {name!r} holds {sorted(stored)}, without exp_avg_lr: the "
            "optimizer is not AdaMod."
        )
    missing = sorted(set(AVERAGES.values()) - set(stored))
    unknown = sorted(set(stored) - {"step", *AVERAGES.values()})
    if missing or unknown:
        raise ValueError(
            f"the state of {name!r} lacks {missing} and holds {unknown}, which AdaMod "
            "does not know."
        )


def _like(fresh: optax.Updates, tree: optax.Updates, key: str) -> optax.Updates:
    """Returns ``tree`` with the dtypes and the shardings of ``fresh``."""
    structures = jax.tree.structure(tree), jax.tree.structure(fresh)
    if structures[0] != structures[1]:
        raise ValueError(
            f"to_tree gave {structures[0]}, and the parameters are {structures[1]}."
        )

    def convert(path: Any, old: jax.Array, new: Any) -> jax.Array:
        new = np.asarray(new)
        if new.shape != old.shape:
            raise ValueError(
                f"{key} of {jax.tree_util.keystr(path)}: to_tree gave shape "
                f"{new.shape}, and the parameter has {old.shape}."
            )
        sharding = old.sharding if old.committed else None
        return jax.device_put(new.astype(old.dtype), sharding)

    return jax.tree.map_with_path(convert, fresh, tree)
