"""Images in a folder of ``.npz`` files, of which a process reads the rows it needs and no others."""

import contextlib
import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from jbn.lab.data.images import Images, Source
from jbn.lab.errors import OptionError

# The last layer has a unit for each class: a label beyond this is a mistake, and would not fit in memory.
LARGEST_LABEL = 100_000
# How many channels images have, when the axis of the channels is in question.
CHANNELS = (1, 3, 4)
ONE_KIND = (
    "expected uint8 in all files, which is divided by 255, or floats in all, which are taken as they are: convert them"
)


class Folder(Source):
    """The images and labels of a folder, numbered through in the order of the file names; see ``open_folder``.

    Attributes:
        kind: "uint8" or "float", which is what the images of all files are.
    """

    def __init__(self, parts: "tuple[_Part, ...]", labels: np.ndarray) -> None:
        self.labels, self.image_shape, self._parts = labels, parts[0].image_shape, parts
        self.kind = parts[0].kind
        # Every byte of the images counts through the CRC-32 that the archive has of them, which costs no reading.
        seen = repr([(part.path.name, part.images.shape, part.images.dtype.str, part.images.crc) for part in parts])
        self.fingerprint = hashlib.sha256(seen.encode() + labels.astype("<i4").tobytes()).hexdigest()[:16]
        self._starts = np.cumsum([0] + [part.images.shape[0] for part in parts[:-1]])

    def rows(self, rows: np.ndarray) -> Images:
        """Return the images and labels of ``rows``, integers (k,) in [0, n), in this order; repeats are allowed.

        Images are float32 (k, height, width, channels). What is larger than float32 becomes infinite.

        Raises:
            OptionError: a file vanished or changed since the folder was opened, or its images cannot be unpacked.
            IndexError: a row is outside of [0, n).
        """
        if np.any((rows < 0) | (rows >= len(self))):
            raise IndexError(f"rows reach from {rows.min()} to {rows.max()}; expected rows in [0, {len(self)})")
        images = np.empty((len(rows), *self.image_shape), np.float32)
        numbers = self._number(rows)
        for number in np.unique(numbers):
            chosen = numbers == number
            images[chosen] = self._parts[number].rows(rows[chosen] - self._starts[number])
        return Images(images, self.labels[rows])

    def where(self, row: int) -> str:
        """Return the file of a row and its place in it, for a message: "DIR/part-003.npz, image 17"."""
        number = self._number(row)
        return f"{self._parts[number].path}, image {row - self._starts[number]}"

    def _number(self, rows: np.ndarray | int) -> np.ndarray:
        """Return the number of the file of each row; of those that start at the same row all but the last are empty."""
        return np.searchsorted(self._starts, rows, side="right") - 1


def open_folder(path: Path, option: str = "--data") -> Folder:
    """Return all ``.npz`` files of a folder as one data set; this reads the labels and no image.

    Each file has an array ``images``, (n, height, width) or (n, height, width, channels), and an array ``labels``,
    (n,). uint8 images are divided by 255, float16, float32 and float64 ones are taken as they are; a folder holds one
    or the other. Labels are integers in [0, 100000]. Images stored by ``numpy.savez`` stay on disk until their rows are
    asked for; those of a file that ``numpy.savez_compressed`` wrote are unpacked into memory, all of them, when the
    first is asked for. The fingerprint sees every byte that was written as part of an archive; bytes that were patched
    in place, without their checksum, it does not see.

    Args:
        path: the folder. Files whose name starts with a dot are left out.
        option: the option of the command line that named it, for errors.

    Raises:
        OptionError: there is no such folder, it holds no images, or a file in it is not as described.
    """
    expected = "expected a folder of .npz files, each with arrays 'images' and 'labels'"
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".npz") and not name.startswith("."))
    except OSError as error:
        raise OptionError(option, f"cannot open '{path}' ({error.strerror}); {expected}") from None
    if not names:
        raise OptionError(option, f"no .npz file in '{path}'; {expected}")
    parts, labels = zip(*(_open_part(path / name, option) for name in names), strict=True)
    for part in parts:
        if part.image_shape != parts[0].image_shape:
            other, first = (f"'{each.path}' holds images of {each.image_shape}" for each in (part, parts[0]))
            fix = "expected one (height, width, channels) in all files: resize them first"
            raise OptionError(option, f"{other}, but {first}; {fix}")
        if part.kind != parts[0].kind:
            other, first = (f"'{each.path}' holds {each.kind} images" for each in (part, parts[0]))
            raise OptionError(option, f"{other}, but {first}; {ONE_KIND}")
    if not sum(map(len, labels)):
        raise OptionError(option, f"no image in the .npz files of '{path}'; expected one at least")
    return Folder(parts, np.concatenate(labels))


