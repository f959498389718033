"""``jbn study``: one study, all of them, or their list."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

from jbn.lab import signals
from jbn.lab.errors import FileError
from jbn.lab.options import StudyOptions, StudyPlace
from jbn.lab.report import say
from jbn.lab.run.directory import go_on
from jbn.studies import gallery


def run(options: StudyOptions, place: StudyPlace, console: Console) -> None:
    """Carry out what was asked for, and end with the exit status of what stopped it."""
    if not options.name:
        for study in gallery.STUDIES.values():
            say(console, f"{study.name}: {study.question}")
        say(console, f"jbn study NAME carries one out, jbn study {gallery.ALL} all of them.")
        return
    with _exit_status():
        names = gallery.STUDIES if options.name == gallery.ALL else [options.name]
        for name in names:
            gallery.run(name, size=options.size, out=place.out, console=console)  # type: ignore[arg-type]


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
