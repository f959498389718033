"""An environment of fixed versions for the models of others, made by pip alone."""

import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Of Flax's archive of sources, what no wheel has.
EXAMPLE = "examples/imagenet/models.py", "flax_example_resnet.py"

Report = Callable[[str], object]


def make(folder: Path, report: Report) -> Path:
    """Make the environment, or find it made; return its Python.

    Args:
        folder: where it is; what else is there is left alone.
        report: is called with what happens, and with packages that could not be had.

    Raises:
        ValueError: for a folder that holds something else.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp, wanted = folder / "zoo.txt", REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if folder.exists() and not (stamp.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        raise ValueError(f"{folder} holds something that is no environment of this program; expected a new folder.")
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stamp.touch()  # from here on the folder is known, whenever this ends
    report(f"Making {folder}: minutes, once.")
    venv.create(folder, with_pip=True)
    _install(python, report)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _install(python: Path, report: Report) -> None:
    """Install every requirement as it is, and those that can be had where one cannot."""
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-deps"]
    if _fails([*install, "-r", str(REQUIREMENTS)]):
        lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
        for line in filter(None, lines):
            if reason := _fails([*install, line]):
                report(f"{line} could not be installed: {reason}")
    for reason in (_fails([*install, "-e", str(ROOT)]), _take_example(pip, python)):
        if reason:
            report(reason)


def _take_example(pip: list[str], python: Path) -> str:
    """Put the ResNet of Flax's examples where it can be imported; say why not."""
    ask = "import flax, sysconfig; print(flax.__version__, sysconfig.get_path('purelib'))"
    found = subprocess.run([str(python), "-c", ask], capture_output=True, text=True)
    if found.returncode:
        return "Flax could not be imported."
    version, _, place = found.stdout.strip().partition(" ")
    archives = python.parents[1] / "archives"
    fetch = [*pip, "download", "--no-deps", "--no-binary", "flax", f"flax=={version}", "-d", str(archives)]
    if reason := _fails(fetch):
        return f"The sources of Flax could not be had: {reason}"
    with tarfile.open(next(archives.glob("flax-*.tar.gz"))) as archive:
        member = archive.extractfile(f"flax-{version}/{EXAMPLE[0]}")
        assert member is not None
        Path(place, EXAMPLE[1]).write_bytes(member.read())
    return ""


def _fails(command: list[str]) -> str:
    """Run a command; return the last line that it writes where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or ["it says nothing"]
    return lines[-1] if done.returncode else ""
