"""The sub-commands of `jbn` and their options."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

MODELS = "dense|conv|conv64|all"
DEFAULT = ["dense", "conv"]

# Plain text instead of Typer's boxes: an error stays one line, in a terminal of any width and in a log.
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise typer.BadParameter(f"got {str(text)!r}, expected a whole number from {low} to {high}")
        return number

    return parse


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise typer.BadParameter(f"got {str(text)!r}, expected a number greater than 0")
    return number


@app.callback()
def jbn() -> None:
    """Batch normalization for JAX."""


@app.command()
def demo(
    context: typer.Context,
    model: Annotated[list[str], typer.Option(metavar=MODELS, help="What to train; may be repeated.")] = DEFAULT,
    learning_rate: Annotated[
        float | None,
        typer.Option(parser=_positive, metavar="RATE", help="Default: 0.1, and 0.1/64 for conv64."),
    ] = None,
    steps: Annotated[int, typer.Option(parser=_whole_number(1, 100_000), metavar="N", help="Steps per network.")] = 400,
    batch_size: Annotated[
        # One image has no batch statistics.
        int, typer.Option(parser=_whole_number(2, 1_000_000), metavar="N", help="Images per step.")
    ] = 128,
    seed: Annotated[
        int,
        typer.Option(parser=_whole_number(0, 2**32 - 1), metavar="N", help="For split, weights and order."),
    ] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run is kept.")] = Path("jbn-demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train with and without batch normalization on handwritten digits.

    Ends with a table, a figure (DIR/figure.png) and its numbers (DIR/results.json). What batch normalization
    is worth depends on the learning rate: try --learning-rate 1 too. A run that was stopped goes on from its
    last checkpoint with --resume, to the same numbers as if it had not been stopped.
    """
    from rich.console import Console

    from jbn.lab.demo import run
    from jbn.lab.run_directory import OptionError, Options

    chosen = {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    options = Options(tuple(model), learning_rate, steps, batch_size, seed)
    try:
        run(options, out, resume=resume, chosen=chosen, console=Console())
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{error.option}'") from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
