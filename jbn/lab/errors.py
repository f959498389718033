"""How a command ends before its time, and with which exit status.

By ``OptionError`` for what was typed, by ``FileError`` for a file, which ``file_errors`` makes of what goes wrong with
one, or by ``Stopped``.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import typer

__all__ = [
    "FileError",
    "OptionError",
    "Stopped",
    "file_errors",
]

# What Orbax and the file system say, each in its own words, when a file cannot be written.
REASONS = [os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EDQUOT)]


class OptionError(typer.BadParameter):
    """A wrong value of an option: says what arrived and what was expected. Exit status 2.

    Attributes:
        option: its name, such as "--size".
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message, param_hint=f"'{option}'")
        self.option = option


class FileError(Exception):
    """A file of a run could not be read or written while it went on; other processes may not know. Exit status 1."""


class Stopped(Exception):
    """A run that all its processes end before its last step.

    Attributes:
        status: the exit status, 1 to 255.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file of a run is written into a ``FileError`` with its path and the reason."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        reason = next((reason for reason in REASONS if reason in said), said[:300])
        raise FileError(f"cannot write '{path}' ({reason})") from error


def __dir__() -> list[str]:
    return __all__
