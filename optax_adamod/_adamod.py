"""AdaMod.

Implementation of
"Adaptive and Momental Bounds for Adaptive Learning Rate Methods"
(https://arxiv.org/abs/1910.12249) by Jianbang Ding, Xuancheng Ren, Ruixuan Luo
and Xu Sun.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamod import _checks, _float8, _storage

Convention = Literal["paper", "torch"]


class ScaleByAdamodState(NamedTuple):
    """State for the AdaMod algorithm."""

    #: shape=(), dtype=jnp.int32.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates  #: like the parameters, in their dtype or mu_dtype.
    nu: optax.Updates  #: like the parameters, real, float32 or wider, or nu_dtype.
    #: like nu, or bound_dtype; in units of the learning rate. None where b3 is 0.
    bound: Any


# A function of its own, so that leaves of one shape and dtype are traced once.
@jax.jit
def _update_leaf(step, place, g, mu, nu, bound):
    """Algorithm 1 for one leaf; returns the update per unit of learning rate."""
    dtype = g.dtype
    g = g.astype(jnp.result_type(g, step.dtype))
    stored = _storage.Averages(mu, nu, bound)
    packed = stored.packed

    def averages(g):
        before = stored.load(packed, (g.dtype, step.dtype, step.dtype))
        return step.averages(g, *before)

    exponents = None, None, None
    if packed is not None:
        # A group's largest number determines its codes. The barrier has XLA compute the
        # averages twice, instead of writing them to memory between the two.
        exponents = stored.exponents(averages(jax.lax.optimization_barrier(g)))
    # The update uses what is stored, so that the state shows which rates it used.
    (mu, m), (nu, v), (bound, s) = stored.store(averages(g), exponents, place)
    # The same rate again, for XLA on CPU: see _Rate.respelled.
    rate = step.eta_per_alpha(v)  # η_t / α_t
    if s is not None:
        rate = jnp.minimum(rate, step.s_per_alpha(s))  # min(η_t, s_t) / α_t
    update = step.m_hat(m, g, times=rate)  # min(η_t, s_t) / α_t · m̂_t
    return update.astype(dtype), mu, nu, bound


class _Average(NamedTuple):
    """``b * old + (1 - b) * new``, exact in the smaller of ``b`` and ``1 - b``."""

    keep: jax.typing.ArrayLike | None  # 1 for b >= 1/2, else b; None for the number 0
    lean: jax.typing.ArrayLike  # 1/2 for b >= 1/2, else 0
    gain: jax.typing.ArrayLike  # 2 (1 - b)

    @classmethod
    def of(cls, b: float | jax.Array) -> "_Average":
        if isinstance(b, float):
            return cls(*(1.0, 0.5) if b >= 0.5 else (b or None, 0.0), 2 * (1 - b))
        near = b >= 0.5
        lean = jnp.where(near, 0.5, jnp.zeros_like(b))
        return cls(jnp.where(near, 1, b), lean, 2 * (1 - b))

    def __call__(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """Returns ``old + (1 - b) * (new - old)`` for ``b >= 0.5``.

        It subtracts halves, because the difference of two finite numbers may be
        infinite.
        """
        if self.keep is None:
            return new
        finite = old
        if not jnp.iscomplexobj(old):
            # An infinite average stays infinite: less infinity it would be NaN.
            largest = jnp.finfo(old.dtype).max
            finite = jnp.clip(old, -largest, largest)
        towards = self.gain * (0.5 * new - self.lean * finite)
        return jnp.asarray(self.keep * old + towards)


class _Rate(NamedTuple):
    """The adaptive learning rate, of the average of the squared gradients."""

    numerator: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike  # 1 / (1 - b2**t), so that scale * v is the corrected v
    eps: jax.typing.ArrayLike
    eps_root: jax.typing.ArrayLike

    def __call__(self, v: jax.Array) -> jax.Array:
        root = jnp.sqrt(self.scale * v + self.eps_root)
        return jnp.divide(self.numerator, root + self.eps)

    def respelled(self) -> "_Rate":
        """Returns the same rate, with numerator and denominator scaled by 1/2.

        Scaling both leaves the rate unchanged but stops XLA on CPU from merging it with
        the rate in the bound. Merged, XLA would write the root to memory, which takes
        longer than the rest of the update.
        """
        return _Rate(
            0.5 * self.numerator,
            0.25 * self.scale,
            0.5 * self.eps,
            0.25 * self.eps_root,
        )


class _BoundPerAlpha(NamedTuple):
    """The magnitude of the bound per unit of learning rate."""

    factor: jax.Array  # 1 / |alpha|
    slack: jax.Array  # 0, and the largest number where alpha is 0

    @classmethod
    def of(cls, alpha: jax.Array) -> "_BoundPerAlpha":
        largest, tiny = (getattr(jnp.finfo(alpha.dtype), x) for x in ("max", "tiny"))
        # At alpha = 0 there is no bound: the update is Adam's, and the chain scales it.
        is_zero = jnp.abs(alpha) < tiny
        factor = 1 / jnp.where(is_zero, 1, jnp.abs(alpha))
        return cls(factor, jnp.where(is_zero, largest, 0))

    def __call__(self, s: jax.Array) -> jax.Array:
        return jnp.abs(s) * self.factor + self.slack


class _Momentum(NamedTuple):
    """The bias-corrected average of the gradients, with Nesterov's look-ahead."""

    of_m: jax.typing.ArrayLike
    of_g: jax.Array | None

    def __call__(self, m: jax.Array, g: jax.Array, *, times: jax.Array) -> jax.Array:
        """Returns the momentum times a rate.

        The rate is multiplied by the bias correction before m. If a square overflows,
        the rate is 0, and so is the product. The momentum alone could be infinite, and
        0 times infinity is NaN.
        """
        rate = times
        update = (rate * self.of_m).astype(m.dtype) * m
        if self.of_g is not None:
            update += (rate * self.of_g).astype(g.dtype) * g
        return update


