"""Where a run lives on disk: its options and results, and the command that goes on with it."""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from platform import node, python_version
from typing import Any, TypeVar

from jax.sharding import Mesh

from jbn import __version__
from jbn.atomic import lock, replace_file
from jbn.lab.errors import OptionError, file_errors
from jbn.lab.options import DemoPlace, Options, TrainPlace, check, flag, options_of, words

OPTIONS, CHECKPOINTS, METRICS = "options.json", "checkpoints", "metrics.jsonl"
RESULTS, FIGURE, LOCK = "results.json", "figure.png", "lock"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn", "mlxtend")

OptionsT = TypeVar("OptionsT", bound=Options)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically; a NaN or an infinity in it is an error, for JSON has neither."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    # Innermost lists on one line. A string holds no line break, so none is touched.
    text = re.sub(r"\[\n([^][{}]*)\]", lambda match: "[" + re.sub(r"\n *", " ", match[1]).strip() + "]", text)
    replace_file(path, lambda file: file.write(text.encode()))


def json_numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return the values, null for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_results(out: Path, options: Options, mesh: Mesh, found: dict[str, Any]) -> None:
    """Write what a run has found, after the options, versions and devices by which it has."""
    content = {
        "options": asdict(options),
        "versions": {"python": python_version(), "jbn": __version__, **{name: version(name) for name in PACKAGES}},
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
    }
    with file_errors(out / RESULTS):
        write_json(out / RESULTS, content | found)


def go_on(*, resume: bool = True) -> str:
    """Return in words the command that goes on with this run: the one that was typed, and for most --resume."""
    program = ["jbn"] if shutil.which("jbn") == sys.argv[0] else [sys.argv[0]]
    if Path(sys.argv[0]).name != "jbn":
        program = [sys.executable, "-m", "jbn"]
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--at":
            next(arguments, None)
        elif argument != "--resume" and not argument.startswith("--at="):
            kept.append(argument)
    return f"Go on with:\n  {shlex.join([*program, *kept, *(['--resume'] if resume else [])])}"


@contextlib.contextmanager
def claim(out: Path, new: Options | None = None) -> Iterator[None]:
    """Write to ``out`` alone: other processes are refused meanwhile. Begin a run of the options ``new``, if given.

    The system lets go of the lock when this process ends, however it ends. Where there are no locks, on Windows and on
    some file systems, nobody is refused.

    Raises:
        OptionError: there is a run already, another process writes, or nobody can.
    """
    with contextlib.ExitStack() as held:
        _refuse_name(out)
        with _writable(out):
            if new is not None:
                _refuse_run(out)  # before anything is made
                out.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which on a full disk would be written, and fail, once more where the file is closed.
            file = held.enter_context((out / LOCK).open("ab+", buffering=0))
        file.seek(0)
        alone, said = lock(file) is not False, file.read().decode(errors="replace").strip()
        if not alone:
            who, fix = said or "another process", "wait until it has ended, or take another --out"
            raise OptionError("--out", f"{who} writes to '{out}'; {fix}")
        if said and not re.fullmatch(r"process [0-9]+ on .*", said):
            found = f"'{out / LOCK}' is a file of others, which a run would write over"
            raise OptionError("--out", f"{found}; take another --out")
        with _writable(out):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {node()}\n".encode())
            if new is not None:
                _refuse_run(out)  # another process may have begun and ended meanwhile
                write_json(out / OPTIONS, asdict(new))
        yield


def _refuse_name(out: Path) -> None:
    """Refuse a path under which Orbax writes checkpoints that nobody can read, without an error."""
    whole = out.absolute().as_posix()
    if re.search(r"\[[^/]*\]|\\", whole) or whole != whole.encode(errors="replace").decode():
        expected = r"expected a path in UTF-8 that holds no [...] and no \, for Orbax loses checkpoints in others"
        raise OptionError("--out", f"got '{whole}'; {expected}")


def _refuse_run(out: Path) -> None:
    present = [name for name in (OPTIONS, CHECKPOINTS, METRICS, RESULTS, FIGURE) if (out / name).exists()]
    if OPTIONS in present:
        fix = "go on with it by adding --resume, or start a new one in another --out"
        raise OptionError("--out", f"'{out}' already holds a run ({', '.join(present)}); {fix}")
    if present:
        found = f"'{out}' holds {', '.join(present)}, which a run would write over, and no {OPTIONS} to go on with"
        raise OptionError("--out", f"{found}; take another --out")


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    """Refuse a directory that cannot be made or written to."""
    try:
        yield
    except OSError as error:
        # Those of os.path raise nothing, whatever is wrong with the name.
        if not os.path.isdir(out) and os.path.lexists(out):
            found = "is a file" if os.path.exists(out) else "is a link to what is not there"
            raise OptionError("--out", f"'{out}' {found}; expected a directory, or a name that is free") from None
        expected = "expected a directory to write to"
        raise OptionError("--out", f"cannot write to '{out}' ({error.strerror}); {expected}") from None


def find(out: Path) -> None:
    """Refuse a directory that another process has made and this one does not see."""
    if not (out / OPTIONS).exists():
        raise OptionError("--out", f"'{out}' of process 0 is not seen here; expected a folder that all machines share")


def resume(place: DemoPlace | TrainPlace, options: OptionsT) -> OptionsT:
    """Return the options of the run in ``place.out``; those that were typed must be the same as there."""
    out, before = place.out, read_options(place.out, type(options))
    if not os.access(out, os.W_OK):
        raise OptionError("--out", f"cannot write to '{out}'; expected a directory to write to")
    for name in (field.name for field in options_of(type(options)) if field.name in place.typed):
        typed = getattr(options, name)
        if replace(before, **{name: typed}).effect(name) != before.effect(name):
            effect = before.effect(name)
            expected = f"the default, {effect}" if getattr(before, name) is None else f"'{effect}'"
            fix = f"leave {flag(name)} out to go on with it, or start a new run in another --out"
            found = f"got '{words(typed)}', but the run in '{out}' was started with {expected}; {fix}"
            raise OptionError(flag(name), found)
    return before


def read_options(out: Path, kind: type[OptionsT]) -> OptionsT:
    """Return the options of the run in ``out``."""
    try:
        content = json.loads((out / OPTIONS).read_text(encoding="utf-8"))
        missing = {field.name for field in options_of(kind)} - content.keys()
        if missing:
            raise ValueError(f"there is no {', '.join(sorted(missing))}")
        options = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
        check(options)
        return options
    except (FileNotFoundError, NotADirectoryError):
        expected = "expected the --out of an earlier run (or no --resume, to start one)"
        raise OptionError("--out", f"no run in '{out}'; {expected}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        expected = f"cannot read '{out / OPTIONS}' ({error}); expected the options of a run"
        raise OptionError("--resume", expected) from None
