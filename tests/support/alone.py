"""Runs programs by themselves: each in a process of its own, forked from one that has imported a package and no more.

It is started as ``python -P alone.py PACKAGE``, reads a job of JSON from each line of its standard input, and answers
with the exit status. What a job prints is found in two files beside its folder.
"""

import importlib
import json
import os
import signal
import sys
import types
import warnings


def run(path: str, line: int, code: str, folder: str) -> None:
    """Run the code that stands below a line of a file as a reader runs it, in a folder."""
    signal.alarm(1800)
    for stream, name in enumerate(("/dev/null", f"{folder}.out", f"{folder}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), stream)
    os.chdir(folder)
    # What Python would print as a warning is an error; what it keeps to itself stays so.
    warnings.simplefilter("error")
    for kept in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kept)
    warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
    # Lines are counted as in the file, so that a traceback shows them.
    program = compile("\n" * line + code, path, "exec", dont_inherit=True)
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(program, vars(sys.modules["__main__"]))


def serve(package: str) -> None:
    """Run job after job; in the process of a job, return when it is done."""
    importlib.import_module(package)
    for job in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            return run(**json.loads(job))


if __name__ == "__main__":
    serve(sys.argv[1])
