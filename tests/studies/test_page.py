"""The page of all studies: whole, readable by itself, and made of results that are whole."""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections import Counter
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab.errors import FileError, OptionError
from jbn.studies import gallery, report
from jbn.studies.perform import perform
from jbn.studies.study import Claim, Outcome, Sheet
from tests.studies.test_perform import console, study_of

ODD = "|x| < 1 & <b>'a' \"b\"</b> {{ c }}"
VERDICTS = ("holds", "does not hold", "not decided within the intervals")


def odd_study(name):
    """Return a study of each verdict whose texts are markup, if somebody takes them for it."""
    claims = [
        Claim(f"{ODD} {verdict}", f"source {ODD}", lambda summary, v=verdict: Outcome(f"{v[:2]} {ODD}", v))
        for verdict in VERDICTS
    ]
    sheet = Sheet(("name", ODD), (("first", "1 ±2"), (ODD, "3")), ("a\nnote", ODD))
    return dataclasses.replace(
        study_of(name=name),
        question=f"Is {ODD} right?",
        claims=(*claims,),
        summarize=lambda measured: {"seeds": 17},
        tabulate=lambda summary: sheet if summary["seeds"] else None,
    )


STUDIES = {name: odd_study(name) for name in ("whole", "small", "begun", "absent")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, size in (("whole", "default"), ("small", "quick"), ("begun", "quick")):
        perform(STUDIES[name], size, folder / name, console())
    (folder / "begun" / "results.json").unlink()
    return folder


@pytest.fixture
def out(made, tmp_path, monkeypatch):
    """A folder in which ``whole`` is done, ``small`` at the size quick, and ``begun`` and ``absent`` are not."""
    monkeypatch.setattr(gallery, "STUDIES", STUDIES)
    return shutil.copytree(made, tmp_path / "out")


def jbn(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="jbn")


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def test_the_page_shows_all_that_came_out(out):
    tree = ElementTree.parse(report(out))
    (whole,) = tree.findall(".//section[@id='whole']")
    assert text_of(whole.find("h2")) == f"whole: Is {ODD} right?"
    claims, numbers = ([[*map(text_of, row)] for row in table.iter("tr")] for table in whole.iter("table"))
    signs = dict(zip(VERDICTS, "✓✗?", strict=True))
    assert claims[1:] == [
        [f"{ODD} {verdict}", f"source {ODD}", f"{verdict[:2]} {ODD}", f"{signs[verdict]} {verdict}"]
        for verdict in VERDICTS
    ]
    assert numbers == [["name", ODD], ["first", "1 ±2"], [ODD, "3"]]
    *notes, made = map(text_of, whole.iter("li"))
    assert notes == ["a note", ODD]
    content = json.loads((out / "whole" / "results.json").read_text())
    assert made.startswith(f"Made at size default, 17 seeds, on {content['device']}, with python ")
    assert all(f"{name} {version}" in made for name, version in content["versions"].items())
    assert "data:image/png;base64,iVBOR" in whole.find("figure/img").get("src")
    assert whole.find("figure/img").get("alt") == "Means rise with their number"
    assert [whole.find("figure/img").get(side) for side in ("width", "height")] == ["990", "594"]


def test_the_overview_leads_to_every_claim_and_says_what_is_missing(out):
    tree = ElementTree.parse(report(out))
    (overview,) = tree.findall(".//nav")
    said = [(text_of(each.find("span")), text_of(each.find("a"))) for each in overview.iter("li")]
    assert (
        said
        == [
            (f"{sign} {short}", f"{ODD} {verdict}")
            for sign, short, verdict in zip("✓✗?", ("holds", "does not hold", "not decided"), VERDICTS, strict=True)
        ]
        * 2
    )
    ids = Counter(each.get("id") for each in tree.iter() if each.get("id"))
    assert set(ids.values()) == {1}
    links = [each.get("href") for each in tree.iter("a")]
    assert {link.removeprefix("#") for link in links} <= ids.keys()
    assert len(links) == 8  # of two studies and their claims
    assert (
        text_of(tree.find(".//header"))
        .partition("A claim")[0]
        .endswith("Of 3 claims 1 holds, 1 does not hold, 1 is not decided. ")
    )
    paragraphs = [*map(text_of, overview.iter("p"))]
    assert paragraphs == [
        "Made at the size quick: it decides nothing.",
        f"Begun, and not done: 3 claims wait for jbn study begun --out {out}",
        f"Not measured: 3 claims wait for jbn study absent --out {out}",
    ]
    quick = [text_of(each) for each in tree.findall(".//section/p")]
    assert quick == ["This was made at the size quick. It shows that the study runs; it decides nothing."]


def test_the_page_needs_nothing_beside_it(out):
    page = report(out)
    text = page.read_text(encoding="utf-8")
    assert not re.search(
        r"<(script|link|iframe|object|embed)|@import|url\(|https?:|//", re.sub('base64,[^"]+', "", text)
    )
    tree = ElementTree.fromstring(text)
    assert {each.get("src").partition(",")[0] for each in tree.iter() if each.get("src")} == {"data:image/png;base64"}


def test_the_command_writes_what_the_function_writes_and_a_second_time_the_same(out, tmp_path):
    page = report(str(out))
    assert page == out / "report.html"
    before = page.read_bytes()
    other = tmp_path / "other [x].html"
    done = jbn("--out", out, "--page", other)
    assert (done.exit_code, done.output) == (0, f"Wrote {other}\n")
    assert other.read_bytes() == before
    assert jbn("--out", out).output == f"Wrote {page}\n"
    assert page.read_bytes() == before


def halve(study):
    path = study / "results.json"
    path.write_bytes(path.read_bytes()[:200])


def edit(**changes):
    def change(study):
        path = study / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def drop(name):
    def change(study):
        path = study / "results.json"
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))

    return change


