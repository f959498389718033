"""The command line: ``jbn``, or ``python -m jbn``."""

import os
import sys


def main() -> None:
    """Run the command line, or say in one line what to install for it."""
    try:
        from jbn.cli.commands import app

        app(prog_name="jbn")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "jbn"):
            raise
        fix = f'the command line needs {missing}, which is not installed: pip install "jbn[lab]"'
        print(f"jbn: {fix}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if getattr(end, "code", 130) != 130:
            raise
        # After Ctrl-C a thread of JAX may still compile, and crash an interpreter that is being taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


if __name__ == "__main__":
    main()
