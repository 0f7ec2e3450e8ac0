"""The learning rates that AdaMod uses, as data."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod import _checks, _histogram
from optax_adamod._adamod import ScaleByAdamodState, _rate, _real_dtype, _scalars

_INJECTED = optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState
_CHECKS = {
    "learning_rate": _checks.scalar_or_schedule,
    "b1": _checks.decay_rate,
    "b2": _checks.decay_rate,
    "eps": _checks.nonnegative,
    "eps_root": _checks.nonnegative,
}


class LearningRates(NamedTuple):
    """Learning rates of one step; NaN where a coordinate has had no gradient."""

    adaptive: Any  #: like the parameters, real; eta, which Adam would use.
    bounded: Any  #: like adaptive, the smaller of eta and the bound, which AdaMod used.


class HeldByBound(NamedTuple):
    """What the bound does to each leaf; NaN where there is nothing to count."""

    share: Any  #: scalars, coordinates held, of those that have had a gradient.
    factor: Any  #: scalars, median of eta / bound over the coordinates held.


def learning_rates(
    opt_state: Any,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    convention: str = "paper",
) -> LearningRates:
    r"""Learning rates that the last step used, with the bound and without.

    For the step :math:`t` that made the state, these are

    .. math::

      \eta_t \quad \text{and} \quad \hat{\eta}_t = \min(\eta_t, s_t),

    the symbols being those of :func:`optax_adamod.adamod`, where the update is
    :math:`-\hat{\eta}_t \cdot \hat{m}_t` (with ``convention='torch'``,
    :math:`-\hat{\eta}_t \cdot m_t`, and :math:`\eta_t` has both bias corrections
    inside). They come from the averages as stored, and so did the update.

    A coordinate that has had no gradient has the rate
    :math:`\alpha_t / (\sqrt{\bar{\varepsilon}} + \varepsilon)`, which multiplies an
    average of zeros and means nothing; both rates are NaN there. Before the first step
    they are NaN everywhere.

    Args:
      opt_state: A state that holds one AdaMod state, at any depth of
        :func:`optax.chain`, :func:`optax.masked`, :func:`optax.MultiSteps` and the
        like, or ``opt_state`` of a Flax ``nnx.Optimizer``. Leaves that another
        transformation updates are :class:`optax.MaskedNode`, as in the state.
      learning_rate: What the bound averages, a scalar or the schedule itself:
        ``learning_rate`` of ``adamod`` and ``adamodw``, ``bound_learning_rate`` of
        ``scale_by_adamod``. A scalar is that of the last step; a schedule is
        evaluated at ``count - 1``, as the last step did.
      b1: As given to the optimizer; only ``convention='torch'`` uses it.
      b2: As given to the optimizer.
      eps: As given to the optimizer.
      eps_root: As given to the optimizer.
      convention: As given to the optimizer.

    Returns:
      Two trees like the parameters, in units of ``learning_rate``, real and in at
      least float32.

    Raises:
      ValueError: If ``opt_state`` holds no AdaMod state, or several, or a stack of
        them, as under ``vmap``; if an argument is out of its range, or is given
        although the state holds its value; if it holds a ``learning_rate`` and none
        is given.
      TypeError: If an argument is an array of less than 32 bits.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_adamod import adamod, held_by_bound, learning_rates
      >>> from optax_adamod import log10_histogram
      >>> solver = adamod(learning_rate=0.1, b3=0.9)
      >>> params = jnp.zeros(4)
      >>> opt_state = solver.init(params)
      >>> grad = jnp.array([0., 0.05, 0.5, 5.])
      >>> for _ in range(10):
      ...  updates, opt_state = solver.update(grad, opt_state, params)
      >>> rates = learning_rates(opt_state, learning_rate=0.1)
      >>> print(' '.join(f'{x:.3f}' for x in rates.adaptive))
      nan 2.000 0.200 0.020
      >>> print(' '.join(f'{x:.3f}' for x in rates.bounded))
      nan 1.303 0.130 0.013
      >>> histogram = log10_histogram(rates.bounded, bins=np.linspace(-3, 1, 5))
      >>> print(histogram.counts, histogram.nan)
      [0 1 1 1] 1
      >>> held = held_by_bound(rates)
      >>> print('{:.0%} held by {:.2f}'.format(held.share, held.factor))
      100% held by 1.54

    .. note::
      Where :func:`optax.inject_hyperparams` holds ``b1``, ``b2``, ``eps``,
      ``eps_root`` or ``bound_learning_rate``, the state's value is used, and giving
      another one is an error. A ``learning_rate`` that it holds may be the bound's or
      not: give ``learning_rate=opt_state.hyperparams['learning_rate']`` for
      ``adamod`` and ``adamodw``. Given its ``inner_state`` alone, all arguments count.
      That the arguments are the optimizer's cannot be told from other states.

    .. seealso:: :func:`optax_adamod.log10_histogram`,
      :func:`optax_adamod.held_by_bound`.
    """
    paper = _checks.choice("convention", convention, ("paper", "torch")) == "paper"
    state, hyperparams = _adamod_state(opt_state)
    settings = _settings(
        hyperparams,
        learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root,
    )  # fmt: skip
    alpha: Any = settings.pop("learning_rate")
    (count,) = jax.tree.leaves(state.count)
    if jnp.ndim(count):
        raise ValueError(
            f"opt_state is a stack of {jnp.shape(count)} states: use "
            "jax.vmap(learning_rates)."
        )
    alpha = _checks.at_count("learning_rate", alpha, jnp.maximum(count - 1, 0))
    scalars = functools.cache(
        lambda dtype: _scalars(
            count, alpha, b3=0.0, **settings, paper=paper, nesterov=False, dtype=dtype
        )
    )
    averages = zip(*map(jax.tree.leaves, state[1:]), strict=True)
    with jax.numpy_dtype_promotion("standard"):
        rates = [
            _leaf_rates(scalars(_real_dtype(mu, nu, bound)).bound_rate, nu, bound)
            for mu, nu, bound in averages
        ]
    treedef = jax.tree.structure(state.nu)
    return LearningRates(*(treedef.unflatten([r[i] for r in rates]) for i in (0, 1)))


def held_by_bound(rates: LearningRates) -> HeldByBound:
    r"""Share of coordinates that the bound holds, and how hard, leaf by leaf.

    The bound holds a coordinate where :math:`s_t < \eta_t`, by the factor
    :math:`\eta_t / s_t`. The median takes eight passes over the rates: with 25 million
    parameters as long as seven updates on a CPU of 2 cores (``python
    benchmarks/diagnostics.py``). Ask for it now and then.

    Args:
      rates: What :func:`optax_adamod.learning_rates` returns.

    Returns:
      Two trees with a float32 scalar for each leaf, the share of the coordinates held
      among those that have had a gradient, NaN if none has, and the median factor
      over the coordinates held (the lower of two), NaN if none is.

    .. seealso:: :func:`optax_adamod.learning_rates`.
    """
    if not isinstance(rates, LearningRates):
        raise TypeError(
            "rates must be the LearningRates that learning_rates(opt_state, ...) "
            f"returns, got {type(rates).__name__}."
        )
    _checks.same_shapes(*rates)
    adaptive, treedef = jax.tree.flatten(rates.adaptive)
    with jax.numpy_dtype_promotion("standard"):
        leaves = [
            _held(*pair)
            for pair in zip(adaptive, jax.tree.leaves(rates.bounded), strict=True)
        ]
    return HeldByBound(*(treedef.unflatten([x[i] for x in leaves]) for i in (0, 1)))


def _adamod_state(opt_state: Any) -> tuple[ScaleByAdamodState, dict[str, Any]]:
    """Finds the AdaMod state and the hyperparameters that are kept around it."""
    found: dict[str, tuple[ScaleByAdamodState, dict[str, Any]]] = {}
    seen: dict[str, None] = {}  # names of types, in order

    def search(tree, path, hyperparams):
        def is_node(x):
            if not jax.tree_util.all_leaves([x]):
                seen[type(x).__name__] = None
            return isinstance(x, (ScaleByAdamodState, *_INJECTED))

        for key, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
            place = path + jax.tree_util.keystr(key)
            if isinstance(x, ScaleByAdamodState):
                found[place] = x, hyperparams
            elif isinstance(x, _INJECTED):
                inner = hyperparams | x.hyperparams
                search(x.inner_state, f"{place}.inner_state", inner)

    search(opt_state, "opt_state", {})
    if not found:
        raise ValueError(
            "opt_state holds no ScaleByAdamodState; it is made of "
            f"{', '.join(seen) or type(opt_state).__name__}."
        )
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} AdaMod states, each with arguments of its "
            f"own: pass one of {', '.join(found)}."
        )
    ((state, hyperparams),) = found.values()
    return state, hyperparams


def _settings(hyperparams: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The arguments, checked, or what the state holds in their place."""
    signature = inspect.signature(learning_rates).parameters
    is_given = {
        name: not isinstance(x, int | float) or x != signature[name].default
        for name, x in given.items()
    }
    if "bound_learning_rate" in hyperparams:
        hyperparams = hyperparams | {
            "learning_rate": hyperparams["bound_learning_rate"]
        }
    elif "learning_rate" in hyperparams:
        if not is_given["learning_rate"]:
            raise ValueError(
                "opt_state holds a learning_rate among its hyperparams, which may be "
                "the bound's or not. For adamod and adamodw pass learning_rate="
                "opt_state.hyperparams['learning_rate']; for a chain whose bound does "
                "not have it, pass opt_state.inner_state."
            )
        hyperparams = {k: v for k, v in hyperparams.items() if k != "learning_rate"}
    for name in given:
        if name in hyperparams:
            if is_given[name]:
                raise ValueError(
                    f"{name} is given as {given[name]}, but opt_state holds its own "
                    f"among its hyperparams, {hyperparams[name]}, which is used: leave "
                    f"{name} out, or pass opt_state.inner_state."
                )
            (given[name],) = jax.tree.leaves(hyperparams[name])
    for name, check in _CHECKS.items():
        given[name] = check(name, given[name])
    return given


