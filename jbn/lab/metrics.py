"""What a run records while it trains: a line of JSON a step, and TensorBoard's files where its writer is installed."""

import contextlib
import importlib
import json
import math
from pathlib import Path
from typing import Any, Self, TextIO

from jbn.lab.run_directory import FileError, write_atomically

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """The record of a run: a line for every step and one for every evaluation.

    Lines after the step `done`, from which the run goes on, are taken out: no step is recorded twice. One process
    writes; the others, `path` None, write nothing.
    """

    def __init__(self, out: Path | None, done: int) -> None:
        self._lines: TextIO | None = None
        self._board: Any = None
        if out is None:
            return
        path = out / METRICS
        try:
            kept = [line for line in _lines(path) if line["step"] <= done]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
            self._lines = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise FileError(f"cannot write '{path}' ({error.strerror})") from error
        with contextlib.suppress(ModuleNotFoundError):
            writer = importlib.import_module("tensorboardX").SummaryWriter
            self._board = writer(str(out / TENSORBOARD), purge_step=done + 1)

    def __enter__(self) -> Self:
        """Return the record."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):
            if self._lines is not None:
                self._lines.close()
            if self._board is not None:
                self._board.close()

    def write(self, step: int, **values: float) -> None:
        """Record the values of a step; `FileError` where the disk is full."""
        if self._lines is None:
            return
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._lines.write(json.dumps(line) + "\n")
            for name, value in values.items():
                if self._board is not None:
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            raise FileError(f"cannot write '{self._lines.name}' ({error.strerror})") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return what was recorded before; the last line of a run that was killed may be half a line."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines
