"""AdaMod.

Implementation of
"Adaptive and Momental Bounds for Adaptive Learning Rate Methods"
(https://arxiv.org/abs/1910.12249) by Jianbang Ding, Xuancheng Ren, Ruixuan Luo
and Xu Sun.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod import _checks, _float8, _kernels, _settings
from optax_adamod._arithmetic import (
    Average,
    BoundPerAlpha,
    Momentum,
    Rate,
    abs_sq,
    bias_correction,
    largest_ratio,
)
from optax_adamod._settings import Convention, Hyperparameters
from optax_adamod._storage import Averages, Seed, as_identity, real_dtype, zeros_like


class ScaleByAdamodState(NamedTuple):
    """State for the AdaMod algorithm."""

    #: shape=(), dtype=jnp.int32.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates  #: like the parameters, in their dtype or mu_dtype.
    nu: optax.Updates  #: like the parameters, real, float32 or wider, or nu_dtype.
    #: like nu, or bound_dtype; a learning rate, s_t. None where b3 is 0.
    bound: Any


class Step(NamedTuple):
    """Algorithm 1 at step t, for leaves of one dtype.

    m_t = b1 m_{t-1} + (1 - b1) g_t
    v_t = b2 v_{t-1} + (1 - b2) |g_t|^2
    eta_t = alpha_t / (sqrt(v_t / (1 - b2^t) + eps_root) + eps)
    s_t = b3 s_{t-1} + (1 - b3) eta_t
    update = min(eta_t, s_t) / alpha_t * m_t / (1 - b1^t)

    The chain multiplies the update by -alpha_t.
    """

    average_g: Average  # m_t, of m_{t-1} and g_t
    average_g2: Average  # v_t, of v_{t-1} and |g_t|^2
    average_eta: Average  # s_t, of s_{t-1} and eta_t
    eta: Rate  # eta_t, of v_t
    eta_per_alpha: Rate  # eta_t / alpha_t, of v_t
    s_per_alpha: BoundPerAlpha  # |s_t / alpha_t|, of s_t
    m_hat: Momentum  # m_t / (1 - b1^t), of m_t and g_t

    def averages(self, g: jax.Array, m: jax.Array, v: jax.Array, s: Any) -> tuple:
        """Returns m_t, v_t and s_t, of g_t and the averages of the step before."""
        g = g.astype(m.dtype)
        m = self.average_g(m, g)  # m_t
        v = self.average_g2(v, abs_sq(g))  # v_t
        if s is not None:
            s = self.average_eta(s, self.eta(v))  # s_t
        return m, v, s

    def update(self, g: jax.Array, m: jax.Array, v: jax.Array, s: Any) -> jax.Array:
        """Returns the update per unit of learning rate."""
        rate = self.eta_per_alpha.unmerged()(v)  # eta_t / alpha_t
        if s is not None:
            rate = jnp.minimum(rate, self.s_per_alpha(s))  # min(eta_t, s_t) / alpha_t
        update = self.m_hat(m, g.astype(m.dtype), times=rate)
        return update.astype(g.dtype)

    @classmethod
    def at(
        cls, count: Any, alpha: Any, hyperparameters: Hyperparameters, dtype: np.dtype
    ) -> "Step":
        """Returns step t = count, at which the learning rate is alpha."""
        h = hyperparameters
        b1, b2, b3, eps, eps_root = (
            x if isinstance(x, float) else jnp.asarray(x, dtype)
            for x in (h.b1, h.b2, h.b3, h.eps, h.eps_root)
        )
        alpha = jnp.asarray(alpha, dtype)
        t, next_t = (
            jnp.asarray(x, dtype) for x in (count, optax.safe_increment(count))
        )
        m_correction = bias_correction(b1, t)  # 1 / (1 - b1^t)
        v_correction = bias_correction(b2, t)  # 1 / (1 - b2^t)
        if h.convention == "paper":
            m_hat = Momentum(m_correction, None)
            eta_per_alpha = Rate(1.0, v_correction, eps, eps_root)
        else:  # both corrections are inside the rate
            m_hat = Momentum(1.0, None)
            corrections = m_correction * jax.lax.rsqrt(v_correction)
            eta_per_alpha = Rate(corrections, 1.0, eps, eps_root)
        if h.nesterov:
            m_hat = Momentum(b1 * bias_correction(b1, next_t), (1 - b1) * m_correction)
        return cls(
            average_g=Average.of(b1),
            average_g2=Average.of(b2),
            average_eta=Average.of(b3),
            eta=eta_per_alpha._replace(numerator=alpha * eta_per_alpha.numerator),
            eta_per_alpha=eta_per_alpha,
            s_per_alpha=BoundPerAlpha.of(alpha),
            m_hat=m_hat,
        )

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arithmetic."""
        return self.s_per_alpha.factor.dtype

    @property
    def m_per_root_v(self) -> jax.Array:
        """The largest |m_t| / sqrt(v_t) that averages of gradients have."""
        return largest_ratio(self.average_g, self.average_g2, self.dtype)


