"""What a terminal shows while JAX is imported, which takes seconds; imports nothing that takes time itself."""

import contextlib
import os
import sys
from collections.abc import Iterator

WORDS = "Loading JAX ..."
ERASED, CURSOR = "\r\x1b[K", "\x1b[?25h"  # the line that the cursor is in; the cursor, which a bar of Rich hides


def looked_at(descriptor: int) -> bool:
    """Return whether a person looks at what is written there: a terminal that can erase a line."""
    return os.isatty(descriptor) and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that JAX is imported inside, and erase it afterwards; in a pipe and a log say nothing."""
    if "jax" in sys.modules or not looked_at(2):
        yield
        return
    print(WORDS, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(end=ERASED, file=sys.stderr, flush=True)
