"""One pass over the averages of a leaf in 8 bits, on GPUs and TPUs, and who takes it.

XLA would compute the averages twice, once for the exponents and once for the codes. A
kernel reads codes and gradients once and writes new codes in the place of the old.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.sharding import AxisType

from optax_adamod import _mosaic, _triton
from optax_adamod._storage import Averages

Form = Literal["gpu", "tpu", "xla"]
_forced: contextvars.ContextVar[Form | None] = contextvars.ContextVar(
    "form", default=None
)


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """Updates by one form on every platform; kernels of others are interpreted."""
    token = _forced.set(form)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_form() -> Form | None:
    """Returns the form that is forced, or None."""
    return _forced.get()


def update(
    xla: Callable[..., Any], form: Form | None, *arguments: Any
) -> tuple[jax.Array, Averages]:
    """Returns the update of one leaf and its averages, by the platform's form.

    Args:
      xla: The same in XLA, of ``step, seed, g, stored``.
      form: The form that is forced, or None for the platform's.
      *arguments: What ``xla`` takes.
    """
    leaves, tree = jax.tree.flatten(arguments)

    def flat(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *leaves: function(*tree.unflatten(leaves))

    def on_gpu(step, seed, g, stored, *, interpret=False):
        stored = _triton.advance(step, seed, g, stored, interpret=interpret)
        numbers = stored.load([step.dtype] * 3, step.m_per_root_v)
        return step.update(g, *numbers), stored

    forms = dict(default=flat(xla))
    native = dict(gpu="cuda", tpu="tpu")
    kernels = dict(gpu=on_gpu, tpu=_mosaic.update)
    for name in ("gpu", "tpu") if form is None else (form,):
        if name == "xla" or not _fits(name, arguments[2], form is not None):
            continue
        forms[native[name]] = flat(kernels[name])
        if form is not None:
            forms["default"] = flat(functools.partial(kernels[name], interpret=True))

    @jax.custom_batching.custom_vmap
    def batched(*leaves):
        return jax.lax.platform_dependent(*leaves, **forms)

    @batched.def_vmap
    def rule(axis_size, in_batched, *leaves):
        axes = [0 if x else None for x in in_batched]
        new = jax.vmap(flat(xla), axes, axis_size=axis_size)(*leaves)
        return new, jax.tree.map(lambda _: True, new)

    differentiable = jax.custom_jvp(batched)

    @differentiable.defjvp
    def derivative(primals, tangents):
        return jax.jvp(flat(xla), primals, tangents)

    del rule, derivative
    return differentiable(*leaves)


def _fits(form: Form, g: jax.Array, is_forced: bool) -> bool:
    """Returns whether a kernel can be had for a leaf with this gradient."""
    if not all(isinstance(x, int) for x in g.shape):  # symbols of jax.export
        return False
    mesh = jax.typeof(g).sharding.mesh
    sizes = dict.fromkeys(AxisType, 1)
    if mesh.empty and not is_forced:  # XLA may split the leaf, unknown to its type
        sizes[AxisType.Auto] = jax.device_count()
    for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True):
        sizes[kind] *= size
    if form == "tpu":  # libtpu has no custom_partitioning
        return sizes[AxisType.Auto] == 1 and max(g.shape) < 2**31
    # Triton's offsets have 32 bits. Axes of both kinds have no common partitioning.
    both = {AxisType.Auto, AxisType.Explicit} <= {*mesh.axis_types}
    return gpu_has_kernels() and g.size < 2**31 and not both


def gpu_has_kernels() -> bool:
    """Returns whether Triton's kernels run here: from compute capability 8.0 on.

    Where no GPU is at hand, as when one compiles for it elsewhere, it is taken to be
    new enough. Other makes than NVIDIA's run the form of XLA anyhow.
    """
    gpus = [x.compute_capability for x in jax.local_devices() if x.platform == "gpu"]
    # AMD's are such as gfx942.
    return all(x[:3] != "gfx" and float(x) >= 8.0 for x in gpus)
