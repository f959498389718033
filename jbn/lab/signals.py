"""Ctrl-C and SIGTERM, from the first line of a command to its last; imports nothing that takes time."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once(words: Callable[[], str]) -> dict[int, Any]:
    """Let Ctrl-C and SIGTERM say ``words()`` and end this process, with 130 and 143; return the handlers of before.

    No exception is raised, for what it is raised in may swallow it: a callback of the garbage collector does, JAX has
    one, and the run would go on to its end.
    """

    def end(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(Exception):  # what is written at this moment cannot be flushed
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"jbn: {words()}\n".encode(errors="surrogateescape"))
        os._exit(128 + number)

    return {number: signal.signal(number, end) for number in SIGNALS}


def restore(handlers: dict[int, Any]) -> None:
    """Put handlers back."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def note() -> Iterator[list[int]]:
    """Note SIGTERM and Ctrl-C in a list instead of ending; a Ctrl-C after that does what it did before."""
    sent: list[int] = []

    def append(number: int, _: FrameType | None) -> None:
        sent.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    restore(dict.fromkeys(SIGNALS, append))
    try:
        yield sent
    finally:
        restore(before)
