"""What a run says on the terminal: progress while it trains, a table and a sentence of the demo when it is done."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table


@contextlib.contextmanager
def bar(console: Console, title: str, steps: int) -> Iterator[Callable[..., None]]:
    """Show steps, loss, accuracy and the time left; yields what shows a step, with `loss` or `accuracy` in words."""
    columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    more = (TextColumn("{task.fields[accuracy]}"), TimeRemainingColumn(compact=True))
    off = not console.is_terminal
    with Progress(TextColumn("{task.description}"), *columns, *more, console=console, disable=off) as progress:
        task = progress.add_task(title, total=steps, loss="compiling", accuracy="")
        yield lambda step, **words: progress.update(task, completed=step, **words)


def table_of(networks: list[dict[str, Any]], devices: str) -> Table:
    """Return the table of the entries of `networks` in results.json, trained on `devices`."""
    numbers = ("test accuracy", "test loss", "steps to 90%", "steps to 95%", "ms/step")
    table = Table(
        "model",
        "batch norm",
        *(Column(name, justify="right") for name in numbers),
        caption=f"90%, 95%: validation accuracy; ms/step: the median, on {devices}",
    )
    for network in networks:
        table.add_row(
            network["model"],
            "yes" if network["batch_norm"] else "no",
            _text(network["test_accuracy"], ".1%", "-"),
            _text(network["test_loss"], ".3g", "not finite"),
            _text(network["steps_to_90_percent"], "d", "never"),
            _text(network["steps_to_95_percent"], "d", "never"),
            _text(network["median_step_ms"], ".2f", "-"),
            end_section=network["batch_norm"],
        )
    return table


def finding(plain: dict[str, Any], normalized: dict[str, Any]) -> str:
    """Return what happened to a model, in a sentence, whichever of its two networks did better."""
    accuracies = [_text(network["test_accuracy"], ".1%", "-") for network in (normalized, plain)]
    reached = [_reached(network["steps_to_95_percent"]) for network in (normalized, plain)]
    return (
        f"{plain['model']} at learning rate {plain['learning_rate']:g}: "
        f"with batch norm {accuracies[0]} on test, {reached[0]}; without {accuracies[1]}, {reached[1]}."
    )


def _reached(steps: int | None) -> str:
    return "never reached 95% in validation" if steps is None else f"95% in validation after {steps} steps"


def _text(value: float | None, form: str, missing: str) -> str:
    return missing if value is None else format(value, form)
