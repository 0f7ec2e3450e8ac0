"""The learning rates of AdaMod's last step, as data."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod import _find, _settings
from optax_adamod._adamod import (
    ScaleByAdamodState,
    Step,
    scale_by_adamod,
)
from optax_adamod._float8 import as_float8, is_float8
from optax_adamod._settings import Convention, Hyperparameters
from optax_adamod._storage import Averages, real_dtype


class LearningRates(NamedTuple):
    """Learning rates of one step; NaN where a coordinate has had no gradient."""

    adaptive: Any  #: like the parameters, real; eta, which Adam would have used.
    bounded: Any  #: like adaptive; the smaller of eta and the bound, which AdaMod used.


class HeldByBound(NamedTuple):
    """Where the bound holds, that is, lies below eta; NaN where nothing is counted."""

    share: Any  #: scalars; share of the coordinates held, of those with a gradient.
    factor: Any  #: scalars; geometric mean of eta / bound over the coordinates held.


def learning_rates(
    opt_state: Any,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    b1: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    b3: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike | None = None,
    eps_root: jax.typing.ArrayLike | None = None,
    convention: Convention | None = None,
) -> LearningRates:
    r"""Returns the learning rates of the last step, bounded and unbounded.

    For the step :math:`t` that made the state, these are

    .. math::

      \eta_t \quad \text{and} \quad \hat{\eta}_t = \min(\eta_t, s_t),

    in the symbols of :func:`optax_adamod.adamod`, whose update is
    :math:`-\hat{\eta}_t \cdot \hat{m}_t`. With ``convention='torch'`` it is
    :math:`-\hat{\eta}_t \cdot m_t`, and :math:`\eta_t` contains both bias corrections.
    Like the update, the rates come from the averages as stored.

    Both rates are NaN for a coordinate that has had no gradient, and for all
    coordinates before the first step. Its rate, :math:`\alpha_t /
    (\sqrt{\bar{\varepsilon}} + \varepsilon)`, multiplies an average of zeros and means
    nothing.

    Args:
      opt_state: A state that holds one AdaMod state, at any depth of
        :func:`optax.chain`, :func:`optax.masked`, :func:`optax.MultiSteps` and the
        like, the ``opt_state`` of a Flax ``nnx.Optimizer``, or
        ``nnx.state(optimizer)``, unless ``b3=0``. Leaves that another transformation
        updates are :class:`optax.MaskedNode`, as in the state.
      learning_rate: What the bound averages, a scalar or the schedule itself: the
        ``learning_rate`` of ``adamod`` and ``adamodw``, the ``bound_learning_rate`` of
        ``scale_by_adamod``. A scalar is that of the last step. A schedule is evaluated
        at ``count - 1``, as in the last step. None for the state's
        ``bound_learning_rate``, or 1.
      b1: As given to the optimizer; None for the state's, or the default. Only
        ``convention='torch'`` uses it.
      b2: As given to the optimizer; None for the state's, or the default.
      b3: As given to the optimizer, so that one dictionary of settings serves both.
        The rates do not depend on it, because the state holds the bound.
      eps: As given to the optimizer; None for the state's, or the default.
      eps_root: As given to the optimizer; None for the state's, or the default.
      convention: As given to the optimizer; None for the default.

    Returns:
      Two trees like the parameters, in units of ``learning_rate``, real and in at
      least float32.

    Raises:
      ValueError: If ``opt_state`` does not hold exactly one AdaMod state, or holds a
        stack of states, as under ``vmap``; if an argument is out of its range, or
        differs from the value in the state (under jit: if it is given although the
        state holds one); if the state holds a ``learning_rate`` and none is given.
      TypeError: If an argument is not a number; if a decay rate or an epsilon is an
        array of less than 32 bits.

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
      The state of :func:`optax.inject_hyperparams` holds ``b1``, ``b2``, ``eps``,
      ``eps_root`` and ``bound_learning_rate``, and this function reads them. A
      ``learning_rate`` in it may or may not be the bound's: for ``adamod`` and
      ``adamodw`` pass ``learning_rate=opt_state.hyperparams['learning_rate']``. Other
      states do not hold the settings, so wrong settings give wrong rates without an
      error.

    .. seealso:: :func:`optax_adamod.log10_histogram`,
      :func:`optax_adamod.held_by_bound`.
    """
    _, state, kept = _find.only(opt_state, "opt_state", ScaleByAdamodState)
    settings = _given_or_kept(
        kept,
        learning_rate=learning_rate, b1=b1, b2=b2, b3=b3, eps=eps, eps_root=eps_root,
        convention=convention,
    )  # fmt: skip
    alpha = _settings.scalar_or_schedule("learning_rate", settings.pop("learning_rate"))
    hyperparameters = Hyperparameters.checked(**settings)
    (count,) = jax.tree.leaves(state.count)
    alpha = _settings.at_count(alpha, jnp.maximum(count - 1, 0))
    step_in = functools.cache(functools.partial(Step.at, count, alpha, hyperparameters))

    def leaves_of(average):
        leaves = jax.tree.leaves(average, is_leaf=is_float8)
        return [as_float8(leaf) for leaf in leaves]

    mu, nu = leaves_of(state.mu), leaves_of(state.nu)
    bound = [None] * len(nu) if state.bound is None else leaves_of(state.bound)
    treedef = jax.tree.structure(state.nu, is_leaf=is_float8)
    with jax.numpy_dtype_promotion("standard"):
        rates = [
            _leaf_rates(step_in(real_dtype(*averages)), *averages[1:])
            for averages in zip(mu, nu, bound, strict=True)
        ]
    return LearningRates(*(treedef.unflatten([r[i] for r in rates]) for i in (0, 1)))


def held_by_bound(rates: LearningRates) -> HeldByBound:
    r"""Returns the share of coordinates that the bound holds, and the mean factor.

    The bound holds a coordinate where :math:`s_t < \eta_t`, by the factor
    :math:`\eta_t / s_t`. The devices that hold the rates compute both, so only scalars
    leave them, on every sharding. On a CPU of 2 cores, the rates of 25 million
    parameters and this function took 2.7 to 3.7 times as long as an update (``python -m
    benchmarks.diagnostics``, seven runs).

    Args:
      rates: What :func:`optax_adamod.learning_rates` returns.

    Returns:
      Two trees with a float32 scalar for each leaf. ``share`` is the share of the
      coordinates held, among those that have had a gradient; NaN if none has.
      ``factor`` is the geometric mean of the factor over the coordinates held; NaN if
      none is.

    Raises:
      TypeError: If ``rates`` is not a :class:`optax_adamod.LearningRates`.
      ValueError: If its two trees differ in structure or shapes.

    .. seealso:: :func:`optax_adamod.learning_rates`.
    """
    if not isinstance(rates, LearningRates):
        raise TypeError(
            "rates must be the LearningRates that learning_rates(opt_state, ...) "
            f"returns, got {type(rates).__name__}."
        )
    _check_same_shapes(*rates)
    adaptive, treedef = jax.tree.flatten(rates.adaptive)
    with jax.numpy_dtype_promotion("standard"):
        leaves = [
            _share_and_factor(*pair)
            for pair in zip(adaptive, jax.tree.leaves(rates.bounded), strict=True)
        ]
    return HeldByBound(*(treedef.unflatten([x[i] for x in leaves]) for i in (0, 1)))


def _check_same_shapes(adaptive: Any, bounded: Any) -> None:
    """Refuses bounded and unbounded learning rates that differ in shape."""
    if jax.tree.structure(adaptive) != jax.tree.structure(bounded):
        raise ValueError(
            "rates.adaptive and rates.bounded differ in structure:\n"
            f"{jax.tree.structure(adaptive)}\n{jax.tree.structure(bounded)}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(adaptive)
    for (path, x), y in zip(leaves, jax.tree.leaves(bounded), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"rates.adaptive{where} has shape {jnp.shape(x)}, and "
                f"rates.bounded{where} {jnp.shape(y)}."
            )


def _given_or_kept(kept: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Returns what is given, what the state holds, or the optimizer's default."""
    if "bound_learning_rate" in kept:
        kept = kept | {"learning_rate": kept["bound_learning_rate"]}
    elif "learning_rate" in kept:
        if given["learning_rate"] is None:
            raise ValueError(
                "opt_state holds a learning_rate among its hyperparams, which may be "
                "the bound's or not. For adamod and adamodw pass learning_rate="
                "opt_state.hyperparams['learning_rate']; for a chain whose bound does "
                "not have it, pass opt_state.inner_state."
            )
        kept = {k: v for k, v in kept.items() if k != "learning_rate"}
    defaults = inspect.signature(scale_by_adamod).parameters
    settings = {}
    for name, value in given.items():
        if name in kept and name != "b3":  # which the rates do not depend on
            (own,) = jax.tree.leaves(kept[name])
            if value is not None and _differ(value, own):
                raise ValueError(
                    f"{name} is given as {value}, but opt_state holds {own} among its "
                    f"hyperparams: leave {name} out, or pass opt_state.inner_state."
                )
            settings[name] = own
        elif value is not None:
            settings[name] = value
        else:
            default = "bound_learning_rate" if name == "learning_rate" else name
            settings[name] = defaults[default].default
    return settings


