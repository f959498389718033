"""Help that is whole at any width: no summary is cut, and a narrow terminal gets its lines at its width."""

import inspect
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from typer.core import TyperGroup

WIDEST, NARROWEST = 80, 24
BESIDE, BELOW = 30, 4  # columns of names, with what they stand for beside them or below
LEAST_TEXT = 24
UNBROKEN = "\u2011"  # a hyphen at which no line is broken: what is to be typed must stay whole

# Through Typer, which brings a Click of its own in some versions and asks for another package's in others.
_Context: Any = TyperGroup.context_class
_Formatter: Any = _Context.formatter_class


class Help(_Formatter):  # type: ignore[misc]
    """Help and usage, as wide as the terminal where that has fewer columns than 80: Click would write 50 at least."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.width = max(min(shutil.get_terminal_size().columns, WIDEST) - 2, NARROWEST)

    def write(self, string: str) -> None:
        """Write what has been broken into lines, its hyphens as they were."""
        super().write(string.replace(UNBROKEN, "-"))

    def write_usage(self, prog: str, args: str = "", *more: Any) -> None:
        """Write what is typed; Typer puts a name that must be given into braces, which people read as a choice."""
        super().write_usage(prog, re.sub(r"\{(\w+)\}", r"\1", args), *more)

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        super().write_text(text.replace("-", UNBROKEN))

    def write_dl(self, rows: Sequence[tuple[str, str]], *_: Any, **__: Any) -> None:
        """Write names with what they stand for beside them, below where there is no room for that."""
        # Typer says of arguments of which type of Python they are, and puts a default that it is told into parentheses.
        rows = [
            (
                re.sub(r" <.*>$", "", name),
                re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", text).replace("-", UNBROKEN),
            )
            for name, text in rows
        ]
        longest = min(max((len(name) for name, _ in rows), default=0), BESIDE)
        super().write_dl(rows, BESIDE if longest + LEAST_TEXT + 2 <= self.width else BELOW)


def install() -> None:
    """Let every command of this process be helped so: ``jbn bench`` has an app of its own."""
    _Context.formatter_class = Help


def summary(function: Callable[..., Any]) -> str:
    """Return the first line of what a command says of itself, whole: one that Typer takes itself would end in '...'."""
    return (inspect.getdoc(function) or "").partition("\n")[0]
