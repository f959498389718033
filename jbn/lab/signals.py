"""Ctrl-C, SIGTERM and a closed terminal, from the first line of a command on; imports nothing that takes time."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jbn.lab.loading import CURSOR, ERASED, looked_at

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


def endings() -> list[int]:
    """Return the signals that end a command: not those that ``nohup``, or a shell in the background, has it ignore."""
    known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def end_at_once(words: Callable[[], str]) -> dict[int, Any]:
    """Let each signal say ``words()`` and end this process, with 128 and its number; return the handlers of before.

    No exception is raised, for what it is raised in may swallow it: a callback of the garbage collector does, JAX has
    one, and the run would go on to its end.
    """

    def end(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(Exception):  # what is written at this moment cannot be flushed
            sys.stdout.flush()
        # A bar, or "Loading JAX ...", is left in the middle of its line, and Rich cannot show the cursor any more.
        begun = ERASED + CURSOR if looked_at(2) else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{begun}jbn: {words()}\n".encode(errors="surrogateescape"))
        os._exit(128 + number)

    return {number: signal.signal(number, end) for number in endings()}


def restore(handlers: dict[int, Any]) -> None:
    """Put handlers back."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def note() -> Iterator[list[int]]:
    """Note signals in a list instead of ending; a Ctrl-C after that does what it did before."""
    sent: list[int] = []

    def append(number: int, _: FrameType | None) -> None:
        sent.append(number)
        restore({number: handler for number, handler in before.items() if number == signal.SIGINT})

    before: dict[int, Any] = {number: signal.getsignal(number) for number in endings()}
    restore(dict.fromkeys(before, append))
    try:
        yield sent
    finally:
        restore(before)
