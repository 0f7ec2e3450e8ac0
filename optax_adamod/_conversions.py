"""The states of other optimizers, and in other storage, turned into AdaMod's."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod import _checks, _find, _float8, _storage
from optax_adamod._adamod import ScaleByAdamodState
from optax_adamod._float8 import Float8Array, as_float8, is_float8
from optax_adamod._rounding import RoundUpdatesStochasticallyState

_STEPS = optax.ScaleByScheduleState, RoundUpdatesStochasticallyState
_TORCH_NAMES = {"mu": "exp_avg", "nu": "exp_avg_sq", "bound": "exp_avg_lr"}


def from_adam(adam_state: optax.OptState, state: optax.OptState) -> optax.OptState:
    """Turns the state of :func:`optax.adam` into one of AdaMod.

    The result has Adam's averages and step. Adam has no bound, so the bound stays as it
    is in ``state``: in a fresh state it is zero and opens over ``1 / (1 - b3)`` steps,
    as at the start of a run.

    Args:
      adam_state: A state that holds one of :func:`optax.scale_by_adam`, at any depth:
        of :func:`optax.adam`, of :func:`optax.adamw`, of a chain, or the
        ``opt_state`` or ``nnx.state`` of a Flax ``nnx.Optimizer``. That of
        :func:`optax.adamax` or :func:`optax.yogi` looks the same and means something
        else.
      state: A fresh ``tx.init(params)``, where ``tx`` holds one AdaMod, or the same of
        the new ``nnx.Optimizer``.

    Returns:
      ``state`` with copies of Adam's averages, in the dtypes and on the devices of
      ``state``, at Adam's step. Schedules and :func:`optax.inject_hyperparams` go on
      where they were: at the step of their counterpart in ``adam_state``, or at Adam's.
      All else is as in ``state``, such as the gradients that :func:`optax.MultiSteps`
      has accumulated: convert between two updates.

    Raises:
      ValueError: If either state does not hold exactly one such optimizer, or if the
        states belong to different parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_adamod import adamod, from_adam
      >>> params = jnp.array([1., 2., 3.])
      >>> adam = optax.adam(0.1)
      >>> adam_state = adam.init(params)
      >>> for _ in range(10):
      ...  updates, adam_state = adam.update(2 * params, adam_state, params)
      ...  params = optax.apply_updates(params, updates)
      >>> print('Objective function: {:.2f}'.format(jnp.sum(params ** 2)))
      Objective function: 5.11
      >>> solver = adamod(0.1, b3=0.9)
      >>> opt_state = from_adam(adam_state, solver.init(params))
      >>> for _ in range(20):
      ...  updates, opt_state = solver.update(2 * params, opt_state, params)
      ...  params = optax.apply_updates(params, updates)
      >>> print('Objective function: {:.2f}'.format(jnp.sum(params ** 2)))
      Objective function: 1.10

    .. seealso:: :func:`optax_adamod.from_adamod`, :func:`optax_adamod.from_torch`.
    """
    adam = _find.only(adam_state, "adam_state", optax.ScaleByAdamState).state
    averages = {"mu": adam.mu, "nu": adam.nu}
    names = {field: f"adam_state's {field}" for field in averages}
    return _continued(state, averages, names, adam.count, adam_state)


def from_adamod(adamod_state: optax.OptState, state: optax.OptState) -> optax.OptState:
    """Turns a state of AdaMod into one of other dtypes.

    From float32 to 8 bits, for instance, and back. Numbers are rounded to the nearest.

    Args:
      adamod_state: A state that holds one of :func:`optax_adamod.scale_by_adamod`, at
        any depth, such as one that Orbax restored with the template of the old
        optimizer, or ``nnx.state`` of a Flax ``nnx.Optimizer``.
      state: A fresh ``tx.init(params)`` of the new optimizer, or the same of the new
        ``nnx.Optimizer``.

    Returns:
      ``state`` with copies of the averages, in its own dtypes and on its own devices,
      at the same step. Schedules and all else are as in :func:`from_adam`. Where only
      ``state`` has a bound, that stays as it is, zero in a fresh state; where it has
      none, as with ``b3=0``, that of ``adamod_state`` is left out.

    Raises:
      ValueError: If either state does not hold exactly one AdaMod, if the states
        belong to different parameters, or if 8 bits cannot keep a bound.
      TypeError: If codes of 8 bits lack their exponents, or have another's sign.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_adamod import adamod, from_adamod
      >>> params = jnp.ones((2, 128))
      >>> solver = adamod(0.1)
      >>> updates, opt_state = solver.update(params, solver.init(params), params)
      >>> solver = adamod(0.1, nu_dtype='float8', bound_dtype='bfloat16')
      >>> opt_state = from_adamod(opt_state, solver.init(params))
      >>> print(opt_state[0].count, opt_state[0].nu, opt_state[0].bound.dtype)
      1 Float8Array(unsigned float8[2,128], an exponent for each 128) bfloat16

    .. seealso:: :func:`optax_adamod.from_adam`, :func:`optax_adamod.Float8Array`.
    """
    old = _find.only(adamod_state, "adamod_state", ScaleByAdamodState).state
    averages = {"mu": old.mu, "nu": old.nu, "bound": old.bound}
    names = {field: f"adamod_state's {field}" for field in averages}
    return _continued(state, averages, names, old.count, adamod_state)


def from_torch(
    state_dict: Mapping[str, Any],
    names: Sequence[str],
    to_tree: Callable[[dict[str, np.ndarray]], optax.Params],
    state: optax.OptState,
) -> optax.OptState:
    """Turns the state of PyTorch's AdaMod into one of ``convention='torch'``.

    The states of the packages adamod, torch_optimizer and pytorch_optimizer hold the
    same averages. PyTorch need not be installed.

    Args:
      state_dict: What the PyTorch optimizer's ``state_dict()`` returned, its tensors on
        the CPU, or NumPy arrays in their place.
      names: The names of the parameters, in the order in which the optimizer got them:
        for ``model.parameters()`` the names of ``model.named_parameters()``.
      to_tree: A function from arrays by these names, in PyTorch's shapes, to a tree
        with the structure and the shapes of the JAX parameters. It may reorder numbers
        but must not change them.
      state: A fresh ``tx.init(params)``, where ``tx`` was made with
        ``convention='torch'`` and PyTorch's hyperparameters, or the ``opt_state`` or
        ``nnx.state`` of a Flax ``nnx.Optimizer``.

    Returns:
      ``state`` with the averages, in the dtypes and on the devices of ``state``, at
      PyTorch's step, where schedules and :func:`optax.inject_hyperparams` go on too.

    Raises:
      ValueError: If ``state_dict`` is not that of an AdaMod, lacks an average or holds
        an unknown one; if parameters are at different steps; if names, structures or
        shapes do not match; if ``state`` does not hold exactly one AdaMod state; if 8
        bits cannot keep a bound.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_adamod import adamod, from_torch
      >>> averages = {name: np.full((1, 2), 0.5)
      ...             for name in ('exp_avg', 'exp_avg_sq', 'exp_avg_lr')}
      >>> state_dict = {'state': {0: {'step': 7, **averages}},
      ...               'param_groups': [{'params': [0]}]}
      >>> def to_tree(arrays): return {'kernel': arrays['weight'].T}
      >>> solver = adamod(0.1, convention='torch')
      >>> opt_state = solver.init({'kernel': jnp.zeros((2, 1))})
      >>> opt_state = from_torch(state_dict, ['weight'], to_tree, opt_state)
      >>> print(opt_state[0].count, opt_state[0].bound['kernel'].ravel())
      7 [0.5 0.5]

    .. seealso:: :func:`optax_adamod.from_adam`.
    """
    step, by_key = _read(state_dict, names)
    averages = {field: to_tree(by_key[key]) for field, key in _TORCH_NAMES.items()}
    names_of_trees = {field: f"to_tree's {key}" for field, key in _TORCH_NAMES.items()}
    return _continued(state, averages, names_of_trees, step)


def _continued(
    state: optax.OptState,
    averages: Mapping[str, Any],
    names: Mapping[str, str],
    step: Any,
    source: Any = None,
) -> optax.OptState:
    """Returns ``state`` with other averages, its schedules and all else at their steps.

    Args:
      state: A state with one AdaMod.
      averages: What is to be in it; None for a bound that there is not.
      names: What the user calls each.
      step: The step of AdaMod, and of what ``source`` has nothing for.
      source: The state that counted the steps.
    """
    fresh = _find.only(state, "state", ScaleByAdamodState).state
    new = {}
    for field, average in averages.items():
        if average is not None and getattr(fresh, field) is not None:
            nu = averages["nu"] if field == "bound" else None
            new[field] = _like(getattr(fresh, field), average, field, names[field], nu)
    clocks = (*_STEPS, *_find.INJECTED)
    steps = {
        (x.path, type(x.state)): x.state.count for x in _find.walk(source, *clocks)
    }

    def at_step(path: str, x: Any) -> Any:
        here = steps.get((path, type(x)), step)
        x = x._replace(count=_counted(here, x.count))
        if isinstance(x, ScaleByAdamodState):
            return x._replace(**new)
        if isinstance(x, optax.InjectStatefulHyperparamsState):
            states = jax.tree.map_with_path(
                lambda keys, old: _counted(here, old) if _is_count(keys) else old,
                x.hyperparams_states,
            )
            x = x._replace(hyperparams_states=states)
        return x

    return _find.replaced(state, (ScaleByAdamodState, *clocks), at_step)


def _is_count(keys: Any) -> bool:
    """Returns whether a path ends in a count, in which Flax may have a variable."""
    count = jax.tree_util.GetAttrKey("count"), jax.tree_util.DictKey("count")
    return any(key in count for key in keys[-2:])


def _counted(step: Any, count: Any) -> Any:
    """Returns the step in the form of a count, in which Flax may have wrapped both."""
    (step,) = jax.tree.leaves(step)
    return jax.tree.map(lambda old: _placed(jnp.asarray(step), old), count)


def _placed(new: Any, old: Any, v: Any = None) -> Any:
    """Returns ``new`` in the dtype and on the devices of ``old``; a bound by its v."""
    if isinstance(old, Float8Array):
        if not isinstance(new, Float8Array):
            new = _float8.nearest(jnp.asarray(new), old.signed, v)
        return jax.tree.map(_placed, new, old)
    # A copy, so that to donate the one state is not to delete the other.
    if old.dtype == jnp.float16:
        new = _storage.clipped(jnp.asarray(new), old.dtype)
    new = (
        new.astype(old.dtype)
        if isinstance(new, np.ndarray)
        else jnp.array(new, old.dtype)
    )
    if isinstance(old, jax.core.Tracer) or not getattr(old, "committed", False):
        return jnp.asarray(new)
    return jax.device_put(new, old.sharding)


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
    for ours, theirs in zip(names, given, strict=False):
        if ours != theirs:
            raise ValueError(f"names has {ours!r} where the optimizer has {theirs!r}.")
    if any(group.get("adam_debias") for group in groups):
        raise ValueError(
            "adam_debias=True is another bias correction, which optax_adamod does not "
            "have."
        )

    steps: dict[str, int] = {}
    averages: dict[str, dict[str, np.ndarray]] = {k: {} for k in _TORCH_NAMES.values()}
    for name, (index, group) in zip(names, indices, strict=True):
        stored = state_dict["state"].get(index, {})
        _check_keys(name, stored)
        steps[name] = _step(name, stored.get("step", group.get("step")))
        for key, values in averages.items():
            values[name] = np.asarray(stored[key])
            if np.iscomplexobj(values[name]):
                raise ValueError(
                    f"{key} of {name!r} is complex; PyTorch's AdaMod treats real and "
                    "imaginary parts apart."
                )
    step = steps[names[0]]
    for name in names:
        if steps[name] != step:
            raise ValueError(
                f"all parameters must be at one step, and {names[0]!r} is at {step}, "
                f"{name!r} at {steps[name]}."
            )
    return step, averages


def _step(name: str, step: Any) -> int:
    """Returns the step, a number, or a tensor or an array of one."""
    if step is None:
        raise ValueError(f"neither the state of {name!r} nor its group has a step.")
    step = np.asarray(step)
    if step.size != 1 or step.dtype.kind not in "iuf" or step.item() % 1:
        raise ValueError(f"the step of {name!r} must be one whole number, got {step}.")
    return int(step.item())


def _check_keys(name: str, stored: Mapping[str, Any]) -> None:
    """Refuses a state that is not AdaMod's."""
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
    if missing := sorted(set(_TORCH_NAMES.values()) - set(stored)):
        raise ValueError(f"the state of {name!r} lacks {', '.join(missing)}.")
    if unknown := sorted(set(stored) - {"step", *_TORCH_NAMES.values()}):
        raise ValueError(
            f"the state of {name!r} holds {', '.join(unknown)}, which AdaMod does not "
            "know."
        )


