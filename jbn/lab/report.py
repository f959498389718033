"""What the demo says on the terminal: progress while it trains, a table and a sentence when it is done."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from jbn.lab.training import EVALUATION_INTERVAL


def progress_bars(console: Console) -> Progress:
    """Return bars that show steps, loss, validation accuracy and the time left, one per network."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


def add_bar(progress: Progress, title: str, steps: int) -> TaskID:
    """Add the bar of a network that has not started yet."""
    return progress.add_task(title, total=steps, loss="waiting", accuracy="")


def show_step(progress: Progress, task: TaskID, done: int, history: dict[str, np.ndarray]) -> None:
    """Show on a bar where a network stands after `done` steps, and say once that its loss is not finite."""
    losses = history["training_loss"]
    evaluation = -1 if done == len(losses) else done // EVALUATION_INTERVAL
    accuracy = f"val. {history['validation_accuracy'][evaluation]:.1%}"
    bar = progress.tasks[progress.task_ids.index(task)]
    if done and not np.isfinite(losses[done - 1]) and np.isfinite(losses[: done - 1]).all():
        progress.console.print(f"{bar.description}: the loss is not finite at step {done}; going on with the record.")
    first = not bar.fields["accuracy"]
    loss = "compiling" if first and done < len(losses) else f"loss {losses[done - 1]:.3g}"
    # The time left counts from the first report.
    (progress.reset if first else progress.update)(task, completed=done, loss=loss, accuracy=accuracy)


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
