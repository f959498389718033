"""Execute the notebooks in clean kernels and save what they print and draw: ``python -m notebooks.execute``."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Figures land in the notebook, whatever the caller draws with.
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
# Warnings are outputs. What native libraries write to the terminal and what packages log to no one is not: it depends
# on which others are installed.
ARGUMENTS = [
    "--log-level=ERROR",
    "--IPKernelApp.capture_fd_output=False",
    "--IPKernelApp.exec_lines=import logging; logging.lastResort = logging.NullHandler()",
]


def executed(path: Path, folder: Path, **environment: str) -> NotebookNode:
    """Return the notebook at `path` with the outputs of a run in `folder`; the first error of a cell ends it."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=ARGUMENTS,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | INLINE | environment)
    notebook.metadata.pop("language_info", None)  # the version of Python, which tells a reader nothing
    return notebook


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        # Those of a CPU: the plugins of other platforms would complain where there is none of these.
        nbformat.write(executed(path, path.parent, JAX_PLATFORMS="cpu"), path)
        print(path.name)