def _like(
    fresh: optax.Updates,
    tree: optax.Updates,
    field: str,
    name: str,
    nu: Any = None,
) -> optax.Updates:
    """Returns ``tree`` with the dtypes, and on the devices, of ``fresh``.

    Args:
      fresh: An average of a fresh state.
      tree: What is to be in its place.
      field: Which of the averages it is.
      name: What the user calls ``tree``.
      nu: For a bound, the average of squares that goes with it.
    """
    structure = functools.partial(jax.tree.structure, is_leaf=is_float8)
    if structure(tree) != structure(fresh):
        difference = _checks.difference(name, tree, "the parameters", fresh)
        raise ValueError(
            f"{name} and the parameters differ in structure: {difference}."
        )

    def convert(path: Any, old: Any, new: Any, v: Any = None) -> Any:
        new, name_here = as_float8(new), f"{name} at {jax.tree_util.keystr(path)}"
        shape = _checks.shape_of_average(name_here, new, field)
        if shape != old.shape:
            raise ValueError(
                f"{name_here} has shape {shape}, and the parameter has {old.shape}."
            )
        if isinstance(new, Float8Array):
            return _placed(new if is_float8(old) else new.dequantize(), old)
        if jnp.iscomplexobj(new) and (is_float8(old) or not jnp.iscomplexobj(old)):
            raise ValueError(f"{name_here} is complex, and the parameter is real.")
        new = new if isinstance(new, jax.Array) else np.asarray(new)
        v = v.dequantize() if isinstance(v := as_float8(v), Float8Array) else v
        placed = _placed(new, old, v)
        if v is not None and isinstance(old, Float8Array):
            _check_bound(name_here, placed, new, v)
        return placed

    trees = (tree,) if nu is None else (tree, nu)
    return jax.tree.map_with_path(convert, fresh, *trees, is_leaf=is_float8)


def _check_bound(name: str, placed: Float8Array, s: Any, v: Any) -> None:
    """Refuses 8 bits for a bound that they cannot keep, unless its values are traced.

    Numbers far below their group's largest become the smallest code.
    """
    kept = placed.dequantize() <= 2 * s  # not where it is negative, which makes NaN
    lost = jnp.sum(~kept & (v != 0) & ~jnp.isnan(s))
    if not isinstance(lost, jax.core.Tracer) and lost:
        raise ValueError(
            f"{name} cannot be kept in 8 bits: {lost} of its bounds would become NaN, "
            "because one of their group is negative or NaN, or would more than double, "
            "being below 2**-34 of their group's largest. Make the optimizer with "
            "bound_dtype='bfloat16'."
        )