class _Array(NamedTuple):
    """What the header of an array says, where in its file the values begin (None: compressed), and their checksum."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    offset: int | None
    crc: int


@dataclass(frozen=True, eq=False)
class _Part:
    """The images of one file, and the size and time that the file had when it was opened."""

    path: Path
    option: str
    stamp: tuple[int, int]
    images: _Array

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = (*self.images.shape[1:], 1)[:3]
        return height, width, channels

    @property
    def kind(self) -> str:
        return "uint8" if self.images.dtype == np.uint8 else "float"

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return some images of this file, float32 (k, height, width, channels)."""
        shape, order, dtype, offset, _ = self.images
        with _name(self.path, self.option), self.path.open("rb") as file:
            if _stamp(file) != self.stamp:
                fix = "expected it to stay as it was: write other data into another folder, or start again"
                raise OptionError(self.option, f"'{self.path}' changed after it was opened; {fix}")
            # A map for each call, for one that is kept holds its file open, and a process may open some hundreds only.
            images = self._unpacked if offset is None else np.memmap(file, dtype, "r", offset, shape, order)
            images = images[rows].reshape(len(rows), *self.image_shape)
        if dtype == np.uint8:
            return np.divide(images, 255, dtype=np.float32)
        with np.errstate(over="ignore"):
            return images.astype(np.float32)

    @cached_property
    def _unpacked(self) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive:
            return _read(archive, "images")


def _open_part(path: Path, option: str) -> tuple[_Part, np.ndarray]:
    def check(good: object, message: str) -> None:
        if not good:
            raise OptionError(option, f"'{path}' holds {message}")

    with _name(path, option), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        there = ", ".join(map(repr, names)) or "none"
        for name in ("images", "labels"):
            check(name in names, f"no array '{name}' (there: {there}); expected arrays 'images' and 'labels'")
        images, head = _header(archive, file, "images"), _header(archive, file, "labels")
        found = f"images of dtype {images.dtype} and shape {images.shape}"
        known = images.dtype == np.uint8 or (images.dtype.kind == "f" and images.dtype.itemsize <= 8)
        check(known, f"{found}; expected uint8 in [0, 255], or float16, float32 or float64: convert them")
        shaped = len(images.shape) in (3, 4) and all(images.shape[1:])
        check(shaped, f"{found}; expected (n, height, width) or (n, height, width, channels), all but n above zero")
        fix = (
            "expected (n, height, width, channels): numpy.moveaxis(images, 1, -1), or, if images are as small as that,"
        )
        last = len(images.shape) == 3 or images.shape[1] not in CHANNELS or images.shape[3] <= max(CHANNELS)
        check(last, f"{found}, whose channels seem to come first; {fix} numpy.swapaxes(images, 1, 2)")
        found, count = f"labels of dtype {head.dtype} and shape {head.shape}", images.shape[:1]
        known = head.dtype.kind in "iu" and head.shape == count
        check(known, f"{found}; expected integers of shape {count}, one for each of the images {images.shape}")
        labels = _read(archive, "labels")
        for index in np.flatnonzero((labels < 0) | (labels > LARGEST_LABEL))[:1]:
            fix = f"expected labels in [0, {LARGEST_LABEL}]: number the classes from 0"
            check(False, f"label {labels[index]} at index {index}; {fix}")
        return _Part(path, option, _stamp(file), images), labels.astype(np.int32)


def _header(archive: zipfile.ZipFile, file: IO[bytes], name: str) -> _Array:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        old = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
        before = stream.tell()
    # The directory of the archive gives the lengths of name and extra field for its own copies of them only.
    file.seek(info.header_offset + 26)
    start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    size = before + math.prod(shape) * dtype.itemsize
    # How long Python objects are is not known; they are refused for their dtype.
    if not dtype.hasobject and (min(shape, default=0) < 0 or size != info.file_size):
        raise ValueError(f"'{name}' has {info.file_size} bytes, but {dtype} {shape} takes {size}")
    stored = info.compress_type == zipfile.ZIP_STORED
    return _Array(shape, "F" if fortran_order else "C", dtype, start + before if stored else None, info.CRC)


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _name(path: Path, option: str) -> Iterator[None]:
    """Turn all that broken bytes raise in zipfile, in zlib and in NumPy, and the file system, into one error."""
    try:
        yield
    except OptionError:
        raise
    except Exception as error:
        reason = " ".join(str((isinstance(error, OSError) and error.strerror) or error).split())
        fix = "copy it again, or write it again with numpy.savez"
        raise OptionError(option, f"cannot read '{path}' ({reason}); expected a whole .npz file: {fix}") from None
