"""What a release says of itself, in every place alike: its version, and how it is got."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jbn import version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
PROGRAMS = [*(ROOT / "jbn").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
# The changelog tells what was, and tests what must not be.
TEXTS = [
    *(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),
    *(path for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.md")),
    *(ROOT / "notebooks").glob("*.ipynb"),
]
BY_NAME = re.compile(r"pip install (?:-\S+ +)*[\\\"']*jbn\b")
FROM_CHECKOUT = re.compile(r"pip install (?:-\S+ +)*[\\\"']*\.[\[\\\"'`\s]")


def test_the_patterns_know_a_name_from_a_checkout():
    assert all(map(BY_NAME.match, ("pip install jbn", 'pip install "jbn[flax]"', r"pip install -U \"jbn[lab]\"")))
    assert all(map(FROM_CHECKOUT.match, ('pip install -e ".[test]"', r"pip install \".[flax]\"", "pip install .\n")))
    assert not any(map(BY_NAME.match, ('pip install ".[flax]"', "pip install jbn_x", "pip install safetensors")))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_message_asks_one_place_how_jbn_is_got(path):
    text = path.read_text(encoding="utf-8")
    if path != ROOT / "jbn" / "version.py":
        assert not BY_NAME.search(text)
        assert not FROM_CHECKOUT.search(text)
    assert set(re.findall(r"\binstall\(['\"](\w+)['\"]\)", text)) <= {*PROJECT["optional-dependencies"]}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_installs_by_name_what_has_no_name_yet(path):
    assert version.SOURCE != "." or not BY_NAME.search(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_installs_a_checkout_into_an_environment_of_its_own(path):
    text = path.read_text(encoding="utf-8")
    before = [text[: found.start()] for found in FROM_CHECKOUT.finditer(text)]
    assert all(re.search(r"\.venv[\w-]*/bin/$", part) for part in before)  # many systems refuse pip their own


def test_one_constant_changes_every_message(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a b/bin/python")
    assert version.install("flax") == "'/a b/bin/python' -m pip install -e '.[flax]' in a checkout of jbn"
    monkeypatch.setattr(version, "SOURCE", "jbn")
    assert version.install("flax") == "'/a b/bin/python' -m pip install 'jbn[flax]'"
    monkeypatch.setattr(sys, "executable", None)
    assert version.install("flax") == "python -m pip install 'jbn[flax]'"


def test_the_version_is_one():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+( - \d{4}-\d\d-\d\d)?", heading) for heading in headings[1:])
    assert all(" - " in heading for heading in headings[2:])  # the newest one alone may wait for its tag
    assert headings[1].partition(" ")[0] == version.__version__
    assert re.findall(r"^version: (.*)$", CITATION, re.MULTILINE) == [version.__version__]


def test_the_citation_is_of_this_project():
    assert re.findall(r"^repository-code: (.*)$", CITATION, re.MULTILINE) == [PROJECT["urls"]["Repository"]]
    assert re.findall(r"^abstract: \"(.*)\"$", CITATION, re.MULTILINE) == [PROJECT["description"]]
    assert re.findall(r"^keywords: \[(.*)\]$", CITATION, re.MULTILINE)[0].split(", ") == PROJECT["keywords"]
    assert re.findall(r"^license: (.*)$", CITATION, re.MULTILINE) == [PROJECT["license"]]
    assert all(url.startswith(PROJECT["urls"]["Repository"]) for url in PROJECT["urls"].values())


def test_every_python_that_is_named_is_tested():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r'"(3\.\d+)"', workflow) == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_a_tag_that_is_no_release_is_refused_with_what_is_lacking():
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "release"), "v99.0.0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"The tag is v99.0.0; expected v{version.__version__}" in done.stdout
    assert ("SOURCE" in done.stdout) == (version.SOURCE != "jbn")
