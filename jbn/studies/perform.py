"""A study from its first cell to its results: what is done is kept, so that the same command goes on after any end."""

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from jbn.atomic import replace_file
from jbn.lab.devices import mesh_of
from jbn.lab.errors import file_errors
from jbn.lab.options import StudyOptions
from jbn.lab.report import say
from jbn.lab.run import directory
from jbn.studies import terminal
from jbn.studies.records import Records, begun, plan, versions
from jbn.studies.study import Cell, Measured, Numbers, Settings, Size, Study, Summary

DPI = 110
QUICK = "Note: the size quick shows that a study runs; it decides nothing. Another size needs another --out."


def options_for(study: Study, size: Size) -> StudyOptions:
    """Return what a study is begun with on this machine."""
    return StudyOptions(name=study.name, size=size, versions=versions(), plan=plan(study.cells(size)))


def perform(study: Study, size: Size, out: Path, console: Console) -> dict[str, Any]:
    """Measure the cells that are not done yet, write results.json and figure.png into ``out``, and print what they say.

    Returns what results.json holds beside options and versions.

    Raises:
        OptionError: ``out`` holds something else, another process writes there, or nobody can.
        FileError: a file cannot be written; the cells that are done are kept.
    """
    cells, options = study.cells(size), options_for(study, size)
    with directory.claim(out, None if begun(out, options) else options):
        measured = _measure_all(study, cells, Records(out, options), console)
        summary = study.summarize(measured)
        outcomes = [(claim, claim.judge(summary)) for claim in study.claims]
        claims = [{"claim": claim.sentence, "source": claim.source} | asdict(outcome) for claim, outcome in outcomes]
        found = {"question": study.question, "claims": claims, "summary": summary}
        _write(study, out, options, summary, found)
    terminal.show_sheet(console, study.tabulate(summary))
    if size == "quick":
        say(console, QUICK)
    for claim, outcome in outcomes:
        terminal.show_claim(console, claim, outcome)
    for name in (directory.FIGURE, directory.RESULTS):
        console.print(f"Wrote {out / name}", soft_wrap=True)
    return found


def _measure_all(study: Study, cells: Sequence[Cell], records: Records, console: Console) -> list[Measured]:
    """Return the numbers of all cells, measured now or before."""
    measured = {}
    for cell in cells:
        try:
            if found := records.read(cell):
                measured[cell.name] = found
        except ValueError as error:
            say(console, f"Note: {error}; this cell is measured anew.")
    left = [cell for cell in cells if cell.name not in measured]
    if measured and left:
        say(console, f"{study.name}: {len(measured)} of {len(cells)} cells were done before.")
    with terminal.progress(console, study.name, len(measured), [cell.work for cell in left]) as begin:
        for number, cell in enumerate(left):
            # Before anything is measured, the first cell compiles what many of the others run too.
            begin(number, cell.name if number else f"{cell.name}, compiling first")
            began = time.perf_counter()
            numbers = _measure(study, cell.settings)
            measured[cell.name] = records.write(cell, numbers, time.perf_counter() - began)
    return [measured[cell.name] for cell in cells]


def _measure(study: Study, settings: Settings) -> Numbers:
    """Return the numbers of a cell, from a thread of its own: while JAX computes, the main one must hear a Ctrl-C."""
    found: list[Numbers] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(study.measure(settings))
        except BaseException as error:
            failed.append(error)

    # A daemon: whoever is interrupted need not wait for a cell that nobody will keep.
    thread = threading.Thread(target=work, name="jbn-study", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _write(study: Study, out: Path, options: StudyOptions, summary: Summary, found: dict[str, Any]) -> None:
    """Write figure and results; a figure of other results must not lie beside them, so it goes first."""
    figure = out / directory.FIGURE
    with file_errors(figure):
        drawn = study.draw(summary)
        replace_file(figure, lambda file: drawn.savefig(file, format="png", dpi=DPI))
    directory.write_results(out, options, mesh_of(1), found)
