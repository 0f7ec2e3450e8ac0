"""Accelerators that need not be there, for which programs are compiled."""

import contextlib
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, SingleDeviceSharding

AXES = ("slice", "fsdp")
H100 = Path(__file__).parent / "h100.txtpb"
TARGETS = {
    "H100": dict(platform="cuda", topology_name="h100", topology="1x1x1"),
    "v5e 16x16": dict(platform="tpu", topology_name="v5e:16x16"),
    "v5p 8x8x8": dict(platform="tpu", topology_name="v5p:8x8x8"),
    "2 slices of v5e 16x16": dict(
        platform="tpu", topology_name="v5e:16x16", num_slices=2
    ),
}


def without_hardware() -> None:
    """Keeps JAX on CPU, and libtpu from looking for TPUs or being the only one."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-256",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


@functools.cache
def mesh(target: str, axes: str) -> Mesh:
    """Returns the target's devices, in as many slices as have 256 at most."""
    options: dict[str, Any] = dict(TARGETS[target])
    if options["platform"] == "cuda":
        options["target_config"] = H100.read_text()
    devices = np.asarray(topologies.get_topology_desc(**options).devices)
    groups = math.ceil(devices.size / 256)
    # Explicit, as jax.make_mesh has them.
    kind = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}[axes]
    return Mesh(devices.reshape(groups, -1), AXES, axis_types=(kind,) * len(AXES))


def lowered_for(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which programs are traced and lowered for the mesh.

    One GPU needs no mesh, but Pallas asks the mesh for which GPU it lowers a kernel.
    """
    if mesh.size > 1:
        return jax.set_mesh(mesh)
    device = mesh.abstract_mesh.abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def on_one(tree: Any, mesh: Mesh) -> Any:
    """Returns the shapes on the only device of the mesh."""
    one = SingleDeviceSharding(mesh.devices.item())
    return jax.tree.map(lambda leaf: leaf.update(sharding=one), tree)
