"""A file that is written aside and put in its place in one move, and what killed writers have left beside it."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

_PREFIX, _SUFFIX = ".jbn-", ".partial"


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file aside, and put it in the place of ``path``, or of what that links to, when it is whole.

    Others may write the same file at the same time, such as each process of a run: each has a partial file of its own,
    and holds a lock on it, of which the system lets go however the process ends. Those that nobody holds are removed.

    What the system says names ``path``: of a full disk it names no file, and of a folder that cannot be written to the
    one aside, which nobody knows.
    """
    try:
        _replace(Path(os.path.realpath(path)), write)
    except OSError as error:
        if error.errno is None:  # a library's own, not the system's
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    _remove_left(path.parent)
    with _open_partial(path.parent) as (partial, file):
        write(file)
        file.flush()
        os.fsync(file.fileno())  # some systems move the name before the bytes, and lose both files with the power
        with suppress(FileNotFoundError):
            shutil.copymode(path, partial)
        if os.name == "nt":  # which moves no open file, and has no such locks
            file.close()
        os.replace(partial, path)


@contextmanager
def _open_partial(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new file and lock it, before somebody who looks for what was left does."""
    while True:
        partial = folder / f"{_PREFIX}{uuid4().hex}{_SUFFIX}"
        with partial.open("xb") as file:
            if lock(file) is False or not partial.exists():
                continue
            try:
                yield partial, file
                return
            finally:
                partial.unlink(missing_ok=True)


def _remove_left(folder: Path) -> None:
    for left in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), left.open("r+b") as file:
            if lock(file):
                left.unlink()


def lock(file: IO[Any]) -> bool | None:
    """Lock a file: False where somebody else has, None where there are no locks, as on some network file systems."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True
