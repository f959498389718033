"""What a self-test found: rows, a verdict, and both as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jbn.paths import count_of


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        check: what was checked.
        of: of what; empty where the check as a whole was skipped or raised.
        measured: what came out.
        bound: the most that it may be; None where it is told without a bound.
        verdict: "passed", "failed", "measured" or "skipped".
        note: units, or the reason.
    """

    check: str
    of: str
    measured: float | None
    bound: float | None
    verdict: str
    note: str

    @property
    def name(self) -> str:
        """The check, and of what it is."""
        return ": ".join(filter(None, (self.check, self.of)))


@dataclass(frozen=True)
class Report:
    """What ``check`` found; its text is a table whose last line is the verdict.

    Attributes:
        heading: versions, and devices.
        rows: what was checked.
    """

    heading: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not any(row.verdict == "failed" for row in self.rows)

    @property
    def verdict(self) -> str:
        """The last line of the table: how many checks passed, which failed, and what could not be checked."""
        of = {kind: [row for row in self.rows if row.verdict == kind] for kind in ("passed", "failed", "skipped")}
        done = f"passed: {count_of(len(of['passed']), 'check')}"
        if of["failed"]:
            names = "; ".join(row.name for row in of["failed"])
            done = f"FAILED: {len(of['failed'])} of {count_of(len(of['passed'] + of['failed']), 'check')}: {names}"
        return done + "".join(f"; skipped: {row.name} ({row.note})" for row in of["skipped"])

    def lines(self) -> Iterator[tuple[str, ...]]:
        """Yield the lines of the table, five cells each; a line for every check, the rows of it indented below."""
        last = ""
        for row in self.rows:
            if row.of and row.check != last:
                yield row.check, "", "", "", ""
            figures = ("" if x is None else f"{x:.{2 if x < 1 else 3}g}" for x in (row.measured, row.bound))
            yield "  " + row.of if row.of else row.check, *figures, row.verdict, row.note
            last = row.check

    def __repr__(self) -> str:
        cells = [("", "measured", "bound", "", ""), *self.lines()]
        a, b, c, d, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
        table = (
            f"{of:{a}}  {x:>{b}}  {bound:>{c}}  {verdict:{d}}  {note}".rstrip() for of, x, bound, verdict, note in cells
        )
        return "\n".join([*self.heading, *table, self.verdict])
