"""``jbn study``: one study, all of them, or their list; ``jbn report``: one page of all."""

import contextlib
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from jbn.lab import signals
from jbn.lab.errors import FileError, OptionError
from jbn.lab.options import ReportOptions, StudyOptions, StudyPlace
from jbn.lab.report import say
from jbn.lab.run.directory import go_on
from jbn.studies import gallery, page
from jbn.studies.perform import QUICK, options_for
from jbn.studies.records import begun
from jbn.studies.results import tally
from jbn.studies.study import Size


def run(options: StudyOptions, place: StudyPlace, console: Console) -> None:
    """Carry out what was asked for, and end with the exit status of what stopped it."""
    if not options.name:
        for study in gallery.STUDIES.values():
            say(console, f"{study.name}: {study.question}")
        say(console, f"jbn study NAME carries one out, jbn study {gallery.ALL} all of them.")
        return
    with _exit_status():
        if options.name == gallery.ALL:
            _run_all(options.size, place.out, console)  # type: ignore[arg-type]
        else:
            gallery.run(options.name, size=options.size, out=place.out, console=console)  # type: ignore[arg-type]


def _run_all(size: Size, out: Path, console: Console) -> None:
    """Carry out all studies: one that fails, or that another process carries out, does not keep the others waiting."""
    for study in gallery.STUDIES.values():  # what was begun otherwise is refused before hours of others
        begun(out / study.name, options_for(study, size))
    ended, failures = {}, 0
    for name in gallery.STUDIES:
        try:
            found = gallery.run(name, size=size, out=out, console=console)
            ended[name] = tally(claim["verdict"] for claim in found["claims"])
        except FileError:
            raise
        except OptionError as error:
            ended[name], failures = f"not carried out: {error.message}", failures + 1
        except Exception as error:
            typer.echo(traceback.format_exc(), err=True)
            ended[name], failures = f"failed: {error!r}", failures + 1
    console.print()
    for name, words in ended.items():
        say(console, f"{name}: {words}")
    if size == "quick":
        say(console, QUICK)
    if failures < len(ended):
        say(console, f"One page of all: {shlex.join(['jbn', 'report', '--out', str(out)])}")
    if failures:
        typer.echo(f"jbn: {failures} of {len(ended)} studies have no results. {go_on(resume=False)}", err=True)
        raise typer.Exit(1)


def make_page(options: ReportOptions, console: Console) -> None:
    """Write the page, and say where it is."""
    try:
        written = page.report(options.out, page=options.page)
    except FileError as error:
        typer.echo(f"jbn: {error}", err=True)
        raise typer.Exit(1) from None
    console.print(f"Wrote {written}", soft_wrap=True)


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """Say how to go on with a study that ends before its time; each cell that is done is on the disk."""
    before = signals.end_at_once(lambda: f"stopped; what was measured is kept. {go_on(resume=False)}")
    try:
        yield
    except FileError as error:
        typer.echo(f"jbn: {error}; what was measured before is kept. {go_on(resume=False)}", err=True)
        raise typer.Exit(1) from None
    finally:
        signals.restore(before)
