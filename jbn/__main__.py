"""The command line: ``jbn``, or ``python -m jbn``."""

import os
import sys

from jbn.lab import signals
from jbn.version import install


def main() -> None:
    """Run the command line, or say in one line what to install for it."""
    signals.end_at_once(lambda: "stopped at once.")
    try:
        from jbn.cli import streams

        output = streams.replace()
        status = streams.finish(output, _run())
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "jbn"):
            raise
        fix = f"the command line needs {missing}, which is not installed: {install('lab')}"
        print(f"jbn: {fix}", file=sys.stderr)
        status = 2
    if status > 128:
        # After a signal a thread of JAX may still compile, and crash an interpreter that is being taken down.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run() -> int:
    """Run the command that was typed; return its exit status."""
    from jbn.cli.commands import app

    try:
        app(prog_name="jbn")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
