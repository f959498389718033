"""What a run says on the terminal: progress while it trains, a table and a sentence of the demo when it is done."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table


@contextlib.contextmanager
def bar(console: Console, title: str, steps: int) -> Iterator[Callable[..., None]]:
    """Show steps, loss, accuracy and the time left; yields what shows a step, with its ``loss`` or ``accuracy``."""
    columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    more = (TextColumn("{task.fields[accuracy]}"), TimeRemainingColumn(compact=True))
    off = not console.is_terminal
    with Progress(TextColumn("{task.description}"), *columns, *more, console=console, disable=off) as progress:
        task = progress.add_task(title, total=steps, loss="compiling", accuracy="")
        yield lambda step, **words: progress.update(task, completed=step, **words)


# The numbers of the demo's table: their heading, their name in results.json, how they look, and what else stands there.
NUMBERS = (
    ("test accuracy", "test_accuracy", ".1%", "-"),
    ("test loss", "test_loss", ".3g", "not finite"),
    ("steps to 90%", "steps_to_90_percent", "d", "never"),
    ("steps to 95%", "steps_to_95_percent", "d", "never"),
    ("ms/step", "median_step_ms", ".2f", "-"),
)


def table_of(networks: list[dict[str, Any]], devices: str) -> Table:
    """Return the table of the entries of ``networks`` in results.json, trained on ``devices``."""
    caption = f"90%, 95%: validation accuracy; ms/step: the median, on {devices}"
    table = Table("model", "batch norm", *(Column(name, justify="right") for name, *_ in NUMBERS), caption=caption)
    for network in networks:
        values = ((network[name], form, missing) for _, name, form, missing in NUMBERS)
        shown = [missing if value is None else format(value, form) for value, form, missing in values]
        batch_norm = network["batch_norm"]
        table.add_row(network["model"], "yes" if batch_norm else "no", *shown, end_section=batch_norm)
    return table


def finding(plain: dict[str, Any], normalized: dict[str, Any]) -> str:
    """Return what happened to a model, in a sentence, whichever of its two networks did better."""
    (with_it, its), (without, theirs) = (
        (f"{network['test_accuracy']:.1%}", network["steps_to_95_percent"]) for network in (normalized, plain)
    )
    reached = [f"95% in validation after {n} steps" if n else "never reached 95% in validation" for n in (its, theirs)]
    heading = f"{plain['model']} at learning rate {plain['learning_rate']:g}"
    return f"{heading}: with batch norm {with_it} on test, {reached[0]}; without {without}, {reached[1]}."
