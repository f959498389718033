"""Which values options have: how each is read from what was typed, and what is said where it does not fit."""

import math
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer


def meant(name: str, names: Iterable[str]) -> str:
    """Return in words which of ``names`` somebody may have meant who typed another one; "" for none."""
    near = get_close_matches(name, names, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def kind(
    read: Callable[[str], Any],
    fits: Callable[[Any], bool],
    expected: str,
    metavar: str,
    words: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return what Typer asks of an option whose text is read so, with values that fit.

    A shell completes the ``words`` among them, and a mistake is met with those near to it.
    """

    def parse(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = math.nan  # fits nowhere
        if not fits(value):
            raise typer.BadParameter(f"got {str(text)!r}; expected {expected}{meant(str(text), words)}")
        return value

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return {"parser": parse, "metavar": metavar} | ({"autocompletion": complete} if words else {})


def whole_number(low: int, high: int, metavar: str = "N") -> dict[str, Any]:
    """Return the kind of the whole numbers from ``low`` to ``high``."""
    return kind(int, lambda number: low <= number <= high, f"a whole number from {low} to {high}", metavar)


def choice(*choices: str) -> dict[str, Any]:
    """Return the kind of these words."""
    expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return kind(str, choices.__contains__, expected, "|".join(choices), choices)


def file_name(read: Callable[[str], Any], metavar: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the kind of the names of files and folders: not the empty one, that of an unset variable.

    What stands for something else by its name are ``words``.
    """

    def parse(text: str) -> Any:
        if not str(text):
            raise ValueError
        return read(text)

    return kind(parse, lambda name: name is not math.nan, "a name; the folder one is in is '.'", metavar, words)


SEED, DEVICES = whole_number(0, 2**32 - 1), whole_number(1, 64)
# What float32 has, in which a step is computed: less is 0 there, and more infinite.
LEAST, MOST = 2.0**-126, 2.0**128 - 2.0**104
POSITIVE = kind(float, lambda number: LEAST <= number <= MOST, "a number greater than 0 that float32 has", "RATE")
NOT_NEGATIVE = kind(
    float, lambda number: number == 0 or LEAST <= number <= MOST, "a number from 0 on that float32 has", "N"
)
EPOCHS = 100_000
WARMUP = kind(float, lambda number: 0 <= number <= EPOCHS, f"a number from 0 on, up to {EPOCHS}", "N")
PORTS = 2**16
EXPORTS = (".jaxexport", ".onnx", ".safetensors", ".npz")
FILE_ENDS = f"{', '.join(EXPORTS[:-1])} or {EXPORTS[-1]}"
ADDRESS = kind(
    str,
    lambda text: bool(
        re.fullmatch(r"([^:\s]+|\[[\da-f:]+\]):\d{1,5}", str(text), re.ASCII)
        and 0 < int(str(text).rpartition(":")[2]) < PORTS
    ),
    f"such as HOST:8476, with a port from 1 to {PORTS - 1}",
    "HOST:PORT",
)
OUT = file_name(Path, "DIR")
FILES = kind(
    Path,
    lambda path: path.suffix in EXPORTS,
    f"a name that ends in {FILE_ENDS}",
    "FILE",
)
SHARE = kind(float, lambda number: 0 <= number < 1, "a number from 0 to below 1", "DECAY")
