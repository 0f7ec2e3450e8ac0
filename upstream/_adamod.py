# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""AdaMod.

Implementation of
"Adaptive and Momental Bounds for Adaptive Learning Rate Methods"
(https://arxiv.org/abs/1910.12249) by Jianbang Ding, Xuancheng Ren, Ruixuan Luo
and Xu Sun.
"""

from typing import Any, Callable, NamedTuple, Optional, Union

import jax
import jax.numpy as jnp

from optax._src import base
from optax._src import combine
from optax._src import numerics
from optax._src import transform
from optax._src import utils
import optax.tree


class ScaleByAdamodState(NamedTuple):
  """State for the AdaMod algorithm.

  Attributes:
    count: number of updates so far.
    mu: average of the gradients.
    nu: average of the squared gradients.
    bound: average of the learning rates, those of the coordinates.
  """

  count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
  mu: base.Updates
  nu: base.Updates
  bound: base.Updates


def scale_by_adamod(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Optional[jax.typing.DTypeLike] = None,
    *,
    bound_learning_rate: base.ScalarOrSchedule = 1.0,
) -> base.GradientTransformation:
  r"""Rescale updates according to the AdaMod algorithm.

  See :func:`optax.contrib.adamod` for the equations. The update is
  :math:`\min(\eta_t, s_t) / \alpha_t \cdot \hat{m}_t`, to be scaled by the
  learning rate. A constant learning rate cancels; a schedule has to be given
  here as well, because the bound averages the learning rates of many steps.

  Args:
    b1: Decay rate of the average of the gradients.
    b2: Decay rate of the average of the squared gradients.
    b3: Decay rate of the average of the learning rates; 0 gives Adam.
    eps: Added to the root of the second moment to avoid a division by zero.
    eps_root: Added to the second moment inside the root, where gradients are
      backpropagated through the update.
    mu_dtype: Dtype of the first moment; if None that of the parameters.
    bound_learning_rate: The learning rate inside the bound.

  Returns:
    A :class:`optax.GradientTransformation` object.
  """

  mu_dtype = utils.canonicalize_dtype(mu_dtype)

  def init_fn(params):
    def zeros(p):  # In at least float32: 0.999 * x is x in bfloat16.
      dtype = jnp.finfo(jnp.result_type(p)).dtype
      return jnp.zeros_like(p, dtype=jnp.promote_types(dtype, jnp.float32))

    return ScaleByAdamodState(
        count=jnp.zeros([], jnp.int32),
        mu=optax.tree.zeros_like(params, dtype=mu_dtype),
        nu=jax.tree.map(zeros, params),
        bound=jax.tree.map(zeros, params),
    )

  def update_fn(updates, state, params=None):
    del params
    alpha = bound_learning_rate
    if callable(alpha):
      alpha = alpha(state.count)
    count = numerics.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    mu_hat = optax.tree.bias_correction(mu, b1, count)
    nu_hat = optax.tree.bias_correction(nu, b2, count)
    rate = jax.tree.map(lambda v: 1 / (jnp.sqrt(v + eps_root) + eps), nu_hat)
    eta = optax.tree.scale(alpha, rate)
    bound = optax.tree.update_moment(eta, state.bound, b3, 1)
    # Where the learning rate is zero, by which the chain scales, nothing bounds.
    is_zero = jnp.equal(alpha, 0)
    per_alpha = 1 / jnp.where(is_zero, 1, alpha)

    def bounded(r, s):
      return jnp.where(is_zero, r, jnp.minimum(r, s * per_alpha))

    updates = jax.tree.map(
        lambda g, r, s, m: (bounded(r, s) * m).astype(g.dtype),
        updates,
        rate,
        bound,
        mu_hat,
    )
    mu = optax.tree.cast(mu, mu_dtype)
    return updates, ScaleByAdamodState(count=count, mu=mu, nu=nu, bound=bound)

  return base.GradientTransformation(init_fn, update_fn)


def adamod(
    learning_rate: base.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Optional[jax.typing.DTypeLike] = None,
    weight_decay: base.ScalarOrSchedule = 0.0,
    mask: Optional[Union[Any, Callable[[base.Params], Any]]] = None,
) -> base.GradientTransformationExtraArgs:
  r"""The AdaMod optimizer.

  AdaMod is Adam with a bound on its learning rates: it averages the learning
  rate of every coordinate and takes no step with a larger one. The average
  starts at zero, so that every coordinate warms up over about
  :math:`1/(1-\beta_3)` steps.

  With the learning rate :math:`\alpha_t`, the gradients :math:`g_t` and
  :math:`(m_0, v_0, s_0) = (0, 0, 0)`,

  .. math::

    \begin{align*}
      m_t &\leftarrow \beta_1 \cdot m_{t-1} + (1-\beta_1) \cdot g_t \\
      v_t &\leftarrow \beta_2 \cdot v_{t-1} + (1-\beta_2) \cdot |g_t|^2 \\
      \hat{m}_t &\leftarrow m_t / (1-\beta_1^t) \\
      \hat{v}_t &\leftarrow v_t / (1-\beta_2^t) \\
      \eta_t &\leftarrow \alpha_t / \left(\sqrt{\hat{v}_t + \bar{\varepsilon}}
      + \varepsilon\right) \\
      s_t &\leftarrow \beta_3 \cdot s_{t-1} + (1-\beta_3) \cdot \eta_t \\
      u_t &\leftarrow -\min(\eta_t, s_t) \cdot \hat{m}_t
        - \alpha_t \lambda \theta_{t-1}.
    \end{align*}

  Args:
    learning_rate: A global scaling factor, a scalar or a schedule.
    b1: Decay rate of the average of the gradients.
    b2: Decay rate of the average of the squared gradients.
    b3: Decay rate of the average of the learning rates; 0 gives Adam.
    eps: Added to the root of the second moment to avoid a division by zero.
    eps_root: Added to the second moment inside the root, where gradients are
      backpropagated through the update.
    mu_dtype: Dtype of the first moment; if None that of the parameters.
    weight_decay: Strength of the decoupled weight decay regularization.
    mask: A tree with the structure of the parameters or a prefix of it, with
      booleans for leaves, or a function to such a tree: what decays.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import optax
    >>> from optax import contrib
    >>> import jax
    >>> import jax.numpy as jnp
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = contrib.adamod(learning_rate=0.3, b3=0.9)
    >>> params = jnp.array([1., 2., 3.])
    >>> print('Objective function: ', f(params))
    Objective function:  14.0
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
  """
  return combine.chain(
      scale_by_adamod(
          b1=b1,
          b2=b2,
          b3=b3,
          eps=eps,
          eps_root=eps_root,
          mu_dtype=mu_dtype,
          bound_learning_rate=learning_rate,
      ),
      transform.add_decayed_weights(weight_decay, mask),
      transform.scale_by_learning_rate(learning_rate),
  )
