"""The commands of ``jbn``."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from jbn import __version__
from jbn.cli import help
from jbn.lab.loading import loading
from jbn.lab.options import (
    CheckOptions,
    DemoOptions,
    DemoPlace,
    DiagnoseOptions,
    EvaluateOptions,
    ExportOptions,
    ReportOptions,
    StudyOptions,
    StudyPlace,
    TrainOptions,
    TrainPlace,
    command,
)

# Plain text instead of Typer's boxes: an error stays one line, in a terminal of any width and in a log.
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
help.install()


def _add(function: Callable[..., None], **settings: Any) -> Callable[..., None]:
    """Let a function be a command; its first line stands in the list of the commands."""
    return app.command(short_help=help.summary(function), **settings)(function)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Let a function of records of options be a command."""
    return _add(command(function))


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
    """Batch normalization for JAX.

    jbn COMMAND --help says what a command does, with all its options. To have the shell complete commands, options and
    their values, run jbn --install-completion once and open a new shell.
    """


@_command
def demo(options: DemoOptions, place: DemoPlace) -> None:
    """Train with and without batch normalization on handwritten digits.

    Ends with a table, a figure (DIR/figure.png) and its numbers (DIR/results.json). At the default learning rate
    networks without batch normalization learn too, in more steps; at a larger one only those with it may, and at a
    still larger one none. See --model dense --learning-rate 3 --out other. A run that was stopped goes on from
    its last checkpoint with --resume, to the same numbers as if it had not been stopped.
    """
    with loading():
        from jbn.lab.demo import run
        from jbn.lab.report import new_console
        from jbn.lab.run.processes import exit_status

    with exit_status(place.out):
        run(options, place, new_console())


@_command
def check(options: CheckOptions) -> None:
    """Check jbn on the devices of this machine: accuracy, gradients, masks, synchronization, cost.

    Everything is compared with float64, by the bounds of docs/how/accuracy.md. It takes some ten seconds. Exit
    status: 0 passed, 1 a check failed, 2 a wrong option.
    """
    with loading():
        from jbn.lab.check_command import run
        from jbn.lab.report import new_console

    raise typer.Exit(0 if run(options.devices, new_console()) else 1)


@_command
def train(options: TrainOptions, place: TrainPlace) -> None:
    """Train a network with batch normalization on all devices of one or many processes.

    The global batch decides the result: its rows are spread over the devices, and batch normalization sees all of
    them. Ends with a table, a figure of loss and accuracy of all steps (DIR/figure.png), and numbers
    (DIR/results.json). A run that was stopped or killed goes on with --resume, on any number of devices and processes.
    SIGTERM, Ctrl-C and a closed terminal save first. Exit status: 0 done, 1 stopped by an error, 2 a wrong option or
    file, 75 another process was lost, 143, 130 and 129 stopped by these.
    """
    with loading():
        from jbn.lab.report import new_console
        from jbn.lab.run.processes import exit_status
        from jbn.lab.train import run

    with exit_status(place.out):
        run(options, place, new_console())


@_command
def evaluate(options: EvaluateOptions) -> None:
    """Say how often a network that jbn train has saved is right, class by class.

    On the validation data of its run, or on others. Beside what comes out by the running statistics stands what does by
    the statistics of each batch, as in training: where that is much better, ask jbn diagnose. Writes nothing. Exit
    status: 0 done, 1 the loss is not finite, 2 a wrong option or a checkpoint that cannot be read.
    """
    with loading():
        from jbn.lab.evaluation import run
        from jbn.lab.report import new_console

    raise typer.Exit(0 if run(options, new_console()) else 1)


@_command
def diagnose(options: DiagnoseOptions) -> None:
    """Say what is wrong with the batch normalization of a network that jbn train has saved.

    Runs one batch of the training data and compares what the layers see with what they remember. Writes nothing into
    the run. Exit status: 0 nothing found, 1 something found, 2 a wrong option or a checkpoint that cannot be read.
    """
    with loading():
        from jbn.lab.diagnosis import run
        from jbn.lab.report import new_console

    raise typer.Exit(1 if run(options, new_console()).findings else 0)


@_command
def export(options: ExportOptions) -> None:
    """Write a network that jbn train has saved into files that need neither jbn nor Flax.

    The end of a FILE says what it is. .jaxexport: the network in evaluation, its batch norms folded into the layers
    beside them, for jax.export.deserialize: any number of images, on CPUs, GPUs and TPUs. .onnx: the same for runtimes
    of ONNX; needs the extra "onnx". .safetensors or .npz: weights and running statistics, not folded, for
    jbn.load_arrays. Before a file gets its name it is read back, and its logits of a batch of the training data are
    compared with those of the network. Exit status: 0 done, 1 a file cannot be written or gives other logits, 2 a wrong
    option, or a checkpoint that cannot be read.
    """
    with loading():
        from jbn.lab.export import run
        from jbn.lab.report import new_console

    run(options, new_console())


@_command
def study(options: StudyOptions, place: StudyPlace) -> None:
    """Measure what is claimed about batch normalization; see what holds.

    Each study ends with a table, the claims beside what came out, a figure (DIR/NAME/figure.png) and its numbers
    (DIR/NAME/results.json). One that was stopped goes on by the same command. Exit status: 0 done, whatever came out,
    1 stopped by an error, 2 a wrong option, 143, 130 and 129 stopped by SIGTERM, Ctrl-C and a closed terminal.
    """
    with loading():
        from jbn.lab.report import new_console
        from jbn.studies.command import run

    run(options, place, new_console())


@_command
def report(options: ReportOptions) -> None:
    """Make one page of all studies that jbn study has carried out: what is claimed beside what came out.

    It is a file for a browser that needs nothing beside it, no network either. Exit status: 0 done, 1 the page cannot
    be written, 2 a wrong option or damaged results.
    """
    with loading():
        from jbn.lab.report import new_console
        from jbn.studies.command import make_page

    make_page(options, new_console())


def bench(context: typer.Context) -> None:
    """Time jbn beside the batch norms of the field; in a checkout of its repository only.

    The benchmarks are no part of the package: run this command in a checkout of the repository, with what
    its extras lab and peers install. There this help lists its options too. Exit status: 0 done, 2 a wrong
    option or no checkout.
    """
    from jbn.lab import bench_command

    raise typer.Exit(bench_command.run(context.args, context.get_help))


_add(
    bench,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True},
)
