"""A study on disk: what it was begun with, and the numbers of each cell that is done."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import jax
import numpy as np

from jbn import __version__
from jbn.lab.errors import OptionError, file_errors
from jbn.lab.options import StudyOptions
from jbn.lab.run import directory
from jbn.studies.study import Cell, Measured, Numbers

CELLS = "cells"


def versions() -> str:
    """Return in words what else decides the numbers: versions, and the device."""
    packages = (f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax", "numpy"))
    return ", ".join([f"python {python_version()}", f"jbn {__version__}", *packages, jax.devices()[0].device_kind])


def plan(cells: Sequence[Cell]) -> str:
    """Return a short text that differs where the settings of cells differ."""
    return _digest([asdict(cell) for cell in cells])


def begun(out: Path, options: StudyOptions) -> bool:
    """Say whether ``out`` holds a study; one with other options, versions or cells is refused with the fix."""
    if not (out / directory.OPTIONS).exists():
        return False
    elsewhere = "take another --out"
    try:
        before = directory.read_options(out, StudyOptions)
    except OptionError as error:
        raise OptionError("--out", f"{error}; {elsewhere}") from None
    if before.name != options.name:
        found = f"'{out}' holds the study {before.name}, not {options.name}; {elsewhere}"
        raise OptionError("--out", found)
    if before.size != options.size:
        found = f"got '{options.size}', but the study in '{out}' was begun with '{before.size}'"
        raise OptionError("--size", f"{found}; go on with it by --size {before.size}, or {elsewhere}")
    if before.versions != options.versions:
        found = f"the study in '{out}' was begun with {before.versions}; here is {options.versions}"
        raise OptionError("--out", f"{found}. Numbers of both would be mixed; {elsewhere}")
    if before.plan != options.plan:
        found = f"the study in '{out}' was begun with other cells: the study has changed since"
        raise OptionError("--out", f"{found}; {elsewhere}")
    return True


class Records:
    """The cells of a study that are done, each in a file that appears in one move.

    A file carries a digest of the options, of its cell and of its numbers: what is damaged, or was copied from another
    study, is not taken.
    """

    def __init__(self, out: Path, options: StudyOptions) -> None:
        self._folder, self._options = out / CELLS, asdict(options)

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell."""
        return self._folder / f"{cell.name}.json"

    def read(self, cell: Cell) -> Measured | None:
        """Return what was measured; None where there is no file; ``ValueError`` where it is not as it was written."""
        try:
            content = json.loads(self.path(cell).read_text(encoding="utf-8"))
            numbers, digest = content["numbers"], content["digest"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"cannot read '{self.path(cell)}' ({error!r})") from None
        if digest != self._digest(cell, numbers):
            raise ValueError(f"'{self.path(cell)}' is damaged, or of another study")
        return Measured(cell.settings, numbers)

    def write(self, cell: Cell, numbers: Numbers, seconds: float) -> Measured:
        """Keep what was measured, and return it as ``read`` will; ``FileError`` where it cannot be written."""
        kept = _plain(numbers)
        digest = self._digest(cell, kept)
        content = {"cell": asdict(cell), "seconds": round(seconds, 2), "digest": digest, "numbers": kept}
        with file_errors(self.path(cell)):
            self._folder.mkdir(exist_ok=True)
            directory.write_json(self.path(cell), content)
        return Measured(cell.settings, kept)

    def _digest(self, cell: Cell, numbers: Any) -> str:
        return _digest([self._options, asdict(cell), numbers])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return arrays and numbers as JSON has them: null for what is not finite."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