# A function of its own, so that leaves of one shape and dtype are traced once.
@functools.partial(jax.jit, static_argnames="form")
def _update_leaf(step, words, leaf, g, stored, form):
    """Returns the update of one leaf and its averages, as stored.

    If all averages are in 8 bits, GPUs and TPUs have kernels for it. All else is XLA's.
    ``form`` is None, unless a test forces one.
    """
    seed = Seed.of(words, leaf, g, stored)
    if stored.are_float8 and step.dtype == np.float32:
        return _kernels.update(_in_xla, form, step, seed, g, stored)
    return _in_xla(step, seed, g, stored)


def _in_xla(step, seed, g, stored):
    """As :func:`_update_leaf`, in XLA alone."""
    dtypes = jnp.result_type(g, step.dtype), step.dtype, step.dtype
    old = stored.load(dtypes, step.m_per_root_v)
    exponents = (None, None, None)
    if stored.any_float8:
        # A group's exponent is known when all its averages are. The barriers have XLA
        # compute these twice, instead of writing them to memory in between, which takes
        # longer on CPU.
        first = step.averages(jax.lax.optimization_barrier(g), *old)
        exponents = jax.lax.optimization_barrier(stored.exponents_of(first))
    new = step.averages(g, *old)
    stored = stored.store(new, exponents, seed)
    # The update uses what is stored, so that the state shows which rates it used.
    numbers = stored.load(dtypes, step.m_per_root_v)
    return step.update(g, *jax.tree.map(as_identity, new, numbers)), stored


