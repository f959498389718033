"""Tables that a benchmark writes into README.md and other pages, between ``<!-- name -->`` and ``<!-- /name -->``."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "PERFORMANCE.md", *sorted((ROOT / "docs").rglob("*.md")))
SHORT = ("jbn", "Flax Linen", "Keras", "PyTorch", "PyTorch NHWC")
"""The libraries of the short tables of README.md; the whole ones are in docs/how/."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as it stands in a page."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def shorten(head: Sequence[str], rows: Iterable[Sequence[str]], columns: Iterable[str]) -> str:
    """Return a table of some columns beside the first, which holds library and version, and of rows in ``SHORT``."""
    places = [0, *map(head.index, columns)]
    kept = [row for row in rows if row[0].rpartition(" ")[0] in SHORT]
    return markdown([head[place] for place in places], [[row[place] for place in places] for row in kept])


def opened(name: str, description: str) -> tuple[bool, Console, Callable[[str], None]]:
    """Read the command line of a benchmark whose table is ``name``.

    Returns:
        Whether to write, a console as wide as the tables, and what to call with the reason why something is absent.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"write results/{name}.json and its tables in the pages")
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
    pattern = re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
    found = [(page, match) for page in PAGES for match in pattern.finditer(page.read_text(encoding="utf-8"))]
    if len(found) != 1:
        there = ", ".join(page.name for page, _ in found) or "no page"
        raise ValueError(f"{there} has the markers <!-- {name} --> and <!-- /{name} -->; expected one page, and once")
    return found[0]
