"""The command line: `jbn`, or `python -m jbn`."""

import os
import sys


def main() -> None:
    """Run the command line, or say in one line what to install for it."""
    try:
        from jbn.lab.commands import app

        app(prog_name="jbn")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "jbn"):
            raise
        print(
            f'jbn: the command line needs {missing}, which is not installed: pip install "jbn[lab]"',
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:
            # After Ctrl-C a thread of JAX may still compile, and crash an interpreter that is being taken down.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise


if __name__ == "__main__":
    main()
