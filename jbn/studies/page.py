"""One page of all studies, a file that needs nothing beside it: ``jbn report``."""

import base64
import os
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jbn.atomic import replace_file
from jbn.lab.errors import OptionError, file_errors
from jbn.lab.run import directory
from jbn.studies import gallery
from jbn.studies.results import PNG, read_all, tally
from jbn.studies.study import Study

NAME = "report.html"
# What stands before a verdict, so that it is told without colour, and the name of its style.
SIGNS = {
    "holds": ("✓", "yes"),
    "does not hold": ("✗", "no"),
    "not decided within the intervals": ("?", "open"),
}


def report(out: Path | str = "jbn-study", *, page: Path | str | None = None) -> Path:
    """Write one page of all studies of a folder: figures, tables, and each claim beside what came out.

    Args:
        out: the folder of results of ``run``.
        page: the file, whose name ends in .html; ``report.html`` in ``out`` for None.

    Returns:
        Where the page is.

    Raises:
        OptionError: ``out`` holds no study that is done or a damaged one, or ``page`` is no place for a page.
        FileError: the page cannot be written; what was there before is kept.

    >>> from jbn.studies import report
    >>> report("no-such-folder")
    Traceback (most recent call last):
    jbn.lab.errors.OptionError: no results in 'no-such-folder'; expected the --out of jbn study, of one study at least \
that is done
    """
    out = Path(out)
    page = out / NAME if page is None else Path(page)
    text = html(out)
    if page.suffix != ".html" or not page.parent.is_dir() or page.is_dir():
        raise OptionError("--page", f"got '{page}'; expected a name that ends in .html, in a folder that is there")
    if not os.access(page.parent, os.W_OK):
        raise OptionError("--page", f"cannot write to '{page.parent}'; expected a name in a folder to write to")
    with file_errors(page):
        replace_file(page, lambda file: file.write(text.encode("utf-8", "replace")))
    return page


def html(out: Path) -> str:
    """Return the page of a folder of results; ``OptionError`` as ``report`` says."""
    studies = gallery.STUDIES.values()
    results = read_all(studies, out)
    claims = [claim for result in results.values() if result.decides for claim in result.claims]
    rooms = Environment(
        loader=PackageLoader("jbn", "studies"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rooms.filters |= {"data": _data, "extent": _extent, "tally": tally}
    words: dict[str, Any] = {
        "results": list(results.values()),
        "missing": [(study, _make(study, out)) for study in studies if study.name not in results],
        "begun": {study.name for study in studies if (out / study.name / directory.OPTIONS).exists()},
        "claims": claims,
        "signs": SIGNS,
    }
    return rooms.get_template("page.html").render(words)


def _make(study: Study, out: Path) -> str:
    """Return the command that makes the results of a study."""
    return shlex.join(["jbn", "study", study.name, "--out", str(out)])


def _data(figure: bytes) -> str:
    """Return a figure as the address of an image that is a part of the page."""
    return "data:image/png;base64," + base64.b64encode(figure).decode()


def _extent(figure: bytes) -> tuple[int, int]:
    """Return width and height of a figure in pixels: with them the page does not move while it is shown."""
    start = len(PNG) + 8
    width, height = (int.from_bytes(figure[at : at + 4]) for at in (start, start + 4))
    return width, height
