"""Which rows make a step, and how each process reads its own share of them."""

from functools import cache, lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jbn.lab.data import Source
from jbn.lab.devices import AXIS
from jbn.lab.recipe import Batch
from jbn.lab.run_directory import FileError, OptionError


class Batches:
    """A data set cut into batches of `size` rows, whatever the number of devices.

    Every epoch shows each row once, in an order of its own; its last batch may hold fewer. Batches are padded to equal
    shares for the devices, and the padding is marked.
    """

    def __init__(self, source: Source, size: int, mesh: Mesh) -> None:
        self.source, self.size, self.devices = source, min(size, len(source)), mesh.size
        self.per_epoch = -(-len(source) // self.size)
        self._padded = -(-self.size // mesh.size) * mesh.size
        self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        # Two: the next batch, read while the devices work, may be of the next epoch.
        self._order = lru_cache(2)(lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(len(source)))

    def rows(self, step: int, seed: int) -> np.ndarray:
        """Return the rows of a step; they depend on it and `seed` alone, so that a resumed run needs no memory."""
        epoch, index = divmod(step, self.per_epoch)
        return self._order(seed, epoch)[index * self.size : (index + 1) * self.size]

    def in_order(self, index: int) -> np.ndarray:
        """Return the rows of a batch of an evaluation."""
        return np.arange(len(self.source))[index * self.size : (index + 1) * self.size]

    def read(self, rows: np.ndarray, signal: int = 0) -> Batch:
        """Return rows as a batch over all devices: each process reads those of its devices, and says its `signal`."""
        padding = self._padded - len(rows)
        padded = np.pad(rows, (0, padding), constant_values=-1)

        @cache
        def share(start: int | None, stop: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            valid = padded[start:stop] >= 0
            try:
                data = self.source.rows(padded[start:stop][valid])
            except OptionError as error:  # the files were right when the run began
                raise FileError(str(error)) from None
            images = np.zeros((len(valid), *self.source.image_shape), np.float32)
            labels = np.zeros(len(valid), np.int32)
            images[valid], labels[valid] = data
            return images, labels, valid

        def place(field: int, *shape: int) -> jax.Array:
            def of(index: tuple[slice, ...] | None) -> np.ndarray:
                rows = (index or (slice(None),))[0]
                return share(rows.start, rows.stop)[field]

            return jax.make_array_from_callback((self._padded, *shape), self._sharding, of)

        said = jax.make_array_from_callback((self.devices,), self._sharding, lambda _: np.full(1, signal, np.int32))
        return Batch(place(0, *self.source.image_shape), place(1), place(2) if padding else None, said)
