"""What a run records while it trains: a line of JSON a step, and TensorBoard's files where its writer is installed."""

import contextlib
import importlib
import json
import statistics
from pathlib import Path
from typing import Any, TextIO

from jbn.atomic import replace_file
from jbn.lab.errors import file_errors
from jbn.lab.run.directory import METRICS, json_numbers

TENSORBOARD = "tensorboard"
LEAST_TIMED = 10  # steps: the median of fewer tells of something else that the machine did


class Pace:
    """How long a step takes, of the steps that tell.

    Those are none that compiles, the first of each kind of batch, and none of an epoch that another process began.
    """

    def __init__(self, done: int, per_epoch: int) -> None:
        self._after, self._met, self._seconds = -(-done // per_epoch) * per_epoch, set[bool](), list[float]()

    def note(self, step: int, masked: bool, seconds: float) -> None:
        """Note how long a step took, the first of a run being 1, and whether a part of its batch is masked."""
        if masked in self._met and step > self._after:
            self._seconds.append(seconds)
        self._met.add(masked)

    @property
    def milliseconds(self) -> float | None:
        """The median; None where there are too few."""
        return round(statistics.median(self._seconds) * 1e3, 4) if len(self._seconds) >= LEAST_TIMED else None


class Metrics(contextlib.AbstractContextManager["Metrics"]):
    """The record of a run: a line for every step and one for every evaluation.

    Lines after the step ``done``, from which the run goes on, are taken out: nothing is recorded twice. One process
    writes; the others, ``out`` None, write nothing.

    Attributes:
        lost: which steps are not recorded though the run goes on after them, in words; "" for none.
    """

    lost = ""

    def __init__(self, out: Path | None, done: int) -> None:
        self._lines: TextIO | None = None
        self._board: Any = None
        if out is None:
            return
        self._path = out / METRICS
        with contextlib.suppress(ModuleNotFoundError):
            tensorboard = importlib.import_module("tensorboardX")
            with file_errors(out / TENSORBOARD):
                self._board = tensorboard.SummaryWriter(str(out / TENSORBOARD), purge_step=done + 1)
        with file_errors(self._path):
            kept = [line for line in history(out) if 0 < done >= line["step"]]
            self.lost = gaps(kept, done)
            text = "".join(json.dumps(line) + "\n" for line in kept)
            replace_file(self._path, lambda file: file.write(text.encode()))
            self._lines = self._path.open("a", encoding="utf-8", buffering=1)

    def __exit__(self, *_: object) -> None:
        for file in (self._lines, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def write(self, step: int, **values: float) -> None:
        """Record the values of a step, null for what is not finite; ``FileError`` where the disk is full."""
        if self._lines is None:
            return
        with file_errors(self._path):
            self._lines.write(json.dumps({"step": step} | json_numbers(values)) + "\n")
            for name, value in values.items():
                if self._board is not None:
                    self._board.add_scalar(name, value, step)


def history(out: Path) -> list[dict[str, Any]]:
    """Return what a run has recorded; the last line of one that was killed may be half a line."""
    path, lines = out / METRICS, []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    lines = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    # A copy of lines tells nothing: a step has one line of its own and one of its evaluation.
    once = {(line["step"], "loss" not in line): line for line in lines}
    return [once[key] for key in sorted(once)]


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    """Return the steps at which a value was recorded, and the values, None for what is not finite."""
    there = [line for line in lines if name in line]
    return [line["step"] for line in there], [line[name] for line in there]


def gaps(lines: list[dict[str, Any]], done: int) -> str:
    """Return in words which of the steps 1 to ``done`` are not recorded, "" for none."""
    missing = sorted({*range(1, done + 1)} - {line["step"] for line in lines if "loss" in line})
    if not missing:
        return ""
    first, last = missing[0], missing[-1]
    return f"step {first}" if first == last else f"{len(missing)} of the steps {first} to {last}"