CLAIM = {"claim": "c", "source": "s", "sentence": "o", "verdict": "holds"}
DAMAGES = {
    "half a file": (halve, "JSONDecodeError"),
    "a list": (lambda study: (study / "results.json").write_text("[]"), "TypeError"),
    "other bytes": (lambda study: (study / "results.json").write_bytes(b"\xff\xfe\x00"), "UnicodeDecodeError"),
    "of the demo": (edit(options={"model": "dense"}), "TypeError"),
    "of another study": (edit(options={"name": "small", "size": "quick"}), "it is of the study small"),
    "of another size": (edit(options={"name": "whole", "size": "tiny"}), "size is 'tiny'"),
    "no versions": (drop("versions"), "KeyError"),
    "another summary": (edit(summary={}), "KeyError"),
    "a claim too few": (edit(claims=[{"claim": "c"}]), "missing 3 required"),
    "another verdict": (edit(claims=[CLAIM | {"verdict": "perhaps"}]), "there is no such claim"),
    "a claim of a number": (edit(claims=[CLAIM | {"source": 3}]), "there is no such claim"),
    "half a figure": (lambda study: (study / "figure.png").write_bytes(b"\x89PNG\r\n\x1a\n0"), "no whole PNG file"),
    "no figure": (lambda study: (study / "figure.png").unlink(), "No such file"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_results_are_named_and_no_page_is_written(damage, expected, out):
    damage(out / "whole")
    with pytest.raises(OptionError) as caught:
        report(out)
    message = caught.value.format_message()
    assert re.match(f"Invalid value for '--out': cannot read '{out}/whole/results.json' \\(.*{expected}", message)
    assert message.endswith("expected what jbn study whole writes; that command writes it anew of what was measured")
    result = jbn("--out", out)
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert not (out / "report.html").exists()


def test_the_named_command_mends_damaged_results(out):
    before = report(out).read_bytes()
    halve(out / "whole")
    gallery.run("whole", out=out)
    assert report(out).read_bytes() == before


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("empty", "no results in '{}/empty'; expected the --out of jbn study, of one study at least that is done"),
        ("nowhere", "no results in '{}/nowhere'; expected"),
        ("whole", "it holds one study, so take the folder around it, '{}'"),
        ("whole/figure.png", "no results in '{}/whole/figure.png'; expected"),
        ("", "expected a name"),
    ],
)
def test_a_folder_without_studies_is_refused(folder, expected, out):
    (out / "empty").mkdir()
    result = jbn("--out", out / folder if folder else "")
    assert result.exit_code == 2
    assert expected.format(out) in " ".join(result.output.split())
    assert not [*out.rglob("*.html")]


@pytest.mark.parametrize("page", ["page", "page.pdf", "nowhere/page.html", "folder.html", "whole/figure.png/a.html"])
def test_a_page_goes_to_a_name_that_ends_in_html(page, out):
    (out / "folder.html").mkdir()
    result = jbn("--out", out, "--page", out / page)
    assert result.exit_code == 2
    expected = f"got '{out / page}'; expected a name that ends in .html, in a folder that is there"
    assert expected in " ".join(result.output.split())


def test_a_disk_that_is_full_keeps_the_page_of_before(out, monkeypatch):
    page = report(out)
    page.write_text("before")

    def fill(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("jbn.atomic.os.fsync", fill)
    with pytest.raises(FileError, match=r"cannot write '.*report\.html' \(No space left on device\)"):
        report(out)
    result = jbn("--out", out)
    assert result.exit_code == 1
    assert result.stderr == f"jbn: cannot write '{page}' (No space left on device)\n"
    assert page.read_text() == "before"
    assert not [*out.glob(".jbn-*")]