def _differ(given: Any, kept: Any) -> bool:
    """Whether two numbers differ, or may differ under jit."""
    if callable(given) or any(isinstance(x, jax.core.Tracer) for x in (given, kept)):
        return True
    return not np.allclose(given, kept, rtol=1e-6, atol=0)


@jax.jit
def _leaf_rates(step, nu, bound):
    stored = Averages(None, nu, bound)
    _, v, s = stored.load([step.dtype] * 3, step.m_per_root_v)
    adaptive = jnp.where(v > 0, step.eta(v), jnp.nan)
    if s is None:
        return adaptive, adaptive
    rate = jnp.minimum(jnp.abs(adaptive), jnp.abs(s))
    return adaptive, jnp.where(step.eta.numerator < 0, -rate, rate)


@jax.jit
def _share_and_factor(adaptive, bounded):
    """Returns the share and the mean factor of one leaf."""
    adaptive, bounded = jnp.abs(adaptive), jnp.abs(bounded)
    held = bounded < adaptive
    number = jnp.sum(held, dtype=jnp.float32)
    share = number / jnp.sum(~jnp.isnan(adaptive), dtype=jnp.float32)
    log_factor = jnp.log(jnp.where(held, adaptive / bounded, 1))
    return share, jnp.exp(jnp.sum(log_factor, dtype=jnp.float32) / number)
