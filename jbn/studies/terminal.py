"""What a study says on the terminal: how far it is, its table, and the claims beside what came out."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from jbn.lab.report import WIDE, say, show
from jbn.studies.study import Claim, Outcome, Sheet

COLOURS = {"holds": "green", "does not hold": "bold red"}


@contextlib.contextmanager
def progress(console: Console, title: str, done: int, work: Sequence[float]) -> Iterator[Callable[[int, str], None]]:
    """Show how many cells are done, which one is measured, and on a wide terminal the time that is left.

    Yields what shows that one is begun, by its number among those that are left, which take ``work``; those of before,
    ``done``, take no time.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), TextColumn("{task.fields[cells]}")]
    if console.width >= WIDE:
        columns[1:] = [BarColumn(bar_width=16), columns[1], TimeRemainingColumn(compact=True)]
    columns.append(TextColumn("{task.fields[cell]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(title, total=sum(work), cells="", cell="")

        def begin(number: int, cell: str) -> None:
            cells = f"{done + number}/{done + len(work)}"
            shown.update(task, completed=sum(work[:number]), cells=cells, cell=cell)

        yield begin
        begin(len(work), "")


def table_of(sheet: Sheet, *, ascii_only: bool = False) -> Table:
    """Return a table for a terminal: a text of two words breaks between them where it is narrow."""
    first, *others = sheet.heading
    numbers = (Column(name, justify="right") for name in others)
    table = Table(Column(first, no_wrap=True), *numbers, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for row in sheet.rows:
        # What an encoding lacks would be spelt after the columns have been measured.
        table.add_row(*(Text(text.replace("±", "+-") if ascii_only else text) for text in row))
    return table


def show_sheet(console: Console, sheet: Sheet) -> None:
    """Print a table and what has to be known to read it."""
    console.print()
    show(console, table_of(sheet, ascii_only=console.options.ascii_only))
    for note in sheet.notes:
        say(console, note)
    console.print()


def show_claim(console: Console, claim: Claim, outcome: Outcome) -> None:
    """Print a claim, its source, and what came out."""
    style = COLOURS.get(outcome.verdict, "yellow")
    text = Text.assemble((outcome.verdict.capitalize(), style), f": {claim.sentence} ({claim.source}). ")
    console.print(text.append(outcome.sentence), soft_wrap=not console.is_terminal, highlight=False)
