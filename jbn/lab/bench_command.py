"""``jbn bench``: the measurements of a checkout, which are no part of the package."""

import subprocess
import sys
from pathlib import Path

import typer


def run(arguments: list[str]) -> int:
    """Hand the arguments to ``python -m benchmarks`` and return its exit status, or say where it is to be had."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        typer.echo("jbn: the benchmarks are not installed with the package: run jbn bench in a checkout.", err=True)
        return 2
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=checkout, check=False).returncode
