"""What a page shows works as somebody pastes it: each block of Python alone, and each command line of jbn."""

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

from benchmarks import compilers

pytest.importorskip("flax")  # of which most blocks have a module

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if "_build" not in path.parts]
FENCED = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
# What tests or a shell may have set, and a reader has not.
SETTINGS = "JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "JAX_NUMPY_RANK_PROMOTION", "KERAS_BACKEND", "XLA_FLAGS"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


class Block(NamedTuple):
    path: Path
    line: int  # of its fence
    code: str

    def __str__(self):
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(*languages):
    """Return the blocks of these languages on all pages, and in the texts that modules begin with."""
    found = []
    for path in sorted([*PAGES, *(ROOT / "jbn").rglob("*.py")]):
        text = path.read_text(encoding="utf-8")
        for match in FENCED.finditer(text):
            if match[2].strip() in languages:
                found.append(Block(path, text.count("\n", 0, match.start()) + 1, dedent(match[3])))
    return found


PYTHON = blocks("python")


def imported(code):
    """Return the packages that a block imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


class Runner:
    """Runs blocks, each in a process of its own."""

    def __init__(self):
        self.servers = {}

    def server(self, package):
        """Return the process that has imported a package, and forks one for each block that imports it too."""
        if package not in self.servers:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            for name in SETTINGS:
                environment.pop(name, None)
            self.servers[package] = subprocess.Popen(
                [sys.executable, "-P", ROOT / "tests/support/alone.py", package],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self.servers[package]

    def run(self, block, folder):
        """Return the exit status of a block, what it printed, and its errors."""
        folder = folder / "reader"
        folder.mkdir()
        server = self.server(next(name for name in ("flax", "jax", "json") if name in {"json", *imported(block.code)}))
        job = {"path": str(block.path), "line": block.line, "code": block.code, "folder": str(folder)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, *(Path(f"{folder}{suffix}").read_text(encoding="utf-8") for suffix in (".out", ".err"))


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    for server in runner.servers.values():
        server.communicate()


def lacks(block):
    """Return what a block needs and this environment lacks."""
    packages = [name for name in imported(block.code) if find_spec(name) is None]
    targets = [target for target in compilers.TARGETS if f'"{target}"' in block.code]
    return packages + [reason for target in targets if (reason := compilers.missing(target))]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_block_stands_alone(block, runner, tmp_path):
    # A name that is mistyped must not read as a package that is not installed: those are in the extras of the project.
    assert not {name for name in imported(block.code) if find_spec(name) is None and name not in PROJECT}, block
    if missing := lacks(block):
        pytest.skip(f"needs {', '.join(missing)}")
    status, printed, errors = runner.run(block, tmp_path)
    assert status == 0, f"{block}\n{errors}"
    asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block.code)))
    assert asserts or printed.strip(), f"{block} neither asserts nor prints anything"


def test_no_block_of_python_goes_by_another_name():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert {name for name in re.findall(r"```+ *([^\n`]+)$", pages, re.MULTILINE) if "py" in name} == {"python"}


# A path may stand before the name, and what a shell makes something of ends the line.
COMMAND = re.compile(r"""(?:^|[\s"'(/])jbn ([^\n&|;()<>"'`$]+)""", re.MULTILINE)
COMMANDS = [
    (block, line) for block in blocks("sh", "bash") for line in COMMAND.findall(block.code.replace("\\\n", " "))
]


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=[f"{block}:{line[:30]}" for block, line in COMMANDS])
def test_a_command_line_has_options_that_exist(block, line, monkeypatch, tmp_path):
    typer = pytest.importorskip("typer")
    from jbn.cli.commands import app

    command = typer.main.get_command(app)
    name, *words = shlex.split(line, comments=True)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose start-up files --install-completion writes to, once it is read
    with contextlib.suppress(typer.Exit, SystemExit):  # of --help, --version and --install-completion
        if name.startswith("-"):
            command.make_context("jbn", [name, *words])
        else:
            command.commands[name].make_context(name, words)
