"""The gallery, docs/studies/README.md, and a sentence of README.md: ``python -m benchmarks.studies jbn-study``.

Takes the results of ``jbn study`` into ``docs/studies/``; measures nothing.
"""

import argparse
import re
import shutil
from pathlib import Path

from benchmarks import readme
from jbn.lab.errors import OptionError
from jbn.lab.run.directory import FIGURE, RESULTS
from jbn.studies import STUDIES
from jbn.studies.results import Result, read_all, tally

KEPT = Path(__file__).parents[1] / "docs" / "studies"
GALLERY = KEPT / "README.md"


def gallery() -> dict[str, Result]:
    """Return what is kept of the studies, by name."""
    return read_all(STUDIES.values(), KEPT)


def tables() -> dict[str, str]:
    """Return the sentence of README.md by the name of its markers."""
    verdicts = [claim.verdict for result in gallery().values() for claim in result.claims]
    return {"studies": f"Of {len(verdicts)} claims {tally(verdicts)}.\n"}


def page() -> str:
    """Return the page of all studies: their figures, and of each its table, and the claims beside what came out."""
    head = (
        "# What is claimed about batch normalization, measured\n\n"
        "Written by `python -m benchmarks.studies jbn-study` of the results of `jbn study all`. `jbn report` makes\n"
        "one file of them for a browser.\n\n"
        "Found: the whole 95 % interval agrees with the claim. Not so: the whole interval contradicts it. Open: it\n"
        "contains both. Better, fewer and more are by any number above 0, unless the claim names how much.\n"
        "Small networks on small data were measured: elsewhere something else may come out.\n"
    )
    results = gallery()
    return "\n".join([head, readme.markdown(["", ""], map(_card, results.values())), *map(_section, results.values())])


def _card(result: Result) -> list[str]:
    name, said = result.study.name, _plain(result.in_plain_words or result.study.question)
    found = tally(claim.verdict for claim in result.claims)
    return [f"[![{name}]({name}/{FIGURE})](#{name})", f"[{name}](#{name}): {said} Of its claims {found}."]


def _section(result: Result) -> str:
    name, question = result.study.name, _plain(result.study.question)
    claims = [
        [f"{_plain(claim.claim)} ({_plain(claim.source)})", claim.verdict, _plain(claim.sentence)]
        for claim in result.claims
    ]
    numbers = readme.markdown([*map(_plain, result.sheet.heading)], ([*map(_plain, row)] for row in result.sheet.rows))
    notes = [*map(_plain, result.sheet.notes), f"{result.made}. All numbers: [{RESULTS}]({name}/{RESULTS})."]
    parts = [
        f"## {name}\n\n{question}\n",
        f"![{_plain(result.title)}]({name}/{FIGURE})\n",
        readme.markdown(["the claim", "here", "what came out"], claims),
        numbers,
        "".join(f"- {note}\n" for note in notes),
    ]
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Return a text as Markdown that shows it: a ``|`` of a norm would end the cell of a table."""
    return re.sub(r"([\\`*_~\[\]<>|$#])", r"\\\1", " ".join(text.split()))


def take(folder: Path) -> None:
    """Take in what a folder has; ``OptionError`` where it is damaged, or decides nothing."""
    results = read_all(STUDIES.values(), folder)
    if quick := [name for name, result in results.items() if not result.decides]:
        raise OptionError("folder", f"{', '.join(quick)}: made at the size quick, which decides nothing")
    for name in results:
        (KEPT / name).mkdir(parents=True, exist_ok=True)
        for file in (RESULTS, FIGURE):
            shutil.copyfile(folder / name / file, KEPT / name / file)


def main() -> None:
    """Take in the results of a folder of studies, if one is given, and write the pages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="the --out of jbn study")
    try:
        if folder := parser.parse_args().folder:
            take(folder)
    except OptionError as error:
        parser.error(error.message)
    GALLERY.write_text(page(), encoding="utf-8")
    for marker, content in tables().items():
        readme.replace(marker, content)


if __name__ == "__main__":
    main()
