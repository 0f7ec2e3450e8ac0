"""Meshes of as many devices as there are: the accelerators, one included, or 8 CPUs.

``JAX_NUM_CPU_DEVICES=1 pytest`` runs the tests as a machine with one device does.
"""

import jax
from jax.sharding import AxisType

# A power of two, so that it divides the tests' arrays.
COUNT = min(8, 1 << (jax.device_count().bit_length() - 1))
# Of two axes the first is the longer.
_SHAPES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


def make_mesh(names, axis_types=AxisType.Auto, devices=COUNT):
    """A mesh of one axis or two, of one type or of a type each."""
    if isinstance(axis_types, AxisType):
        axis_types = (axis_types,) * len(names)
    return jax.make_mesh(
        (devices,) if len(names) == 1 else _SHAPES[devices],
        names,
        axis_types=axis_types,
        devices=jax.devices()[:devices],
    )