def scale_by_adamod(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: jax.typing.DTypeLike | None = None,
    bound_dtype: jax.typing.DTypeLike | None = None,
    bound_learning_rate: optax.ScalarOrSchedule = 1.0,
    convention: Convention = "paper",
) -> optax.GradientTransformation:
    r"""Rescale updates according to the AdaMod algorithm.

    See :func:`optax_adamod.adamod` for the equations. This transformation returns the
    update per unit of learning rate,

    .. math::

      \min(\eta_t, s_t) / \alpha_t \cdot \hat{m}_t,

    so it takes the place of :func:`optax.scale_by_adam` in a chain.

    A constant learning rate :math:`\alpha` cancels, so ``bound_learning_rate`` is not
    needed for one. A schedule does not cancel, because the bound averages the rates of
    many steps: pass the same schedule to ``bound_learning_rate`` and to
    :func:`optax.scale_by_learning_rate`.

    Args:
      b1: Decay rate of the average of the gradients, in [0, 1).
      b2: Decay rate of the average of the squared gradients, in [0, 1).
      b3: Decay rate of the average of the learning rates, 0 or in [1e-3, 1). The
        bound opens over about ``1 / (1 - b3)`` steps; the number 0 gives Adam, without
        a bound in the state.
      eps: Added to the root of the second moment; at least 0, in units of the
        gradient.
      eps_root: Added to the second moment inside the root; at least 0, in units of
        the squared gradient. Needed to differentiate through an update.
      mu_dtype: Dtype of ``mu``, 'float8', 'bfloat16', 'float16', 'float32' or
        'float64'; None for the parameters' own. For a complex parameter it is complex64
        or wider, and cannot be 'float8'.
      nesterov: Whether to use Nesterov momentum, with ``convention='paper'`` only.
      nu_dtype: Dtype of ``nu``, 'float8', 'bfloat16', 'float32' or 'float64'; None for
        the parameters' real dtype, in at least float32.
      bound_dtype: Dtype of ``bound``, as ``nu_dtype``. In 'float8' it has no sign, so
        learning rates must not be negative.
      bound_learning_rate: Learning rate inside the bound, a scalar, or a schedule from
        the step count to one; in parameter units per unit of normalised gradient.
      convention: 'paper' for Algorithm 1 of the paper, 'torch' for the authors'
        PyTorch release.

    Returns:
      The corresponding :class:`optax.GradientTransformation`.

    Raises:
      ValueError: As :func:`optax_adamod.adamod`.
      TypeError: As :func:`optax_adamod.adamod`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_adamod import scale_by_adamod
      >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
      >>> schedule = optax.cosine_decay_schedule(0.4, decay_steps=20)
      >>> solver = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     scale_by_adamod(b3=0.9, bound_learning_rate=schedule),
      ...     optax.scale_by_learning_rate(schedule),
      ... )
      >>> params = jnp.array([1., 2., 3.])
      >>> print('Objective function: {:.2f}'.format(f(params)))
      Objective function: 14.00
      >>> opt_state = solver.init(params)
      >>> for step in range(1, 21):
      ...  grad = jax.grad(f)(params)
      ...  updates, opt_state = solver.update(grad, opt_state, params)
      ...  params = optax.apply_updates(params, updates)
      ...  if step % 5 == 0:
      ...   print('Objective function: {:.2f}'.format(f(params)))
      Objective function: 8.63
      Objective function: 2.52
      Objective function: 0.67
      Objective function: 0.46

    References:
      Ding et al, `Adaptive and Momental Bounds for Adaptive Learning Rate Methods
      <https://arxiv.org/abs/1910.12249>`_, 2019

    .. seealso:: :func:`optax_adamod.adamod`, :func:`optax_adamod.adamodw`.
    """
    hyperparameters = Hyperparameters.checked(
        b1, b2, b3, eps, eps_root, convention, nesterov
    )
    dtypes = _settings.state_dtypes(mu_dtype, nu_dtype, bound_dtype)
    if not hyperparameters.bounded:
        del dtypes["bound"]
    in_float8 = dtypes.get("bound") == "float8"
    bound_learning_rate = _settings.bound_learning_rate(bound_learning_rate, in_float8)

    def init_fn(params):
        _checks.parameters(params, dtypes)

        averages = {
            field: jax.tree.map(functools.partial(zeros_like, field, dtype), params)
            for field, dtype in dtypes.items()
        }
        count = jnp.zeros([], jnp.int32)
        return ScaleByAdamodState(count, **{"bound": None, **averages})

    def update_fn(updates, state, params=None):
        _checks.state_of_adamod(state, hyperparameters.bounded)
        count = optax.safe_increment(state.count)
        words = Seed.step_words(count)
        alpha = _settings.at_count(bound_learning_rate, state.count)
        if in_float8:  # which has no sign
            alpha = jnp.where(jnp.asarray(alpha) < 0, jnp.nan, alpha)
        step_in = functools.cache(
            functools.partial(Step.at, count, alpha, hyperparameters)
        )

        def update_leaf(path, g, p, *averages):
            stored = Averages(*map(_float8.as_float8, averages))
            if g is None:
                return None, stored
            _checks.gradient(path, g, stored)
            _checks.storage(path, p, stored, dtypes)
            return _update_leaf(
                step_in(real_dtype(g, *stored)),
                words,
                Seed.leaf_word(path),
                jnp.asarray(g),
                stored,
                _kernels.forced_form(),
            )

        gradients, treedef = jax.tree_util.tree_flatten_with_path(
            updates, is_leaf=lambda x: x is None
        )
        columns = [
            _checks.like_updates(gradients, treedef, field, getattr(state, field))
            if field in dtypes
            else [None] * len(gradients)
            for field in Averages._fields
        ]
        try:
            params = treedef.flatten_up_to(params)
        except ValueError:  # None, or another tree, which is not needed
            params = [None] * len(gradients)
        # Widening is intended here, even if the user's code forbids it.
        with jax.numpy_dtype_promotion("standard"):
            leaves = [
                update_leaf(path, g, p, *averages)
                for (path, g), p, *averages in zip(
                    gradients, params, *columns, strict=True
                )
            ]
        averages = {
            field: treedef.unflatten([getattr(stored, field) for _, stored in leaves])
            for field in dtypes
        }
        updates = treedef.unflatten([update for update, _ in leaves])
        return updates, ScaleByAdamodState(count, **{"bound": None, **averages})

    return optax.GradientTransformation(init_fn, update_fn)
