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


def _number(fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and fits(number)):
            raise typer.BadParameter(f"got {str(text)!r}, expected {expected}")
        return number

    return parse


_positive = _number(lambda number: number > 0, "a number greater than 0")
_not_negative = _number(lambda number: number >= 0, "a number from 0 on")
_share = _number(lambda number: 0 <= number < 1, "a number from 0 to below 1")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"got {str(text)!r}, expected {', '.join(choices[:-1])} or {choices[-1]}")
        return text

    return parse


def _chosen(context: typer.Context) -> set[str]:
    """Return the names of the options that were given on the command line."""
    return {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


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
        from jbn.lab.demo import Options, run
        from jbn.lab.run_directory import OptionError
    except KeyboardInterrupt:
        console.print("Stopped before training began; nothing is saved yet.")
        raise typer.Exit(130) from None

    chosen = _chosen(context)
    options = Options(tuple(model), learning_rate, steps, batch_size, seed)
    try:
        run(options, out, devices=devices, resume=resume, chosen=chosen, console=console)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{error.option}'") from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def check(
    devices: Annotated[
        int | None,
        typer.Option(
            parser=_whole_number(1, 64), metavar="N", help="Devices to check, simulated on a CPU. Default: all."
        ),
    ] = None,
) -> None:
    """Check jbn on the devices of this machine: accuracy, gradients, masks, synchronization, cost.

    Everything is compared with float64, by the bounds of the README. It takes some ten seconds. Exit status: 0 passed,
    1 a check failed, 2 a wrong option.
    """
    from rich.console import Console

    from jbn.lab.check_command import run
    from jbn.lab.run_directory import OptionError

    try:
        passed = run(devices, Console())
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{error.option}'") from None
    raise typer.Exit(0 if passed else 1)


