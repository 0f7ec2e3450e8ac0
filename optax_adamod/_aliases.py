"""The optimizers: AdaMod's transformation in a chain with the learning rate."""

import jax
import optax

from optax_adamod._adamod import scale_by_adamod
from optax_adamod._settings import Convention, scalar_or_schedule


def adamod(
    learning_rate: optax.ScalarOrSchedule,
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
    convention: Convention = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""The AdaMod optimizer.

    AdaMod is Adam with a bound on its learning rates. In its first steps Adam divides
    by an average of few squared gradients. Some coordinates then take steps from which
    training never recovers, unless a warm-up keeps the learning rate small. AdaMod
    averages the learning rate of each coordinate over time, and no step takes a larger
    rate than this average, the bound. The bound starts at zero, so every coordinate
    warms up over about :math:`1/(1-\beta_3)` steps, without a schedule.

    Let :math:`\alpha_t` represent the learning rate and :math:`\beta_1, \beta_2,
    \beta_3, \varepsilon, \bar{\varepsilon}` the arguments ``b1``, ``b2``, ``b3``,
    ``eps`` and ``eps_root``. The ``init`` function of this optimizer initializes the
    averages :math:`(m_0, v_0, s_0) = (0, 0, 0)`, and at step :math:`t = 1, 2, \ldots`
    the ``update`` function takes the gradients :math:`g_t` and computes

    .. math::

      \begin{align*}
        m_t &\leftarrow \beta_1 \cdot m_{t-1} + (1-\beta_1) \cdot g_t \\
        v_t &\leftarrow \beta_2 \cdot v_{t-1} + (1-\beta_2) \cdot |g_t|^2 \\
        \hat{m}_t &\leftarrow m_t / (1-\beta_1^t) \\
        \hat{v}_t &\leftarrow v_t / (1-\beta_2^t) \\
        \eta_t &\leftarrow \alpha_t / \left(\sqrt{\hat{v}_t + \bar{\varepsilon}}
        + \varepsilon\right) \\
        s_t &\leftarrow \beta_3 \cdot s_{t-1} + (1-\beta_3) \cdot \eta_t \\
        u_t &\leftarrow -\min(\eta_t, s_t) \cdot \hat{m}_t.
      \end{align*}

    With :math:`\beta_3 = 0` this is Adam, whose state holds no bound. The bound
    :math:`s_t` has no bias correction. It averages :math:`\alpha_t` too, so under a
    schedule it remembers the learning rates of about the last :math:`1/(1-\beta_3)`
    steps. Where :math:`\alpha_t` is negative, so is :math:`\eta_t`; the bound then
    acts on magnitudes, :math:`\operatorname{sign}(\alpha_t) \min(|\eta_t|, |s_t|)`.

    With ``nesterov=True``, as in :func:`optax.adam`,

    .. math::

      \hat{m}_t \leftarrow
        \beta_1 m_t / (1-\beta_1^{t+1}) + (1-\beta_1) g_t / (1-\beta_1^t).

    The authors' PyTorch code, from which the paper's results come, differs from the
    paper; ``convention='torch'`` reproduces it. Both bias corrections are inside the
    averaged rate, and :math:`\varepsilon` is not corrected:

    .. math::

      \begin{align*}
        \eta_t &\leftarrow \alpha_t \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t} /
        \left(\sqrt{v_t + \bar{\varepsilon}} + \varepsilon\right) \\
        u_t &\leftarrow -\min(\eta_t, s_t) \cdot m_t.
      \end{align*}

    AdaMod rounds averages in bfloat16 and in 8 bits stochastically. An average in 8
    bits, ``'float8'``, is an :class:`optax_adamod.Float8Array` where the last dimension
    of the parameter is a multiple of 128. The page on memory says which other
    parameters have none, and what each dtype costs.

    Args:
      learning_rate: A scalar, or a schedule from the step count to one; in parameter
        units per unit of normalised gradient. A coordinate moves by about this much
        per step once the bound is open. A negative one ascends, bounded alike.
      b1: Decay rate of the average of the gradients, in [0, 1).
      b2: Decay rate of the average of the squared gradients, in [0, 1).
      b3: Decay rate of the average of the learning rates, 0 or in [1e-3, 1). The
        bound opens over about ``1 / (1 - b3)`` steps; the number 0 gives Adam, without
        a bound in the state.
      eps: Added to the root of the second moment, where it avoids a division by zero;
        at least 0, in units of the gradient.
      eps_root: Added to the second moment inside the root; at least 0, in units of
        the squared gradient. Needed to differentiate through an update.
      mu_dtype: Dtype of the average of the gradients, 'float8', 'bfloat16', 'float16',
        'float32' or 'float64'; None for the parameters' own. For a complex parameter it
        is complex64 or wider, and cannot be 'float8'.
      nesterov: Whether to use Nesterov momentum, with ``convention='paper'`` only.
      nu_dtype: Dtype of the average of the squared gradients, 'float8', 'bfloat16',
        'float32' or 'float64'; None for the parameters' real dtype, in at least
        float32.
      bound_dtype: Dtype of the average of the learning rates, as ``nu_dtype``. In
        'float8' it has no sign, so learning rates must not be negative.
      convention: 'paper' for Algorithm 1 of the paper, 'torch' for the authors'
        PyTorch release.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: If a number whose value is known is out of its range (a traced number
        passes, and as ``b3`` a JAX array that is not 0); if ``convention`` is unknown,
        or ``nesterov`` is combined with ``convention='torch'``. From ``init``, if
        explicit mesh axes split groups of 'float8'. From ``update``, if structures or
        shapes of the updates and the state differ, the state is a stack of states, has
        a bound and ``b3`` is 0 or the reverse, or a schedule returns no real scalar.
      TypeError: If an argument is not a number; if a decay rate or an epsilon is
        an array of less than 32 bits, or an accumulator cannot have its dtype.
        From ``init``, if a parameter is neither floating nor complex. From ``update``,
        if a gradient and its parameter differ in kind, the state is not AdaMod's, or
        its dtypes are not those of the settings.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_adamod import adamod
      >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
      >>> solver = adamod(learning_rate=0.3, b3=0.9)
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
      Objective function: 9.81
      Objective function: 4.07
      Objective function: 1.05
      Objective function: 0.36

    References:
      Ding et al, `Adaptive and Momental Bounds for Adaptive Learning Rate Methods
      <https://arxiv.org/abs/1910.12249>`_, 2019

      Ding et al, Adaptive and Momental Bounds for Adaptive Learning Rate Methods,
      NLPCC 2023, LNCS 14302, pp. 361-372

      `The authors' PyTorch release <https://pypi.org/project/adamod/>`_, 2019

    .. note::
      :func:`optax.inject_hyperparams` takes every callable for a schedule, so pass
      dtypes as strings, ``mu_dtype='bfloat16'``. It turns ``b3`` into a float32 array,
      in which :math:`1-\beta_3` has a relative error of 1e-5 at 0.999 and of 2e-4 at
      0.9999. Name ``b3`` in ``static_args`` to keep its exact value.

    .. seealso:: :func:`optax_adamod.adamodw`, :func:`optax_adamod.scale_by_adamod`,
      :func:`optax.adam`.
    """
    learning_rate = scalar_or_schedule("learning_rate", learning_rate)
    return optax.chain(
        scale_by_adamod(
            b1=b1,
            b2=b2,
            b3=b3,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
            nu_dtype=nu_dtype,
            bound_dtype=bound_dtype,
            bound_learning_rate=learning_rate,
            convention=convention,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamodw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: optax.MaskOrFn = None,
    *,
    nesterov: bool = False,
    nu_dtype: jax.typing.DTypeLike | None = None,
    bound_dtype: jax.typing.DTypeLike | None = None,
    convention: Convention = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""AdaMod with decoupled weight decay.

    The update is that of :func:`optax_adamod.adamod`, which explains the symbols. In
    the same step the parameters decay by the learning rate times ``weight_decay``,
    :math:`\lambda`:

    .. math::

      u_t \leftarrow -\min(\eta_t, s_t) \cdot \hat{m}_t
        - \alpha_t \cdot \lambda \cdot \theta_{t-1}.

    The bound does not limit the decay, as in the authors' release.

    Args:
      learning_rate: A scalar, or a schedule from the step count to one; in parameter
        units per unit of normalised gradient. A coordinate moves by about this much
        per step once the bound is open. A negative one ascends, bounded alike.
      b1: Decay rate of the average of the gradients, in [0, 1).
      b2: Decay rate of the average of the squared gradients, in [0, 1).
      b3: Decay rate of the average of the learning rates, 0 or in [1e-3, 1). The
        bound opens over about ``1 / (1 - b3)`` steps; the number 0 gives Adam, without
        a bound in the state.
      eps: Added to the root of the second moment, where it avoids a division by zero;
        at least 0, in units of the gradient.
      eps_root: Added to the second moment inside the root; at least 0, in units of
        the squared gradient. Needed to differentiate through an update.
      mu_dtype: Dtype of the average of the gradients, 'float8', 'bfloat16', 'float16',
        'float32' or 'float64'; None for the parameters' own. For a complex parameter it
        is complex64 or wider, and cannot be 'float8'.
      weight_decay: Strength of the weight decay, per unit of learning rate: a scalar,
        or a schedule from the step count to one.
      mask: A tree of booleans with the structure of the parameters or a prefix of it,
        or a function from the parameters to such a tree. True for the leaves that
        decay; None for all leaves.
      nesterov: Whether to use Nesterov momentum, with ``convention='paper'`` only.
      nu_dtype: Dtype of the average of the squared gradients, 'float8', 'bfloat16',
        'float32' or 'float64'; None for the parameters' real dtype, in at least
        float32.
      bound_dtype: Dtype of the average of the learning rates, as ``nu_dtype``. In
        'float8' it has no sign, so learning rates must not be negative.
      convention: 'paper' for Algorithm 1 of the paper, 'torch' for the authors'
        PyTorch release.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: As :func:`optax_adamod.adamod`.
      TypeError: As :func:`optax_adamod.adamod`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_adamod import adamodw
      >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
      >>> solver = adamodw(learning_rate=0.3, b3=0.9, weight_decay=1e-2)
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
      Objective function: 9.49
      Objective function: 3.75
      Objective function: 0.91
      Objective function: 0.35

    References:
      Ding et al, `Adaptive and Momental Bounds for Adaptive Learning Rate Methods
      <https://arxiv.org/abs/1910.12249>`_, 2019

      Loshchilov et al, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019

    .. seealso:: :func:`optax_adamod.adamod`, :func:`optax_adamod.scale_by_adamod`,
      :func:`optax.adamw`.
    """
    learning_rate = scalar_or_schedule("learning_rate", learning_rate)
    weight_decay = scalar_or_schedule("weight_decay", weight_decay)
    return optax.chain(
        scale_by_adamod(
            b1=b1,
            b2=b2,
            b3=b3,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
            nu_dtype=nu_dtype,
            bound_dtype=bound_dtype,
            bound_learning_rate=learning_rate,
            convention=convention,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
