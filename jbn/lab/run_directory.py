"""Where a run lives on disk: its options, its checkpoints and its results."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

OPTIONS, CHECKPOINTS, RESULTS, FIGURE = "options.json", "checkpoints", "results.json", "figure.png"


class OptionError(ValueError):
    """A wrong value of a command line option: says what arrived and what was expected."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class FileError(Exception):
    """A file of a run could not be read or written while it went on; other processes may not know."""


class Options(Protocol):
    """What determines a run: a frozen dataclass of JSON values, tuples among them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def in_words(self) -> dict[str, str]:
        """Return the options whose default depends on other options, as they take effect."""


OptionsT = TypeVar("OptionsT", bound=Options)


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


def option(name: str) -> str:
    """Return the option of a field, as one types it."""
    return "--" + name.replace("_", "-")


def program() -> list[str]:
    """Return how this program was called, as one would type it."""
    if Path(sys.argv[0]).name != "jbn":
        return [sys.executable, "-m", "jbn"]
    return ["jbn"] if shutil.which("jbn") == sys.argv[0] else [sys.argv[0]]


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


def resume(out: Path, options: OptionsT, chosen: Collection[str]) -> OptionsT:
    """Return the options of the run in `out`; those that the user chose must be the same as before."""
    before = recorded(out, type(options))
    if not os.access(out, os.W_OK):
        raise OptionError("--out", f"cannot write to '{out}'; expected a directory to write to")
    for name in (field.name for field in fields(options) if field.name in chosen):
        arrived = getattr(options, name)
        as_before = replace(before, **{name: arrived})  # type: ignore[type-var]
        if _in_words(as_before, name) != _in_words(before, name):
            default = "the default, " if getattr(before, name) is None and name in before.in_words() else ""
            expected = f"the run in '{out}' was started with {default}{_in_words(before, name)}"
            raise OptionError(
                option(name),
                f"got {_as_text(arrived)}, but {expected}; "
                f"leave {option(name)} out to go on with it, or start a new run in another --out",
            )
    return before


def recorded(out: Path, kind: type[OptionsT]) -> OptionsT:
    """Return the options of the run in `out`."""
    try:
        content = json.loads((out / OPTIONS).read_text(encoding="utf-8"))
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
    except (FileNotFoundError, NotADirectoryError):
        raise OptionError(
            "--out", f"no run in '{out}'; expected the --out of an earlier run (or no --resume, to start one)"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OptionError(
            "--resume", f"cannot read '{out / OPTIONS}' ({error}); expected the options of a run"
        ) from None


def _in_words(options: Options, name: str) -> str:
    return options.in_words().get(name, _as_text(getattr(options, name)))


def _as_text(value: object) -> str:
    return (" ".join(value) or "none") if isinstance(value, tuple) else str(value)
