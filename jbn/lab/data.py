"""Handwritten digits, split three ways, and the order in which they are shown."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

VALIDATION_SIZE = 360
TEST_SIZE = 360
TRAINING_SIZE = 1797 - VALIDATION_SIZE - TEST_SIZE


class Images(NamedTuple):
    """Images with their labels: float32 (n, height, width, channels) in [0, 1] and int32 (n,)."""

    images: np.ndarray
    labels: np.ndarray


class Source(Protocol):
    """A data set whose rows can be read in any order, by any process."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of every image."""

    @property
    def classes(self) -> int:
        """The largest label and one."""

    @property
    def fingerprint(self) -> str:
        """A short text that differs where the data differ."""

    def __len__(self) -> int:
        """Return the number of images."""

    def rows(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""

    def where(self, row: int) -> str:
        """Return in words where a row comes from."""


@dataclass(frozen=True)
class Held:
    """A data set in memory."""

    name: str
    held: Images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of every image."""
        height, width, channels = self.held.images.shape[1:]
        return height, width, channels

    @property
    def classes(self) -> int:
        """The largest label and one."""
        return int(self.held.labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """A short hash of the labels in their order."""
        return hashlib.sha256(self.held.labels.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.held.labels)

    def rows(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""
        return Images(self.held.images[rows], self.held.labels[rows])

    def where(self, row: int) -> str:
        """Return in words where a row comes from."""
        return f"{self.name}, image {row}"


class Digits(NamedTuple):
    """The three parts of the data: fit on one, watch the second, report the third."""

    training: Images
    validation: Images
    test: Images


def digits(seed: int) -> Digits:
    """Return scikit-learn's 1797 digits of 8x8x1, split by `seed` with equal shares of each class."""
    bunch = load_digits()
    images = (bunch.images[..., np.newaxis] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SIZE, random_state=seed, stratify=labels
    )
    images, validation_images, labels, validation_labels = train_test_split(
        images, labels, test_size=VALIDATION_SIZE, random_state=seed, stratify=labels
    )
    return Digits(
        Images(images, labels), Images(validation_images, validation_labels), Images(test_images, test_labels)
    )


def enlarged(data: Digits) -> Digits:
    """Return the same digits as 64x64x3: interpolated, and grey written as red, green and blue."""

    def enlarge(part: Images) -> Images:
        count = len(part.images)
        grey = jax.image.resize(part.images, (count, 64, 64, 1), "bilinear")
        return Images(np.repeat(np.asarray(grey), 3, axis=-1), part.labels)

    return Digits(*map(enlarge, data))


def batch(data: Images, seed: int, step: int, batch_size: int) -> Images:
    """Return the `batch_size` images of one step, in a new order every epoch.

    The order depends on `seed` and `step` alone, so a resumed run needs no generator state. The rows of an
    epoch that do not fill a batch are left out: every batch has one shape, and the step is compiled once.
    """
    epoch, index = divmod(step, len(data.labels) // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(len(data.labels))
    rows = order[index * batch_size : (index + 1) * batch_size]
    return Images(data.images[rows], data.labels[rows])
