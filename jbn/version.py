"""The version of the package, which the build reads here too, and how it is got: every message asks here."""

import shlex
import sys

__version__ = "0.1.0"

# What pip installs. Until the package is published its name gets nothing, and a checkout is what there is; from then on
# it is "jbn".
SOURCE = "."


def install(extra: str) -> str:
    """Return the command that installs jbn with an extra, and where it is run; a message ends with it.

    It is that of the Python which runs: a plain pip may be another one's, and many systems refuse it their own.
    """
    what = ["-e", f".[{extra}]"] if SOURCE == "." else [f"{SOURCE}[{extra}]"]
    command = shlex.join([sys.executable or "python", "-m", "pip", "install", *what])
    return f"{command} in a checkout of jbn" if SOURCE == "." else command
