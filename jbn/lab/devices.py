"""The devices of a run, and how a batch and the state of training are spread over them."""

import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbn.lab.data import Images
from jbn.lab.run_directory import OptionError

AXIS = "data"


class Batch(NamedTuple):
    """Images in equal shares on the devices of a run; `valid` (n,) is False in rows of padding, None without any."""

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    valid: jax.Array | None


def mesh_of(count: int | None) -> Mesh:
    """Return the first `count` devices of each process as a mesh, all of them for None.

    Where there are CPUs alone, `count` of them are simulated.
    """
    if count is not None and count > 1:
        # A process that used JAX before keeps the devices it has. Beside accelerators it is without effect.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    local = jax.local_devices()
    if count is not None and count > len(local):
        here = f"{len(local)} {local[0].platform} device{'s' if len(local) > 1 else ''}"
        raise OptionError("--devices", f"got {count}, but JAX finds {here} here; expected at most {len(local)}")
    of_each: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        of_each.setdefault(device.process_index, []).append(device)
    chosen = [device for devices in of_each.values() for device in devices[:count]]
    return jax.make_mesh((len(chosen),), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Return the arrays of `tree` with a whole copy on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def sharded(data: Images, mesh: Mesh) -> Batch:
    """Return images spread over the devices, padded with zeros to a multiple of their number."""
    if mesh.size == 1:
        return Batch(*data, None)  # `jax.jit` puts them there itself, and faster
    count = len(data.labels)
    padding = -count % mesh.size
    valid = np.arange(count + padding) < count if padding else None
    images, labels = (np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) if padding else part for part in data)
    return Batch(*jax.device_put((images, labels, valid), NamedSharding(mesh, PartitionSpec(AXIS))))


def in_words(mesh: Mesh) -> str:
    """Return how many devices there are, and of which kind."""
    kind = mesh.devices.flat[0].device_kind
    return f"one device ({kind})" if mesh.size == 1 else f"{mesh.size} devices ({kind})"
