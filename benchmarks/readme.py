"""Tables that a benchmark writes into README.md or PERFORMANCE.md, between ``<!-- name -->`` and ``<!-- /name -->``."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

PAGES = tuple(Path(__file__).parents[1] / name for name in ("README.md", "PERFORMANCE.md"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as it stands in the README."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def opened(name: str, description: str) -> tuple[bool, Console, Callable[[str], None]]:
    """Read the command line of a benchmark whose table is ``name``.

    Returns:
        Whether to write, a console as wide as the tables, and what to call with the reason why something is absent.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"write results/{name}.json and the table in README.md")
    write = parser.parse_args().write
    console = Console(width=max(Console().width, 110))  # readable in a log too

    def absent(reason: str) -> None:
        if write:
            parser.error(reason)  # half a table must not replace a whole one
        console.print(reason)

    return write, console, absent


def between(name: str) -> str:
    """Return what stands between the markers."""
    return _found(name)[1][2]


def replace(name: str, table: str) -> None:
    """Put a table between the markers."""
    page, found = _found(name)
    page.write_text(found.string[: found.start(2)] + table + found.string[found.end(2) :], encoding="utf-8")


def _found(name: str) -> tuple[Path, re.Match[str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if found := re.search(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", text, re.DOTALL):
            return page, found
    raise ValueError(f"no page has the markers <!-- {name} --> and <!-- /{name} -->")
