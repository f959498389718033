import ast
import json
import platform
import re
import shutil
import sys
import tomllib
from importlib.metadata import packages_distributions

import nbformat
import numpy as np
import pytest

from jbn.version import SOURCE
from notebooks import margins
from notebooks.execute import FOLDER, NOTEBOOKS, executed

# The machinery of the kernel, not what runs in it: what that warns of would be an output of the notebook.
pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What depends on the machine: numbers, and packages for other devices, which pip installs on Linux on x86-64 alone.
ELSEWHERE = r"^libtpu .*\n|, (libtpu|jax-cuda12-pjrt) [\d.]+"
NUMBER = r"[-+]?(\d[\d.]*(e[-+]?\d+)?|nan|inf)\b[.%]?"
# A host with a plain name, or with none, would be found in any text.
HOST = platform.node() if re.search(r"[-.\d]", platform.node()) else ""
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What installs the course and opens a lesson: in an environment that it makes, for many systems refuse pip their own.
COMMAND = re.compile(
    r"python3 -m venv (?P<venv>\S+) && "
    r'(?P=venv)/bin/pip install -e "\.\[(\w+)\]" && (?P=venv)/bin/jupyter lab ([\w./]+\w)'
)
ABSOLUTE = r"(?<![\w./:])(/(home|root|work|tmp|usr|opt|var|mnt|srv|etc|content|Users)/|[A-Z]:\\)"


def read(path):
    return nbformat.read(path, as_version=4)


def codes(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """Return every source and every text that was printed."""
    printed = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook)]
    return [cell.source for cell in notebook.cells] + printed


def test_badges_open_the_notebook_that_they_are_in():
    repository = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    badge = re.compile(r"\]\((https://colab[^)]+/github/[^)]+)\)")
    found = {path: badge.findall("\n".join(texts(read(path)))) for path in NOTEBOOKS}
    assert any(found.values()) == (SOURCE != ".")  # a repository that others see is there once it is published
    for path, links in found.items():
        where = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
        assert all(link == where for link in links)


def test_a_hosted_lesson_installs_what_the_messages_name():
    sources = "\n".join(cell.source for path in NOTEBOOKS for cell in codes(read(path)))
    (cell,) = re.findall(r"^SOURCE = (.*)$", sources, re.MULTILINE)
    assert cell == {".": '[*glob("jbn-*.whl"), ".."][0]'}.get(SOURCE, f'"{SOURCE}"')


def outputs(notebook):
    return [output for cell in codes(notebook) for output in cell.outputs]


def shape(output):
    """Return what a run on another machine has in common with this one: kinds, words and where numbers are."""
    if output.output_type == "stream":
        text = re.sub(ELSEWHERE, "", output.text, flags=re.MULTILINE)
        return output.name, " ".join(re.sub(NUMBER, " # ", text, flags=re.IGNORECASE).split())
    return output.output_type, sorted(output.get("data", {}))


def test_notebooks_are_numbered_without_gaps():
    numbers = [int(path.name.split("_")[0]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(NOTEBOOKS) + 1))
    assert NOTEBOOKS


def test_the_readme_opens_a_lesson_with_one_command():
    ((_, extra, name),) = COMMAND.findall((FOLDER.parent / "README.md").read_text(encoding="utf-8"))
    assert extra in PROJECT["optional-dependencies"]
    assert FOLDER.parent / name in NOTEBOOKS


@each
def test_a_lesson_opens_with_the_command_of_the_readme(path):
    ((_, extra, name),) = COMMAND.findall(read(path).cells[0].source)
    assert extra == "notebooks"
    assert FOLDER.parent / name == path


def packages(extra):
    """Return the names of what an extra installs, of the extras that it names too, and of what jbn always needs."""
    found = set()
    for needed in PROJECT["optional-dependencies"][extra]:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", needed).groups()
        found |= set().union(*map(packages, extras.split(","))) if extras else {name}
    return found | {re.match(r"[\w-]+", needed)[0] for needed in PROJECT["dependencies"]}


@each
def test_the_extra_has_whatever_a_lesson_imports(path):
    nodes = [node for cell in codes(read(path)) for node in ast.walk(ast.parse(cell.source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    owners = packages_distributions()
    for root in {name.partition(".")[0] for name in names} - {"jbn", *sys.stdlib_module_names}:
        assert packages("notebooks") & set(owners[root]), root


@each
def test_titles_and_sections_are_numbered_without_gaps(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    number = path.name.split("_")[0]
    sections = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert re.findall(r"^# (\S+)", text, re.MULTILINE) == [f"{number}."]
    assert sections == [f"{number}.{i}" for i in range(1, len(sections) + 1)]


@each
def test_a_fresh_run_prints_and_draws_what_is_saved(path, tmp_path):
    folder = tmp_path / FOLDER.name  # beside the results of studies, as in a checkout
    folder.mkdir()
    (tmp_path / "docs").symlink_to(FOLDER.parent / "docs")
    for file in (path, *FOLDER.glob("*.safetensors")):
        shutil.copy(file, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    # Three devices, where the saved run had another number: no cell may depend on it.
    fresh = executed(folder / path.name, folder, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="3")
    for saved, new in zip(codes(read(path)), codes(fresh), strict=True):
        assert [shape(output) for output in saved.outputs] == [shape(output) for output in new.outputs], saved.source
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@each
def test_the_saved_outputs_are_those_of_one_run_from_top_to_bottom(path):
    notebook = read(path)
    assert [cell.execution_count for cell in codes(notebook)] == list(range(1, len(codes(notebook)) + 1))
    assert outputs(notebook)


@each
def test_no_output_is_an_error_or_a_warning(path):
    kinds = {(output.output_type, output.get("name")) for output in outputs(read(path))}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}


@each
def test_nothing_tells_of_the_machine(path):
    notebook = read(path)
    for text in texts(notebook):
        assert not re.search(ABSOLUTE, text), text
        assert not HOST or HOST not in text
        assert "\x1b" not in text
    assert set(notebook.metadata) == {"kernelspec"}
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert not any(cell.metadata for cell in notebook.cells)


@each
def test_the_last_cell_asserts_and_does_nothing_else(path):
    last = read(path).cells[-1]
    body = ast.parse(last.source).body if last.cell_type == "code" else []
    assert sum(isinstance(node, ast.Assert) for node in body) >= 3
    assert all(isinstance(node, ast.Assert | ast.Assign) for node in body)


@each
def test_what_is_random_in_a_training_has_one_seed(path):
    sources = [cell.source for cell in codes(margins.seeded(read(path), 7))]
    assert sum(source.count("SEED = 7") for source in sources) == 1
    assert "SEED = 0" not in "".join(sources)


def test_margins_are_what_assertions_compare(capsys):
    cell = "b = a + 1\nassert 1 < a < b\nassert np.isfinite(a)\nassert b == 'c'"
    exec(margins.asking(cell), {"a": 1.5, "np": np})
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [[True, "1.5", "2.5"], [True, "True"], [False, "2.5"]]
    assert [test for test, _ in margins.assertions(cell)] == ["1 < a < b", "np.isfinite(a)", "b == 'c'"]
    assert margins.span(["1.5", "nan"]) == "1.5 to nan"
