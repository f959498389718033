"""`jbn bench`: the measurements of a checkout, which are no part of the package."""

import sys
from pathlib import Path

import typer


def run(arguments: list[str]) -> None:
    """Hand the arguments to ``python -m benchmarks``, or say where it is to be had."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        typer.echo("jbn: the benchmarks are not installed with the package: run jbn bench in a checkout.", err=True)
        raise typer.Exit(2)
    sys.path.insert(0, str(checkout))
    from benchmarks.__main__ import app

    app(arguments, prog_name="jbn bench")
