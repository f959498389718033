"""The gallery of studies in the pages: what the results say, and nothing that decides nothing."""

import json
import shutil
import sys
from itertools import pairwise

import pytest

pytest.importorskip("typer", reason="results are read as the command line reads them")

from markdown_it import MarkdownIt

from benchmarks import readme, studies
from jbn.studies.results import Judged
from tests.studies.test_page import ODD, VERDICTS, odd_study
from tests.studies.test_perform import console, perform


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Pages of their own: nothing is written into those of the repository."""
    front = tmp_path / "README.md"
    front.write_text("<!-- studies -->\n<!-- /studies -->\n", encoding="utf-8")
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(readme, "PAGES", (front,))
    monkeypatch.setattr(studies, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(studies, "GALLERY", tmp_path / "kept" / "README.md")
    monkeypatch.setattr(studies, "STUDIES", {name: odd_study(name) for name in ("one", "two")})
    return front


def take(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["studies", *map(str, arguments)])
    studies.main()


def test_the_page_is_that_of_the_results():
    assert studies.GALLERY.read_text(encoding="utf-8") == studies.page()


@pytest.mark.parametrize("name", studies.gallery())
def test_the_claims_of_the_page_are_what_the_numbers_say(name):
    study = studies.STUDIES[name]
    summary = json.loads((studies.KEPT / name / "results.json").read_text(encoding="utf-8"))["summary"]
    outcomes = [(claim, claim.judge(summary)) for claim in study.claims]
    assert studies.gallery()[name].claims == tuple(
        Judged(claim.sentence, claim.source, outcome.sentence, outcome.verdict) for claim, outcome in outcomes
    )


def test_results_are_taken_in_and_shown_as_they_are(pages, tmp_path, monkeypatch):
    for name in ("one", "two"):
        perform(studies.STUDIES[name], "default", tmp_path / "out" / name, console())
        if name == "one":
            take(monkeypatch, tmp_path / "out")
    assert "Of 3 claims 1 holds, 1 does not hold, 1 is not decided.\n" in pages.read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "out" / "one")  # what was taken in before stays
    take(monkeypatch, tmp_path / "out")
    once = pages.read_text(encoding="utf-8"), studies.GALLERY.read_text(encoding="utf-8")
    take(monkeypatch)
    assert once == (pages.read_text(encoding="utf-8"), studies.GALLERY.read_text(encoding="utf-8"))
    assert "Of 6 claims 2 hold, 2 do not hold, 2 are not decided.\n" in once[0]
    parsed = MarkdownIt().enable("table").parse(once[1])
    shown = ["".join(part.content for part in each.children) for each in parsed if each.type == "inline"]
    assert {("one", f"Is {ODD} right?"), ("two", f"Is {ODD} right?")} <= set(pairwise(shown))
    for verdict in VERDICTS:
        cell = shown.index(f"{ODD} {verdict} (source {ODD})")
        assert shown[cell + 1 : cell + 3] == [verdict, f"{verdict[:2]} {ODD}"]
    assert (shown.count(ODD), shown.count("a note")) == (2 * 3, 2)  # of each table a column and a row, and a note


def test_what_decides_nothing_is_not_taken_in(pages, tmp_path, monkeypatch, capsys):
    perform(studies.STUDIES["one"], "default", tmp_path / "out" / "one", console())
    perform(studies.STUDIES["two"], "quick", tmp_path / "out" / "two", console())
    with pytest.raises(SystemExit):
        take(monkeypatch, tmp_path / "out")
    assert "two: made at the size quick, which decides nothing" in capsys.readouterr().err
    (tmp_path / "out" / "two" / "results.json").write_text("[]")
    with pytest.raises(SystemExit):
        take(monkeypatch, tmp_path / "out")
    assert "cannot read" in capsys.readouterr().err
    assert not [*studies.KEPT.iterdir()]


def test_a_table_stands_in_one_page(pages, monkeypatch):
    with pytest.raises(ValueError, match="no page has the markers <!-- speed --> and <!-- /speed -->"):
        readme.between("speed")
    monkeypatch.setattr(readme, "PAGES", (pages, pages))
    with pytest.raises(ValueError, match=r"README.md, README.md has the markers .*; expected one page, and once"):
        readme.replace("studies", "")
