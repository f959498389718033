"""What every study is: a question, cells that are measured one by one, and claims that their numbers can refute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from matplotlib.figure import Figure

# Plain JSON: what a summary holds is what results.json holds.
Settings: TypeAlias = dict[str, Any]
Numbers: TypeAlias = dict[str, Any]
Summary: TypeAlias = dict[str, Any]
Size: TypeAlias = Literal["quick", "default", "full"]
Verdict: TypeAlias = Literal["holds", "does not hold", "not decided within the intervals"]


@dataclass(frozen=True)
class Cell:
    """A unit of work: once it is measured its numbers are kept, whatever happens to the study.

    Attributes:
        name: of its file, different in each cell of a study.
        settings: all that determines its numbers, plain JSON.
        work: how long it takes beside other cells, in any unit: the time left is told by it.
    """

    name: str
    settings: Settings
    work: float = 1.0


@dataclass(frozen=True)
class Measured:
    """A cell that is done.

    Attributes:
        settings: those of the cell.
        numbers: what was measured, plain JSON; null is what was not finite.
    """

    settings: Settings
    numbers: Numbers


@dataclass(frozen=True)
class Outcome:
    """What came out for a claim.

    Attributes:
        sentence: what was measured, with its figures and their intervals.
        verdict: whether the claim holds here.
    """

    sentence: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """What somebody says about batch normalization, and how the results decide it.

    Attributes:
        sentence: the claim.
        source: who says so, and where.
        judge: what came out, of the summary.
    """

    sentence: str
    source: str
    judge: Callable[[Summary], Outcome]


@dataclass(frozen=True)
class Sheet:
    """A table as data, for a terminal and for a page.

    Attributes:
        heading: the names of the columns.
        rows: their texts; those of the first column name the row.
        notes: what has to be known to read it, sentences.
    """

    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A question and how it is answered.

    Attributes:
        name: as one types it.
        question: one line, with a question mark.
        claims: what others answer.
        cells: the work, for a size: "quick" takes a minute and decides nothing, "default" at most ten minutes on two
            cores, "full" is larger.
        measure: the numbers of a cell, of its settings alone: two calls give the same.
        summarize: what the numbers of all cells say, the only thing that claims, tables and figures see; "seeds" in it
            says how many there were.
        tabulate: the table of a summary.
        draw: the figure of a summary.
    """

    name: str
    question: str
    claims: tuple[Claim, ...]
    cells: Callable[[Size], Sequence[Cell]]
    measure: Callable[[Settings], Numbers]
    summarize: Callable[[Sequence[Measured]], Summary]
    tabulate: Callable[[Summary], Sheet]
    draw: Callable[[Summary], Figure]
