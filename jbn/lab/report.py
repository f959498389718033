"""What a run says on the terminal: progress while it trains, a table and a sentence of the demo when it is done."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Column, Table

from jbn.lab.run.metrics import curve
from jbn.paths import count_of

WIDE = 80  # columns from which there is room for a bar and the time left
NARROW = 60  # columns that a table takes at least: with fewer, Rich would leave out names and digits


def new_console() -> Console:
    """Return a console that prints the names of files as they are: Rich would read ``[a]`` and ``:a:`` in them."""
    return Console(markup=False, emoji=False)


def waiting(console: Console, words: str) -> Status:
    """Return a context that says on a terminal what takes long, in characters that every locale has."""
    return console.status(words, spinner="line")


@contextlib.contextmanager
def bar(console: Console, title: str, steps: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show steps, loss and accuracy, on a wide terminal also a bar and the time left, after ``done`` steps.

    Yields what shows a step, with its ``loss`` or ``accuracy``.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[accuracy]}")]
    if console.width >= WIDE:
        columns[1:1], columns[4:] = [BarColumn(bar_width=16)], [columns[-1], TimeRemainingColumn(compact=True)]
    off = not console.is_terminal
    with Progress(*columns, console=console, disable=off) as progress:
        # A step of now and those of before, at once, would promise an end that is far too early.
        task = progress.add_task(title, total=steps, completed=done, loss="compiling ...", accuracy="")
        yield lambda step, **words: progress.update(task, completed=step, **words)


# The numbers of the demo's table: their heading, their name in results.json, how they look, and what else stands there.
NUMBERS = (
    ("test\naccuracy", "test_accuracy", ".1%", "-"),
    ("test\nloss", "test_loss", ".3g", "inf/NaN"),
    ("steps\nto 90%", "steps_to_90_percent", "d", "never"),
    ("steps\nto 95%", "steps_to_95_percent", "d", "never"),
    ("ms a\nstep", "median_step_ms", ".2f", "-"),
)


def table_of(networks: list[dict[str, Any]], devices: str) -> Table:
    """Return the table of the entries of ``networks`` in results.json, trained on ``devices``."""
    caption = f"90%, 95%: validation accuracy; ms a step: the median, on {devices}"
    numbers = (Column(name, justify="right", no_wrap=True) for name, *_ in NUMBERS)
    names = (Column(name, no_wrap=True) for name in ("\nmodel", "batch\nnorm"))
    table = Table(*names, *numbers, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for network in networks:
        values = ((network[name], form, missing) for _, name, form, missing in NUMBERS)
        shown = [missing if value is None else format(value, form) for value, form, missing in values]
        batch_norm = network["batch_norm"]
        table.add_row(network["model"], "yes" if batch_norm else "no", *shown, end_section=batch_norm)
    return table


def table_of_run(lines: list[dict[str, Any]], per_epoch: int, caption: str) -> Table:
    """Return the table of a run from the ``lines`` of its metrics.jsonl: how it ended, and how good it has been.

    A step is judged by the statistics of its batch, at the weights before it: of these there is the mean over the last
    epoch, of ``per_epoch`` steps.
    """
    numbers = (
        Column(name, justify="right", no_wrap=True) for name in ("\nloss", "\naccuracy", "best\naccuracy", "at\nstep")
    )
    table = Table("", *numbers, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    _, losses = curve(lines, "loss")
    _, right = curve(lines, "accuracy")
    loss, accuracy = (_mean(values[-per_epoch:]) for values in (losses, right))
    table.add_row("training, last epoch", *_shown(loss, accuracy), "", "")
    for name, words in (("validation", "validation"), ("average", "validation, average of weights")):
        (steps, accuracies), (_, losses) = curve(lines, f"{name}_accuracy"), curve(lines, f"{name}_loss")
        if steps:
            best = max(range(len(steps)), key=lambda look: accuracies[look] or 0)
            shown = _shown(losses[-1], accuracies[-1])
            table.add_row(words, *shown, _shown(0, accuracies[best])[1], str(steps[best]))
    return table


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _shown(loss: float | None, accuracy: float | None) -> tuple[str, str]:
    return "inf/NaN" if loss is None else f"{loss:.3g}", "-" if accuracy is None else f"{accuracy:.1%}"


def show(console: Console, table: Table) -> None:
    """Print a table as a terminal of 60 columns has room for; a narrower one breaks its lines, and loses nothing."""
    width = console.width
    console.width = max(width, NARROW)
    try:
        console.print(table)
    finally:
        console.width = width


def say(console: Console, sentence: str) -> None:
    """Print a sentence, broken between words on a terminal, in a file on one line."""
    console.print(sentence, soft_wrap=not console.is_terminal)


def finding(plain: dict[str, Any], normalized: dict[str, Any]) -> str:
    """Return what happened to a model, in a sentence, whichever of its two networks did better."""
    level = 95 if plain["steps_to_95_percent"] or normalized["steps_to_95_percent"] else 90
    (with_it, its), (without, theirs) = (
        (f"{network['test_accuracy']:.1%}", network[f"steps_to_{level}_percent"]) for network in (normalized, plain)
    )
    reached = [
        f"{level}% in validation after {count_of(n, 'step')}" if n else f"never reached {level}% in validation"
        for n in (its, theirs)
    ]
    heading = f"{plain['model']} at learning rate {plain['learning_rate']:g}"
    return f"{heading}: with batch norm {with_it} on test, {reached[0]}; without {without}, {reached[1]}."
