"""What studies have left in a folder, read for those who show it: whole, or refused."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jbn.lab.errors import OptionError
from jbn.lab.options import StudyOptions, check
from jbn.lab.run import directory
from jbn.studies import plain
from jbn.studies.study import Sheet, Study, Verdict

PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
# How many claims of each verdict, in words for one and for several.
WORDS: dict[Verdict, tuple[str, str]] = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "not decided within the intervals": ("is not decided", "are not decided"),
}


@dataclass(frozen=True)
class Judged:
    """A claim and what came out, as results.json has them.

    Attributes:
        claim: the claim.
        source: who says so, and where.
        sentence: what was measured.
        verdict: whether the claim holds here.
    """

    claim: str
    source: str
    sentence: str
    verdict: Verdict

    def __post_init__(self) -> None:
        """Refuse what no study writes."""
        if not all(isinstance(value, str) for value in vars(self).values()) or self.verdict not in get_args(Verdict):
            raise ValueError(f"there is no such claim: {vars(self)}")


@dataclass(frozen=True)
class Result:
    """What came out of a study.

    Attributes:
        study: which one.
        size: at which it was carried out; "quick" decides nothing.
        claims: each with what came out.
        sheet: the table.
        figure: the bytes of a PNG file.
        title: of the figure, what came out in a sentence or two.
        seeds: how many; None where the summary does not say.
        versions: of python and packages, by name.
        device: on which it was carried out.
    """

    study: Study
    size: str
    claims: tuple[Judged, ...]
    sheet: Sheet
    figure: bytes
    title: str
    seeds: int | None
    versions: dict[str, str]
    device: str

    @property
    def made(self) -> str:
        """In words how it was made."""
        size = f"size {self.size}" + (f", {self.seeds} seeds" if self.seeds else "")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"Made at {size}, on {self.device}, with {versions}"

    @property
    def in_plain_words(self) -> str:
        """What was asked and what came out in plain words, "" where there are none for it."""
        return plain.put(self.study.name, {each.claim: each.verdict for each in self.claims})

    @property
    def decides(self) -> bool:
        """Whether its verdicts count."""
        return self.size != "quick"


def read(study: Study, out: Path) -> Result | None:
    """Return what came out of a study, None where it has no results yet.

    Args:
        study: which one.
        out: the folder of results, in which the study has one of its own.

    Raises:
        OptionError: its files are damaged, or those of something else.
    """
    path = out / study.name / directory.RESULTS
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _refuse(study, path, error) from None
    try:
        result = _parse(study, json.loads(text), path.with_name(directory.FIGURE).read_bytes())
    except Exception as error:  # the table is made of a summary that may be any JSON
        raise _refuse(study, path, error) from None
    return result


def read_all(studies: Iterable[Study], out: Path) -> dict[str, Result]:
    """Return what came out of the studies that have results, by name; ``OptionError`` where there are none."""
    found = {study.name: result for study in studies if (result := read(study, out))}
    if not found:
        fix = "expected the --out of jbn study, of one study at least that is done"
        around = f"; it holds one study, so take the folder around it, '{out.parent}'"
        raise OptionError("--out", f"no results in '{out}'; {fix}{around * (out / directory.RESULTS).exists()}")
    return found


def tally(verdicts: Iterable[Verdict]) -> str:
    """Return in words how many there are of each verdict.

    >>> from jbn.studies.results import tally
    >>> tally(["holds", "does not hold", "holds"])
    '2 hold, 1 does not hold'
    """
    found = Counter(verdicts)
    return ", ".join(
        f"{found[verdict]} {words[found[verdict] > 1]}" for verdict, words in WORDS.items() if found[verdict]
    )


def _parse(study: Study, content: dict[str, Any], figure: bytes) -> Result:
    options = StudyOptions(**content["options"])
    check(options)
    if options.name != study.name:
        raise ValueError(f"it is of the study {options.name}")
    if not (figure.startswith(PNG) and figure.endswith(PNG_END)):
        raise ValueError(f"the {directory.FIGURE} beside it is no whole PNG file")
    seeds = content["summary"].get("seeds")
    return Result(
        study,
        options.size,
        tuple(Judged(**each) for each in content["claims"]),
        study.tabulate(content["summary"]),
        figure,
        " ".join(study.draw(content["summary"]).get_suptitle().split()),
        seeds if isinstance(seeds, int) else None,
        {str(name): str(each) for name, each in content["versions"].items()},
        str(content["device"]),
    )


def _refuse(study: Study, path: Path, error: Exception) -> OptionError:
    said = " ".join((str(error) if isinstance(error, OSError) else repr(error)).split())[:300]
    expected = f"expected what jbn study {study.name} writes; that command writes it anew of what was measured"
    return OptionError("--out", f"cannot read '{path}' ({said}); {expected}")
