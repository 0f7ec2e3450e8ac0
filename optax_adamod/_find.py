"""States inside another state, for diagnostics and conversions.

A state may be a mapping with the names of its fields, as Flax's ``nnx.state`` makes it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod._settings import dtype_of

INJECTED = optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState


class Found(NamedTuple):
    """A state inside another one."""

    path: str  # such as [0].inner_state[1]
    state: Any
    hyperparams: dict[str, Any]  # of optax.inject_hyperparams around it


def only(tree: Any, name: str, kind: type) -> Found:
    """Returns the one state of a kind; ``name`` is the user's for the tree."""
    found = list(walk(tree, kind))
    if len(found) != 1:
        choice = "pass one of " + ", ".join(name + x.path for x in found)
        if not found:
            choice = "it is made of " + ", ".join(_names_of_types(tree))
        raise ValueError(
            f"{name} must hold one {kind.__name__}, and holds {len(found)}: {choice}."
        )
    (count,) = jax.tree.leaves(found[0].state.count)
    if jnp.ndim(count):
        raise ValueError(
            f"{name} is a stack of {jnp.shape(count)} states: call this function under "
            "jax.vmap."
        )
    return found[0]


def walk(
    tree: Any, *kinds: type, path: str = "", hyperparams: Any = None
) -> Iterator[Found]:
    """Yields every state of some kinds, at any depth."""
    searched = (*kinds, *INJECTED)
    hyperparams = hyperparams or {}
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: _as_state(x, searched) is not None
    )
    for keys, x in leaves:
        here, state = path + jax.tree_util.keystr(keys), _as_state(x, searched)
        if isinstance(state, kinds):
            yield Found(here, state, hyperparams)
        if isinstance(state, INJECTED):
            inner = {**hyperparams, **state.hyperparams}
            here = f"{here}.inner_state"
            yield from walk(state.inner_state, *kinds, path=here, hyperparams=inner)


def replaced(
    tree: Any, kinds: tuple[type, ...], new: Callable[[str, Any], Any], path: str = ""
) -> Any:
    """Returns the tree with ``new(path, state)`` in the place of states of some kinds.

    The kinds include those of :func:`optax.inject_hyperparams`.
    """

    def replace(keys: Any, x: Any) -> Any:
        here, state = path + jax.tree_util.keystr(keys), _as_state(x, kinds)
        if state is None:
            return x
        state = new(here, state)
        if isinstance(state, INJECTED):
            inner = replaced(state.inner_state, kinds, new, f"{here}.inner_state")
            state = state._replace(inner_state=inner)
        if not isinstance(x, Mapping):
            return state
        fields, treedef = jax.tree_util.tree_flatten_with_path(
            x, is_leaf=lambda y: y is not x
        )
        return treedef.unflatten([getattr(state, keys[0].key) for keys, _ in fields])

    return jax.tree.map_with_path(
        replace, tree, is_leaf=lambda x: _as_state(x, kinds) is not None
    )


def _as_state(x: Any, kinds: tuple[type, ...]) -> Any:
    """Returns the state of one of the kinds that ``x`` is, or has the fields of."""
    for kind in kinds:
        if isinstance(x, kind):
            return x
        if not isinstance(x, Mapping) or set(x) != set(getattr(kind, "_fields", ())):
            continue
        # Parameters may have such names too, and are no integers.
        dtypes = [dtype_of(count) for count in jax.tree.leaves(x["count"])]
        if len(dtypes) == 1 and np.issubdtype(dtypes[0], np.integer):
            return kind(**x)
    return None


def _names_of_types(tree: Any) -> list[str]:
    """Returns the types that a tree is made of, in order."""
    names: dict[str, None] = {}

    def note(x: Any) -> bool:
        if not jax.tree_util.all_leaves([x]):
            names[type(x).__name__] = None
        return False

    jax.tree.leaves(tree, is_leaf=note)
    return list(names) or [type(tree).__name__]
