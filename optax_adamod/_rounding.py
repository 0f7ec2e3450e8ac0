"""Updates that parameters in bfloat16 can follow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_adamod import _storage
from optax_adamod._settings import brief, dtype_of
from optax_adamod._storage import Seed


class RoundUpdatesStochasticallyState(NamedTuple):
    """State of :func:`round_updates_stochastically`."""

    #: shape=(), dtype=jnp.int32.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]


def round_updates_stochastically() -> optax.GradientTransformationExtraArgs:
    r"""Make updates that round parameters in bfloat16 stochastically.

    The last transformation of a chain, of any optimizer, and outside of wrappers that
    keep parameters of their own, such as :func:`optax.lookahead`. A bfloat16 number
    has 8 significant bits, and :func:`optax.apply_updates` rounds the sum of a
    parameter and its update to the nearest. It loses every update of less than half
    the spacing. For a bfloat16 parameter :math:`\theta` and an update :math:`u` this
    transformation returns the bfloat16 update

    .. math::

      u' = \operatorname{round}(\theta + u) - \theta,

    in which the sum is rounded up or down at random, in proportion to the distances.
    bfloat16 holds this difference where the sum is within a factor of two of the
    parameter. There :func:`optax.apply_updates` gets that very sum, and parameters
    follow their updates in the mean. Larger updates are rounded, by at most 2**-8 of
    themselves. The random bits are a hash of step, leaf and coordinate, as those of
    AdaMod's averages, so a state that is made anew repeats them. Updates of float32,
    float64 and complex parameters stay as they are. Leaves that are no arrays may have
    None as their update.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, whose ``update``
      needs the parameters.

    Raises:
      ValueError: From ``update``, if ``params`` is None, or an update and its parameter
        differ in shape.
      TypeError: From ``init`` and ``update``, if a parameter is a float of less than 32
        bits other than bfloat16, whose numbers it does not round. From ``update``, if
        the update of what is no array is not None.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_adamod import round_updates_stochastically
      >>> def train(*last):
      ...  solver = optax.chain(optax.sgd(1e-4), *last)
      ...  params = jnp.ones(1000, jnp.bfloat16)
      ...  opt_state = solver.init(params)
      ...  for _ in range(100):
      ...   updates, opt_state = solver.update(2 * params, opt_state, params)
      ...   params = optax.apply_updates(params, updates)
      ...  return float(params.astype(jnp.float32).mean())
      >>> print('{:.2f}'.format(train()))
      1.00
      >>> print('{:.2f}'.format(train(round_updates_stochastically())))
      0.98

    .. seealso:: :func:`optax_adamod.adamod`.
    """

    def init_fn(params):
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            _is_rounded(path, p)
        return RoundUpdatesStochasticallyState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "round_updates_stochastically needs the parameters: call "
                "update(updates, state, params)."
            )
        count = optax.safe_increment(state.count)
        words = Seed.step_words(count)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            updates, is_leaf=lambda x: x is None
        )
        rounded = [
            _rounded(u, p, words, path)
            for (path, u), p in zip(leaves, treedef.flatten_up_to(params), strict=True)
        ]
        state = RoundUpdatesStochasticallyState(count=count)
        return treedef.unflatten(rounded), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rounded(u, p, words, path):
    if u is None:  # so p may be anything, such as a function of an Equinox model
        return u
    _check_summand(path, u, p)
    if not _is_rounded(path, p):
        return u
    # Salted, so that parameters and averages of one leaf round by bits of their own.
    return _round_sum(u, p, words, Seed.leaf_word(path, "params"))


@jax.jit
def _round_sum(u, p, words, leaf):
    """Returns the update after which the sum with ``p`` is rounded stochastically."""
    seed = Seed.of(words, leaf, u, p)
    bits, _, _ = _storage.random_bits(
        jnp.shape(p), seed, 16, sharding=jax.typeof(p).sharding
    )
    wide = p.astype(jnp.float32)
    rounded = _storage.stochastic_round(wide + u.astype(jnp.float32), bits)
    return (rounded.astype(jnp.float32) - wide).astype(p.dtype)


def _is_rounded(path: Any, p: Any) -> bool:
    """Returns whether sums with a parameter are rounded; refuses other narrow ones."""
    dtype = dtype_of(p)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    if dtype != jnp.bfloat16 and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"the parameter at params{jax.tree_util.keystr(path)} is {dtype}; "
            "round_updates_stochastically rounds sums with bfloat16 parameters, "
            "and leaves wider ones alone. Use bfloat16, or leave such parameters "
            "out with optax.masked."
        )
    return dtype == jnp.bfloat16


def _check_summand(path: Any, u: Any, p: Any) -> None:
    """Refuses an update that has no parameter, or would broadcast to it."""
    where = jax.tree_util.keystr(path)
    if dtype_of(p) is None:
        raise TypeError(
            f"there is an update at updates{where}, and params{where} is {brief(p)}, "
            f"of type {type(p).__name__}. Pass None as the update of what is no array."
        )
    if jnp.shape(u) != jnp.shape(p):
        raise ValueError(
            f"the update at updates{where} has shape {jnp.shape(u)}, and its parameter "
            f"{jnp.shape(p)}."
        )
