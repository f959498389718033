"""Where a run lives on disk: its options, its checkpoints and its results."""

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jbn.lab.models import MODELS

OPTIONS, CHECKPOINTS, RESULTS, FIGURE = "options.json", "checkpoints", "results.json", "figure.png"


class OptionError(ValueError):
    """A wrong value of a command line option: says what arrived and what was expected."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class Options:
    """What determines a run; `learning_rate` None stands for each model's own."""

    model: tuple[str, ...]
    learning_rate: float | None
    steps: int
    batch_size: int
    seed: int

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each model."""
        return {name: self.learning_rate or MODELS[name].learning_rate for name in self.model}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place in one move, never half written."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically; a NaN or an infinity in it is an error, for JSON has neither."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    # Innermost lists on one line. A string holds no line break, so none is touched.
    text = re.sub(r"\[\n([^][{}]*)\]", lambda match: "[" + re.sub(r"\n *", " ", match[1]).strip() + "]", text)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def start(out: Path, options: Options) -> None:
    """Make `out` and note the options of a new run in it; refuse a directory that holds a run already."""
    try:
        present = [name for name in (OPTIONS, CHECKPOINTS, RESULTS, FIGURE) if (out / name).exists()]
        if present:
            raise OptionError(
                "--out",
                f"'{out}' already holds a run ({', '.join(present)}); "
                "go on with it by adding --resume, or start a new one in another --out",
            )
        if out.exists() and not out.is_dir():
            raise OptionError("--out", f"'{out}' is a file; expected a directory, or a name that is free")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / OPTIONS, asdict(options))
    except OSError as error:
        raise OptionError(
            "--out", f"cannot write to '{out}' ({error.strerror}); expected a directory to write to"
        ) from None


def resume(out: Path, options: Options, chosen: Collection[str]) -> Options:
    """Return the options of the run in `out`; those that the user chose must be the same as before."""
    recorded = _recorded_options(out)
    if not os.access(out, os.W_OK):
        raise OptionError("--out", f"cannot write to '{out}'; expected a directory to write to")
    for name in (field.name for field in fields(Options) if field.name in chosen):
        arrived, expected = getattr(options, name), getattr(recorded, name)
        if name == "learning_rate":
            if replace(recorded, learning_rate=arrived).rates() == recorded.rates():
                continue
            if expected is None:
                rates = ", ".join(f"{rate:g} for {model}" for model, rate in recorded.rates().items())
                expected = f"the default, {rates}"
        if arrived != expected:
            option = "--" + name.replace("_", "-")
            raise OptionError(
                option,
                f"got {_as_text(arrived)}, but the run in '{out}' was started with {_as_text(expected)}; "
                f"leave {option} out to go on with it, or start a new run in another --out",
            )
    return recorded


def _recorded_options(out: Path) -> Options:
    try:
        content = json.loads((out / OPTIONS).read_text(encoding="utf-8"))
        options = Options(**content)
        return replace(options, model=tuple(options.model))
    except (FileNotFoundError, NotADirectoryError):
        raise OptionError(
            "--out", f"no run in '{out}'; expected the --out of an earlier run (or no --resume, to start one)"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(
            "--resume", f"cannot read '{out / OPTIONS}' ({error}); expected the options of a run"
        ) from None


def _as_text(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
