"""The sub-commands of `jbn` and their options."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from jbn import __version__

MODELS = "dense|conv|conv64|all"
MODEL_HELP = (
    "What to train; may be repeated. dense: two hidden layers. conv: one 3x3 convolution on 8x8 images. "
    "conv64: the same on 64x64x3 images, which takes minutes."
)
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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jbn {__version__}")
        raise typer.Exit


@app.callback()
def jbn(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Batch normalization for JAX."""


@app.command()
def demo(
    context: typer.Context,
    model: Annotated[list[str], typer.Option(metavar=MODELS, help=MODEL_HELP)] = DEFAULT,
    learning_rate: Annotated[
        float | None,
        typer.Option(parser=_positive, metavar="RATE", help="Default: 0.1, and 0.1/64 for conv64."),
    ] = None,
    steps: Annotated[int, typer.Option(parser=_whole_number(1, 100_000), metavar="N", help="Steps per network.")] = 400,
    batch_size: Annotated[
        # One image has no batch statistics, and there are 1077 training images.
        int, typer.Option(parser=_whole_number(2, 1077), metavar="N", help="Images per step, 2 to 1077.")
    ] = 128,
    seed: Annotated[
        int,
        typer.Option(
            parser=_whole_number(0, 2**32 - 1),
            metavar="N",
            help="Seed of the data split, the weights and the order of images.",
        ),
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder of checkpoints, results and figure; must not hold a run already, unless --resume.",
        ),
    ] = Path("jbn-demo"),
    devices: Annotated[
        int,
        typer.Option(
            parser=_whole_number(1, 64),
            metavar="N",
            help="Devices that share each batch, 1 to 64, simulated on a CPU. The result is the same to rounding.",
        ),
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train with and without batch normalization on handwritten digits.

    Ends with a table, a figure (DIR/figure.png) and its numbers (DIR/results.json). What batch normalization
    is worth depends on the learning rate: try --learning-rate 1 too. A run that was stopped goes on from its
    last checkpoint with --resume, to the same numbers as if it had not been stopped.
    """
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print("Loading JAX ...", style="dim")
    try:
        from jbn.lab.demo import run
        from jbn.lab.run_directory import OptionError, Options
    except KeyboardInterrupt:
        console.print("Stopped before training began; nothing is saved yet.")
        raise typer.Exit(130) from None

    chosen = {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    options = Options(tuple(model), learning_rate, steps, batch_size, seed)
    try:
        run(options, out, devices=devices, resume=resume, chosen=chosen, console=console)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{error.option}'") from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