@jax.jit
def _leaf_rates(bound_rate, nu, bound):
    dtype = bound_rate[0].dtype
    v, s = nu.astype(dtype), bound.astype(dtype)
    eta = jnp.where(v > 0, _rate(v, *bound_rate), jnp.nan)
    rate = jnp.minimum(jnp.abs(eta), jnp.abs(s))
    return eta, jnp.where(bound_rate[0] < 0, -rate, rate)


@jax.jit
def _held(adaptive, bounded):
    """Share and median factor of one leaf."""
    with _histogram.counting(adaptive.size) as dtype:
        held = jnp.abs(bounded) < jnp.abs(adaptive)
        number = jnp.sum(held, dtype=dtype)
        share = number / jnp.sum(~jnp.isnan(adaptive), dtype=dtype)
        # Digit by digit the largest number that at most half the factors are below,
        # so that no more than counts leave a shard, where sorting would gather the
        # leaf. Positive numbers have the order of their bits.
        factor = (adaptive / bounded).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(factor, jnp.uint32)
        bits = jnp.where(held, bits, np.uint32(0xFFFFFFFF))
        above_half = adaptive.size - (number - 1) // 2

        def narrow(i, low):
            shift = jnp.asarray(28 - 4 * i, jnp.uint32)
            candidates = low | (jnp.arange(1, 16, dtype=jnp.uint32) << shift)
            at_least = _histogram.count_at_least(bits, candidates, dtype)
            digit = jnp.sum(at_least >= above_half, dtype=jnp.uint32)
            return low | (digit << shift)

        # Of number's type: under shard_map it varies from device to device.
        bits = jax.lax.fori_loop(0, 8, narrow, jnp.zeros_like(number, jnp.uint32))
        median = jax.lax.bitcast_convert_type(bits, jnp.float32)
        median = jnp.where(number > 0, median, jnp.nan)
        return share.astype(jnp.float32), median