@app.command()
def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            parser=_one_of("dense", "conv", "resnet"),
            metavar="dense|conv|resnet",
            help="dense, conv: the networks of the demo; resnet: three residual blocks.",
        ),
    ] = "resnet",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of .npz files with images (n, h, w) or (n, h, w, c), uint8 or float, and labels (n,). "
            "Default: handwritten digits.",
        ),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of images to evaluate on, beside --data.")
    ] = None,
    epochs: Annotated[
        int, typer.Option(parser=_whole_number(1, 100_000), metavar="N", help="Times through the data.")
    ] = 10,
    batch_size: Annotated[
        int,
        typer.Option(
            parser=_whole_number(2, 2**24),
            metavar="N",
            help="Images a step, on all devices together. It decides the result; the number of devices does not.",
        ),
    ] = 128,
    optimizer: Annotated[
        str, typer.Option(parser=_one_of("sgd", "adamw"), metavar="sgd|adamw", help="sgd has Nesterov's momentum 0.9.")
    ] = "sgd",
    learning_rate: Annotated[
        float | None, typer.Option(parser=_positive, metavar="RATE", help="Default: 0.05 for sgd, 0.001 for adamw.")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            parser=_one_of("cosine", "constant"),
            metavar="cosine|constant",
            help="The learning rate after its warmup: falling to 0, or the same.",
        ),
    ] = "cosine",
    warmup_epochs: Annotated[
        float, typer.Option(parser=_not_negative, metavar="N", help="Epochs in which the rate grows from 0.")
    ] = 1.0,
    weight_decay: Annotated[
        float, typer.Option(parser=_not_negative, metavar="W", help="Pulls kernels towards 0; scale and bias are left.")
    ] = 1e-4,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            parser=_one_of("shift", "flip"), metavar="shift|flip", help="Change images at random; may be repeated."
        ),
    ] = None,
    ema: Annotated[
        float,
        typer.Option(parser=_share, metavar="DECAY", help="Keep an average of weights too, such as 0.999; 0: none."),
    ] = 0.0,
    dtype: Annotated[
        str,
        typer.Option(
            parser=_one_of("float32", "bfloat16"),
            metavar="float32|bfloat16",
            help="Of the arithmetic; weights and statistics are float32.",
        ),
    ] = "float32",
    seed: Annotated[
        int,
        typer.Option(parser=_whole_number(0, 2**32 - 1), metavar="N", help="Seed of weights, order and augmentation."),
    ] = 0,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of checkpoints, metrics and results; shared by all machines.")
    ] = Path("jbn-train"),
    devices: Annotated[
        int | None,
        typer.Option(
            parser=_whole_number(1, 64), metavar="N", help="Devices of this process, simulated on a CPU. Default: all."
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where process 0 is reached, for a run of several processes."),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(parser=_whole_number(1, 100_000), metavar="N", help="How many processes there are.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(parser=_whole_number(0, 99_999), metavar="N", help="Which of them this is, from 0 on.")
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Learn --coordinator, --num-processes and --process-id from SLURM, Open MPI or the TPU slice.",
        ),
    ] = False,
    timeout: Annotated[
        int,
        typer.Option(
            parser=_whole_number(5, 3600), metavar="SECONDS", help="After which a silent process is taken for lost."
        ),
    ] = 100,
    save_every: Annotated[
        int, typer.Option(parser=_whole_number(1, 2**31 - 1), metavar="N", help="Steps between checkpoints.")
    ] = 100,
    keep: Annotated[int, typer.Option(parser=_whole_number(1, 1000), metavar="N", help="Checkpoints to keep.")] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    at: Annotated[
        int | None,
        typer.Option(
            parser=_whole_number(1, 2**31 - 1),
            metavar="STEP",
            help="With --resume: from this checkpoint, not the last.",
        ),
    ] = None,
) -> None:
    """Train a network with batch normalization on all devices of one or many processes.

    The global batch decides the result: its rows are spread over the devices, and batch normalization sees all of
    them. A run that was stopped or killed goes on with --resume, on any number of devices and processes.
    SIGTERM and Ctrl-C save first. Exit status: 0 done, 1 stopped by an error, 2 a wrong option or file,
    75 another process was lost, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    import jax
    from rich.console import Console

    from jbn.lab import processes
    from jbn.lab.run_directory import FileError, OptionError
    from jbn.lab.train import Options, Place, Stopped, go_on, run

    options = Options(
        model=model,
        data=data,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        weight_decay=weight_decay,
        augment=tuple(sorted(set(augment or ()))),
        ema=ema,
        dtype=dtype,
        seed=seed,
    )
    if at is not None and not resume:
        raise typer.BadParameter(f"got {at}; expected --resume beside it", param_hint="'--at'")
    place = Place(out, devices, resume, at, save_every, keep)
    try:
        processes.join(coordinator, num_processes, process_id, cluster=cluster, timeout=timeout)
        run(options, place, chosen=_chosen(context), console=Console())
        processes.leave()
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{error.option}'") from None
    except Stopped as stop:
        typer.echo(f"jbn: {stop}", err=True)
        processes.leave()
        raise typer.Exit(stop.status) from None
    except FileError as error:
        processes.desert(f"{error}; the checkpoints before that are whole. {go_on()}")
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        processes.lost(error)


@app.command()
def diagnose(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="The --out of jbn train, for its last checkpoint, or one of its checkpoints: DIR/checkpoints/100.",
        ),
    ],
    batch_size: Annotated[
        int | None,
        typer.Option(parser=_whole_number(2, 2**24), metavar="N", help="Training images to look at. Default: a batch."),
    ] = None,
    seed: Annotated[
        int, typer.Option(parser=_whole_number(0, 2**32 - 1), metavar="N", help="Seed of the choice of images.")
    ] = 0,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the statistics of every channel too.")
    ] = None,
) -> None:
    """Say what is wrong with the batch normalization of a network that jbn train has saved.

    Runs one batch of the training data and compares what the layers see with what they remember. Writes nothing into
    the run. Exit status: 0 nothing found, 1 something found, 2 a wrong option or a checkpoint that cannot be read.
    """
    from rich.console import Console

    from jbn.lab.diagnosis import diagnosed, figure_of, table_of
    from jbn.lab.run_directory import OptionError, write_atomically

    console = Console()
    try:
        if figure is not None and (figure.suffix != ".png" or not figure.parent.is_dir()):
            raise OptionError(
                "--figure", f"got '{figure}'; expected a name that ends in .png, in a folder that is there"
            )
        found = diagnosed(checkpoint, batch_size=batch_size, seed=seed)
        console.print(found.title, soft_wrap=True, markup=False, highlight=False)
        console.print(table_of(found.diagnosis))
        for message in str(found.diagnosis).splitlines():
            console.print(message, soft_wrap=True, markup=False, highlight=False)
        if figure is not None:
            drawn = figure_of(found.diagnosis, found.title)
            try:
                write_atomically(figure, lambda partial: drawn.savefig(partial, format="png", dpi=130))
            except OSError as error:
                raise OptionError("--figure", f"cannot write '{figure}' ({error.strerror})") from None
            console.print(f"Wrote {figure}", soft_wrap=True)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{error.option}'") from None
    raise typer.Exit(1 if found.diagnosis.findings else 0)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Time jbn beside the batch norms of the field; in a checkout of its repository only. See jbn bench --help."""
    from jbn.lab import bench_command

    raise typer.Exit(bench_command.run(context.args))
