"""Tables that a benchmark writes into README.md, between ``<!-- name -->`` and ``<!-- /name -->``."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as it stands in the README."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def between(name: str) -> str:
    """Return what stands between the markers."""
    found = _block(name).search(README.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{README} has no markers <!-- {name} --> and <!-- /{name} -->")
    return found[2]


def replace(name: str, table: str) -> None:
    """Put a table between the markers."""
    between(name)  # says so where there are none
    text = README.read_text(encoding="utf-8")
    README.write_text(_block(name).sub(lambda found: found[1] + table + found[3], text), encoding="utf-8")


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
