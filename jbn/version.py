"""The version of the package, which the build reads here too, and how it is got: every message asks here."""

__version__ = "0.1.0"

# What pip installs. Until the package is published its name gets nothing, and a checkout is what there is; from then on
# it is "jbn".
SOURCE = "."


def install(extra: str) -> str:
    """Return the command that installs jbn with an extra, and where it is run; a message ends with it."""
    if SOURCE == ".":
        return f'pip install -e ".[{extra}]" in a checkout of jbn'
    return f'pip install "{SOURCE}[{extra}]"'