class _Step(NamedTuple):
    """Algorithm 1 at one step, for all leaves of one dtype."""

    average_g: _Average  #: m_t, of m_{t-1} and g_t
    average_g2: _Average  #: v_t, of v_{t-1} and |g_t|^2
    average_eta: _Average  #: s_t, of s_{t-1} and eta_t
    eta: _Rate  #: eta_t, of v_t
    eta_per_alpha: _Rate  #: eta_t / alpha_t, of v_t
    s_per_alpha: _BoundPerAlpha  #: |s_t / alpha_t|, of s_t
    m_hat: _Momentum  #: of m_t and g_t

    @property
    def dtype(self) -> np.dtype:
        return self.s_per_alpha.factor.dtype

    def averages(
        self, g: jax.Array, m: jax.Array, v: jax.Array, s: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns m_t, v_t and s_t, of g_t and those of the step before."""
        m = self.average_g(m, g)
        v = self.average_g2(v, jnp.real(jnp.conj(g) * g))
        if s is not None:  # the average of the rates of v_t before it is rounded
            s = self.average_eta(s, self.eta(v))
        return m, v, s


class Hyperparameters(NamedTuple):
    """The settings of a whole run, checked; numbers are Python floats."""

    b1: float | jax.Array
    b2: float | jax.Array
    b3: float | jax.Array
    eps: float | jax.Array
    eps_root: float | jax.Array
    convention: Convention
    nesterov: bool

    @property
    def bounded(self) -> bool:
        """Whether there is a bound: not if b3 is the Python number 0, as in Adam."""
        return not (isinstance(self.b3, float) and self.b3 == 0.0)

    @classmethod
    def checked(cls, b1, b2, b3, eps, eps_root, convention, nesterov=False):
        _checks.choice("convention", convention, get_args(Convention))
        if nesterov and convention != "paper":
            raise ValueError(
                "nesterov=True is defined for convention='paper' alone, got "
                f"convention={convention!r}."
            )
        return cls(
            _checks.decay_rate("b1", b1),
            _checks.decay_rate("b2", b2),
            _checks.decay_rate_of_bound("b3", b3),
            _checks.nonnegative("eps", eps),
            _checks.nonnegative("eps_root", eps_root),
            convention,
            nesterov,
        )

    def at_step(
        self,
        count: jax.typing.ArrayLike,
        alpha: jax.typing.ArrayLike,
        dtype: np.dtype,
    ) -> _Step:
        """Returns the step that is the ``count``-th, in arithmetic of ``dtype``."""
        b1, b2, b3, eps, eps_root = (
            x if isinstance(x, float) else jnp.asarray(x, dtype) for x in self[:5]
        )
        alpha = jnp.asarray(alpha, dtype)
        t, next_t = (
            jnp.asarray(x, dtype) for x in (count, optax.safe_increment(count))
        )
        m_correction, v_correction = _bias_correction(b1, t), _bias_correction(b2, t)
        if self.convention == "paper":
            m_hat = _Momentum(m_correction, None)
            eta_per_alpha = _Rate(1.0, v_correction, eps, eps_root)
        else:  # both corrections are inside the rate
            m_hat = _Momentum(1.0, None)
            corrections = m_correction * jax.lax.rsqrt(v_correction)
            eta_per_alpha = _Rate(corrections, 1.0, eps, eps_root)
        if self.nesterov:
            m_hat = _Momentum(
                b1 * _bias_correction(b1, next_t), (1 - b1) * m_correction
            )
        return _Step(
            average_g=_Average.of(b1),
            average_g2=_Average.of(b2),
            average_eta=_Average.of(b3),
            eta=eta_per_alpha._replace(numerator=alpha * eta_per_alpha.numerator),
            eta_per_alpha=eta_per_alpha.respelled(),
            s_per_alpha=_BoundPerAlpha.of(alpha),
            m_hat=m_hat,
        )


def _bias_correction(b: float | jax.Array, t: jax.Array) -> jax.Array:
    """Returns ``1 / (1 - b**t)`` without cancellation where ``b**t`` is near 1."""
    if isinstance(b, float):
        return -1 / jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)
    # For b < 1/2 use the power itself: at b = 0, log b has no derivative.
    near = b >= 0.5
    complement = -jnp.expm1(t * jnp.log(jnp.where(near, b, 0.5)))
    return 1 / jnp.where(near, complement, 1 - jnp.where(near, 0, b) ** t)


def real_dtype(*values: Any) -> np.dtype:
    """Returns the real dtype for arithmetic on ``values``: theirs, or float32."""
    wide = (x for x in values if not isinstance(x, _float8.Float8Array))
    bits = (jnp.finfo(jnp.result_type(x)).bits for x in wide if x is not None)
    bits = max(bits, default=32)
    return np.dtype(np.float64 if bits == 64 else np.float32)


def _zeros_like(
    param: Any, dtype: np.dtype | Literal["float8"], *, signed: bool
) -> _storage.Stored:
    """Returns zeros in the shards of ``param``, and in its kind of memory."""
    if dtype != "float8":
        return _zeros(param, dtype, jnp.shape(param))
    if not _float8.is_grouped(jnp.shape(param)):
        return _zeros(param, np.dtype(np.float32), jnp.shape(param))
    codes = _zeros(param, _float8.code_dtype(signed), param.shape)
    exponents = _zeros(param, np.dtype(np.uint8), _float8.groups(param.shape))
    return _float8.Float8Array(codes, exponents)


def _zeros(param: Any, dtype: np.dtype, shape: tuple[int, ...]) -> jax.Array:
    if isinstance(param, jax.Array) and not isinstance(param, jax.core.Tracer):
        sharding = _float8.sharding_of(shape, param.sharding)
        default = next(iter(sharding.device_set)).default_memory().kind
        if sharding.memory_kind not in (None, default):
            # Shard by shard: no program of the device's writes to another memory.
            zeros = np.broadcast_to(np.zeros((), dtype), shape)
            return jax.make_array_from_callback(
                shape, sharding, lambda index: zeros[index]
            )
        if (
            isinstance(sharding, jax.sharding.NamedSharding)
            and sharding.num_devices > 1
        ):
            # Outside jit, jnp.zeros_like makes all of them on one device, and copies.
            zeros = jax.jit(
                functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding
            )
            return zeros()
    if shape != jnp.shape(param):  # of exponents, with the type that a trace gives them
        param = _float8.first_of_groups(jnp.asarray(param))
    return jnp.zeros_like(param, dtype=dtype)


def _mu_dtype(
    param: Any, mu_dtype: np.dtype | Literal["float8"] | None
) -> np.dtype | Literal["float8"]:
    dtype = jnp.result_type(param)
    if mu_dtype is None:
        return dtype
    if mu_dtype != "float8" and jnp.issubdtype(dtype, jnp.complexfloating):
        return np.result_type(mu_dtype, np.complex64)
    return mu_dtype


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
        'float64'; None for the parameters' own. The accumulator of a complex parameter
        is complex of that precision, and cannot be 'float8'.
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
      ValueError: If a number whose value is known is out of its range (a traced number
        passes); if ``convention`` is unknown, or ``nesterov`` is combined with
        ``convention='torch'``. From ``init``, if explicit mesh axes split groups of
        'float8'. From ``update``, if structures or shapes of the updates
        and the state differ, or the state is a stack of states.
      TypeError: If an argument is not a number; if a decay rate or an epsilon is
        an array of less than 32 bits, or an accumulator cannot have its dtype.
        From ``init``, if a parameter is neither floating nor complex. From ``update``,
        if a gradient and its parameter differ in kind, or the state is not AdaMod's.

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
    bound_learning_rate = _checks.scalar_or_schedule(
        "bound_learning_rate", bound_learning_rate
    )
    mu_dtype = _checks.mu_dtype(mu_dtype)
    nu_dtype = _checks.rate_dtype("nu_dtype", nu_dtype)
    bound_dtype = _checks.rate_dtype("bound_dtype", bound_dtype)
    _checks.signs("bound_learning_rate", bound_learning_rate, bound_dtype)
    bounded = hyperparameters.bounded

    def init_fn(params):
        _checks.parameters(
            params, mu_dtype=mu_dtype, nu_dtype=nu_dtype, bound_dtype=bound_dtype
        )

        def zeros(dtype_of, *, signed=False):
            return jax.tree.map(
                lambda p: _zeros_like(p, dtype_of(p), signed=signed), params
            )

        def or_real(dtype):
            return lambda p: real_dtype(p) if dtype is None else dtype

        return ScaleByAdamodState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros(lambda p: _mu_dtype(p, mu_dtype), signed=True),
            nu=zeros(or_real(nu_dtype)),
            bound=zeros(or_real(bound_dtype)) if bounded else None,
        )

    def update_fn(updates, state, params=None):
        del params
        _checks.state_of_adamod(state, bounded)
        count = optax.safe_increment(state.count)
        alpha = _checks.at_count(bound_learning_rate, state.count)
        step = functools.cache(
            lambda dtype: hyperparameters.at_step(count, alpha, dtype)
        )
        gradients, treedef = jax.tree_util.tree_flatten_with_path(
            updates, is_leaf=lambda x: x is None
        )
        averages = {"mu": state.mu, "nu": state.nu}
        if bounded:
            averages["bound"] = state.bound
        _checks.same_structure(gradients, treedef, averages)
        stored = zip(*map(treedef.flatten_up_to, averages.values()), strict=True)
        leaves = []
        # Widening is intended here, even if the user's code forbids it.
        with jax.numpy_dtype_promotion("standard"):
            for index, ((path, g), leaf) in enumerate(
                zip(gradients, stored, strict=True)
            ):
                leaf = tuple(map(_float8.as_float8, leaf))
                mu, nu, bound = leaf if bounded else (*leaf, None)
                if g is None:
                    leaves.append((None, mu, nu, bound))
                    continue
                _checks.gradient(path, g, **dict(zip(averages, leaf, strict=True)))
                place = count, np.uint32(index)
                of_dtype = step(real_dtype(g, *leaf))
                leaves.append(
                    _update_leaf(of_dtype, place, jnp.asarray(g), mu, nu, bound)
                )
        updates, mu, nu, bound = (
            treedef.unflatten([leaf[i] for leaf in leaves]) for i in range(4)
        )
        if not bounded:
            bound = None
        return updates, ScaleByAdamodState(count=count, mu=mu, nu=nu, bound=bound)

    return optax.GradientTransformation(init_fn, update_fn)
