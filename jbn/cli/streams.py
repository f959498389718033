"""Standard output and error that outlive their reader, a full disk and a locale that lacks a character."""

import codecs
import contextlib
import errno
import io
import os
import sys
import unicodedata
from typing import Any

SPELL = "jbn.spell"  # what is written for a character that an encoding lacks


class Patient(io.FileIO):
    """A file descriptor that nothing written to it can fail for: what a run says is not worth the run.

    Attributes:
        failure: the first error.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write what can be written, and take the rest for written."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def spell(error: UnicodeError) -> tuple[str, int]:
    """Return ASCII for the characters that an encoding lacks: ``^4`` for a raised 4, a number for most others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    spelt = ""
    for character in error.object[error.start : error.end]:
        kind, _, code = unicodedata.decomposition(character).partition(" ")
        raised = kind == "<super>" and chr(int(code, 16)).isascii()
        spelt += f"^{chr(int(code, 16))}" if raised else character.encode("ascii", "backslashreplace").decode()
    return spelt, error.end


def replace() -> Patient | None:
    """Let ``sys.stdout`` and ``sys.stderr`` be patient; return the first, None where it was closed from the start."""
    codecs.register_error(SPELL, spell)
    _replace("stderr", 2)
    return _replace("stdout", 1)


def finish(output: Patient | None, status: int) -> int:
    """Return the exit status of a command, which was ``status``: 1 where its output could not be written.

    A reader that has gone, such as ``head``, wanted no more: that is no error.
    """
    sys.stdout.flush()
    failure = None if output is None else output.failure
    if failure is None or failure.errno == errno.EPIPE:
        return status
    print(f"jbn: cannot write to the standard output ({failure.strerror}); files are complete", file=sys.stderr)
    return status or 1


def _replace(name: str, descriptor: int) -> Patient | None:
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        return None
    with contextlib.suppress(OSError):
        stream.flush()
    patient, lines = Patient(descriptor, "w", closefd=False), stream.line_buffering or stream.isatty()
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(patient), stream.encoding, SPELL, line_buffering=lines))
    return patient
