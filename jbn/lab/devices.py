"""The devices of a run, and how what is the same on all of them gets there."""

import contextlib
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbn.lab.errors import OptionError
from jbn.paths import count_of

AXIS = "data"


def mesh_of(count: int | None) -> Mesh:
    """Return the first ``count`` devices of each process as a mesh, all of them for None.

    Where there are CPUs alone, ``count`` of them are simulated.
    """
    if count is not None and count > 1:
        # A process that used JAX before keeps the devices it has. Beside accelerators it is without effect.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    local = jax.local_devices()
    if count is not None and count > len(local):
        here = count_of(len(local), f"device ({local[0].platform})")
        raise OptionError("--devices", f"got '{count}', but JAX finds {here} here; expected at most {len(local)}")
    of_each: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        of_each.setdefault(device.process_index, []).append(device)
    if len({len(devices) for devices in of_each.values()}) > 1:  # with which JAX gathers nothing
        each = ", ".join(f"{len(devices)} in process {process}" for process, devices in sorted(of_each.items()))
        raise OptionError("--devices", f"stands for {each}; expected as many devices in every process")
    chosen = [device for devices in of_each.values() for device in devices[:count]]
    return jax.make_mesh((len(chosen),), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return the arrays of ``tree`` with a whole copy on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def name_devices(mesh: Mesh) -> str:
    """Return how many devices there are, and of which kind."""
    kind = mesh.devices.flat[0].device_kind
    return f"one device ({kind})" if mesh.size == 1 else f"{mesh.size} devices ({kind})"
