"""``jbn check``: the report of ``jbn.check`` as a table in colours."""

import jax
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jbn.checking.check import check
from jbn.checking.report import Report
from jbn.lab.devices import mesh_of
from jbn.lab.report import waiting

COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def run(devices: int | None, console: Console) -> bool:
    """Check the first ``devices`` devices of this process, all for None; print the report and return whether it passed.

    Raises:
        OptionError: there are fewer devices.
    """
    chosen = [device for device in mesh_of(devices).devices.flat if device.process_index == jax.process_index()]
    with waiting(console, "Checking; most of the time it compiles ..."):
        report = check(devices=chosen)
    for line in report.heading:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(table_of(report))
    style = COLOURS["passed" if report.passed else "failed"]
    console.print(Text(report.verdict, style), soft_wrap=True)
    return report.passed


def table_of(report: Report) -> Table:
    """Return the rows of a report as a table."""
    right = (Column(name, justify="right") for name in ("measured", "bound"))
    table = Table("", *right, "", "", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for of, measured, bound, verdict, note in report.lines():
        table.add_row(Text(of), measured, bound, Text(verdict, COLOURS.get(verdict, "")), Text(note))
    return table
