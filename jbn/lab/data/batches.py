"""Which rows make a step, and how each process reads its own share of them."""

from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jbn.lab.data.images import Source
from jbn.lab.devices import AXIS
from jbn.lab.errors import FileError, OptionError


class Batch(NamedTuple):
    """Rows of the data, spread over all devices of all processes."""

    images: Array  # (n, h, w, c) float32
    labels: Array  # (n,) int32
    valid: Array | None  # (n,) bool, False in padding; None where there is none
    signals: Array  # (devices,) int32: the signal that the process of each device was sent, 0 for none


class Batches:
    """A data set cut into batches of ``size`` rows, whatever the number of devices.

    Every epoch shows each row once, in an order of its own; its last batch may hold fewer. Batches are padded to equal
    shares for the devices, and the padding is marked.
    """

    def __init__(self, source: Source, size: int, mesh: Mesh) -> None:
        self.source, self.size = source, min(size, len(source))
        self.per_epoch = -(-len(source) // self.size)
        self._devices, self._sharding = mesh.size, NamedSharding(mesh, PartitionSpec(AXIS))
        self._here = np.array([device.process_index == jax.process_index() for device in mesh.devices.flat])
        # Two: the next batch, read while the devices work, may be of the next epoch.
        self._order = lru_cache(2)(lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(len(source)))

    def rows(self, step: int, seed: int) -> np.ndarray:
        """Return the rows of a step; they depend on it and ``seed`` alone, so that a resumed run needs no memory."""
        epoch, index = divmod(step, self.per_epoch)
        return self._order(seed, epoch)[index * self.size : (index + 1) * self.size]

    def in_order(self, index: int) -> np.ndarray:
        """Return the rows of a batch of an evaluation."""
        return np.arange(len(self.source))[index * self.size : (index + 1) * self.size]

    def read(self, rows: np.ndarray, signal: int = 0) -> Batch:
        """Return rows as a batch over all devices: each process reads those of its devices, and says its ``signal``."""
        padding = -(-self.size // self._devices) * self._devices - len(rows)
        shares = np.pad(rows, (0, padding), constant_values=-1).reshape(self._devices, -1)
        own = shares[self._here].ravel()
        valid = own >= 0
        try:
            data = self.source.rows(own[valid])
        except OptionError as error:  # the files were right when the run began
            raise FileError(str(error)) from None
        images = np.zeros((len(own), *self.source.image_shape), np.float32)
        labels = np.zeros(len(own), np.int32)
        images[valid], labels[valid] = data

        def spread(part: np.ndarray, length: int = shares.size) -> Array:
            return jax.make_array_from_process_local_data(self._sharding, part, (length, *part.shape[1:]))

        said = spread(np.full(self._here.sum(), signal, np.int32), self._devices)
        return Batch(spread(images), spread(labels), spread(valid) if padding else None, said)
