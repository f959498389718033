"""``jbn bench``: the measurements of a checkout, which are no part of the package."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from jbn.lab.loading import loading


def run(arguments: list[str], help: Callable[[], str]) -> int:
    """Do what ``python -m benchmarks`` does, in this process, which signals end; or say where it is to be had.

    Where there are no benchmarks, ``help()`` is what is said of them.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        if "--help" in arguments:
            typer.echo(help())
            return 0
        typer.echo("jbn: the benchmarks are not installed with the package: run jbn bench in a checkout.", err=True)
        return 2
    os.chdir(checkout)  # for the processes that a study starts
    sys.path.insert(0, str(checkout))
    with loading():
        app = importlib.import_module("benchmarks.__main__").app
    app(arguments, prog_name="jbn bench")
    return 0
