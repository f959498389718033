"""The machinery of studies, on one that takes no time: what is done is kept, and the results can refute a claim."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab.errors import FileError, OptionError
from jbn.lab.run.directory import claim
from jbn.studies import gallery
from jbn.studies.figures import LOOKS, blank, draw_intervals, put_legend_beside
from jbn.studies.intervals import decide, interval
from jbn.studies.perform import perform
from jbn.studies.results import tally
from jbn.studies.study import Cell, Claim, Outcome, Sheet, Study

SIZES = {"quick": 2, "default": 3, "full": 4}


def summarize(measured):
    return {"means": [float(np.mean(each.numbers["values"])) for each in measured]}


def rise(summary):
    by = interval(np.diff(summary["means"]))
    return Outcome(f"steps of {by.mean:.2f}", decide(by, least=0))


def draw(summary):
    figure, axes = blank("Means rise with their number", "of nothing")
    draw_intervals(axes, [1, 2], [interval([0.0, 1.0]), interval([1.0, 2.0])], LOOKS[0], "one")
    put_legend_beside(figure, axes)
    return figure


class Work:
    """Measures cells, remembers which, and may be interrupted before one."""

    def __init__(self, stop=None):
        self.done, self.stop = [], stop

    def __call__(self, settings):
        if settings["number"] == self.stop:
            raise KeyboardInterrupt
        self.done.append(settings["number"])
        values = np.random.default_rng(settings["number"]).standard_normal(3) + settings["number"]
        return {"values": values, "lost": np.array([np.nan, np.inf, 1.0]), "flag": np.array([True])}


def study_of(work=None, name="fake"):
    claims = (Claim("Means rise", "nobody 2000, section 1", rise),)
    return Study(
        name,
        "Do means rise?",
        claims,
        lambda size: [Cell(f"cell-{number}", {"number": number}) for number in range(SIZES[size] + 1)],
        work or Work(),
        summarize,
        lambda summary: Sheet(
            ("cell", "mean"), tuple((str(i), f"{m:.1f} ±0.1") for i, m in enumerate(summary["means"]))
        ),
        draw,
    )


def console():
    return Console(file=io.StringIO(), width=80)


def without_place(out):
    return json.loads((out / "results.json").read_text())


def test_a_study_that_was_stopped_ends_with_the_results_of_one_that_was_not(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    perform(study_of(), "default", whole, console())
    work = Work(stop=2)
    with pytest.raises(KeyboardInterrupt):
        perform(study_of(work), "default", stopped, console())
    assert work.done == [0, 1]
    assert sorted(path.name for path in (stopped / "cells").iterdir()) == ["cell-0.json", "cell-1.json"]
    assert not (stopped / "results.json").exists()
    work, said = Work(), console()
    perform(study_of(work), "default", stopped, said)
    assert work.done == [2, 3]
    assert "fake: 2 of 4 cells were done before." in said.file.getvalue()
    assert without_place(whole) == without_place(stopped)
    assert (whole / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_study_that_is_done_is_not_measured_again(tmp_path):
    found, work = perform(study_of(), "quick", tmp_path, console()), Work()
    (tmp_path / "figure.png").unlink()
    assert perform(study_of(work), "quick", tmp_path, console()) == found
    assert work.done == []
    assert (tmp_path / "figure.png").exists()


def test_what_is_not_finite_is_kept_as_null(tmp_path):
    perform(study_of(), "quick", tmp_path, console())
    kept = json.loads((tmp_path / "cells" / "cell-1.json").read_text())["numbers"]
    assert (kept["lost"], kept["flag"]) == ([None, None, 1.0], [True])


def other_versions(monkeypatch):
    monkeypatch.setattr("jbn.studies.perform.versions", lambda: "jax 0.0.1")


def other_cells(monkeypatch):
    monkeypatch.setitem(SIZES, "quick", 3)


@pytest.mark.parametrize(
    ("size", "name", "change", "expected"),
    [
        (
            "full",
            "fake",
            None,
            r"'--size': got 'full', but the study in '.*' was begun with 'quick'; go on .* --size quick, or",
        ),
        ("quick", "other", None, r"'--out': '.*' holds the study fake, not other; take another --out"),
        (
            "quick",
            "fake",
            other_versions,
            r"begun with python .*, jax .*; here is jax 0\.0\.1\. .*; take another --out",
        ),
        ("quick", "fake", other_cells, r"begun with other cells: the study has changed since; take another --out"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(size, name, change, expected, tmp_path, monkeypatch):
    perform(study_of(), "quick", tmp_path, console())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if change:
        change(monkeypatch)
    with pytest.raises(OptionError) as caught:
        perform(study_of(name=name), size, tmp_path, console())
    assert re.search(expected, caught.value.format_message())
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "options.json").write_text('{"model": "dense"}')
    with pytest.raises(OptionError, match=r"cannot read .*options.json.*; take another --out"):
        perform(study_of(), "quick", tmp_path, console())


def test_two_processes_do_not_write_one_study(tmp_path):
    perform(study_of(), "quick", tmp_path, console())
    with claim(tmp_path), pytest.raises(OptionError, match=f"process {os.getpid()} on .* writes to"):
        perform(study_of(), "quick", tmp_path, console())


def halve(path):
    path.write_bytes(path.read_bytes()[:40])


def change_a_digit(path):
    content = json.loads(path.read_text())
    content["numbers"]["values"][0] += 1e-9
    path.write_text(json.dumps(content))


def take_that_of_another(path):
    path.write_bytes(path.with_name("cell-2.json").read_bytes())


def take_a_list(path):
    path.write_text("[]")


@pytest.mark.parametrize("damage", [halve, change_a_digit, take_that_of_another, take_a_list])
def test_a_damaged_record_is_named_and_measured_anew(damage, tmp_path):
    found = perform(study_of(), "quick", tmp_path, console())
    damage(tmp_path / "cells" / "cell-1.json")
    work, said = Work(), console()
    assert perform(study_of(work), "quick", tmp_path, said) == found
    assert work.done == [1]
    assert re.search(r"Note: .*cell-1\.json.*; this cell is measured anew\.", said.file.getvalue())


def test_quick_says_that_it_decides_nothing(tmp_path):
    for size in SIZES:
        perform(study_of(), size, tmp_path / size, said := console())
        assert ("decides nothing" in said.file.getvalue()) == (size == "quick")


def test_a_disk_that_takes_nothing_is_an_error_with_its_path(tmp_path, monkeypatch):
    def work(settings):
        (tmp_path / "fake" / "cells").write_text("in the way")
        return {"values": [0.0]}

    monkeypatch.setattr(gallery, "STUDIES", {"fake": study_of(work)})
    with pytest.raises(FileError, match=r"cannot write '.*cell-0\.json'"):
        gallery.run("fake", size="quick", out=tmp_path)
    result = jbn("study", "fake", "--size", "quick", "--out", tmp_path)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert re.search(r"jbn: cannot write '.*cell-0\.json' \(.*\); what was measured before is kept\. Go on with:", said)
    assert "--resume" not in said


def test_what_a_cell_raises_is_raised(tmp_path):
    def work(settings):
        raise ZeroDivisionError("in a cell")

    with pytest.raises(ZeroDivisionError, match="in a cell"):
        perform(study_of(work), "quick", tmp_path, console())


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("terminal", [False, True])
def test_table_and_claims_stand_in_a_terminal_and_in_a_pipe(width, terminal, tmp_path):
    said = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    found = perform(study_of(), "default", tmp_path, said)
    text = said.file.getvalue()
    assert re.search(r"^ *0 +[-\d.]+ ±0\.1 *$", text, re.MULTILINE)
    verdict = found["claims"][0]["verdict"].capitalize()
    assert f"{verdict}: Means rise (nobody 2000, section 1). " in " ".join(text.split())
    assert f"Wrote {tmp_path / 'results.json'}" in text.replace("\n", "")
    assert ("4/4" in text) == terminal


# Computes for ever in its second cell, outside of Python, until a signal ends it.
COMPUTING = """
import sys
import jax
from jbn.studies import gallery
from tests.studies.test_perform import Work, study_of

class Computing(Work):
    def __call__(self, settings):
        if settings["number"] == 1:
            print("computing", flush=True)
            jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jax.numpy.sin, x))(1.0).block_until_ready()
        return super().__call__(settings)

gallery.STUDIES["fake"] = study_of(Computing())
sys.argv[0] = "jbn"
from jbn.__main__ import main
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_while_a_cell_is_measured(number, status, tmp_path):
    command = [sys.executable, "-c", COMPUTING, "study", "fake", "--size", "quick", "--out", tmp_path]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **streams) as process:
        try:
            assert process.stdout.readline() == "computing\n"
            time.sleep(2)  # it compiles before it computes
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()  # if it has not heard, it computes for ever
    assert process.returncode == status
    assert re.search(r"jbn: stopped; what was measured is kept\. Go on with:\n  .*study fake --size quick", errors)
    assert "Traceback" not in errors
    work = Work()
    perform(study_of(work), "quick", tmp_path / "fake", console())
    assert work.done == [1, 2]


def jbn(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="jbn")


def test_studies_are_listed():
    listed = jbn("study")
    assert listed.exit_code == 0
    for study in gallery.STUDIES.values():
        assert f"{study.name}: {study.question}\n" in listed.output


def test_all_are_carried_out_and_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    works = {"one": Work(), "two": Work(stop=1), "three": Work()}
    monkeypatch.setattr(gallery, "STUDIES", {name: study_of(work, name) for name, work in works.items()})
    command = ["study", "all", "--size", "quick", "--out", tmp_path]
    assert jbn(*command).exit_code == 130
    works["two"].stop = None
    done = jbn(*command)
    assert done.exit_code == 0, done.output
    assert {name: work.done for name, work in works.items()} == {name: [0, 1, 2] for name in works}
    found = {name: gallery.run(name, size="quick", out=tmp_path) for name in works}
    assert set(found["one"]) == {"question", "claims", "summary"}
    lines = [f"{name}: {tally(claim['verdict'] for claim in each['claims'])}" for name, each in found.items()]
    last = "Note: the size quick shows that a study runs; it decides nothing. Another size needs another --out."
    assert done.output.splitlines()[-5:] == [*lines, last, f"One page of all: jbn report --out {tmp_path}"]


def test_a_study_that_fails_does_not_keep_the_others_waiting(tmp_path, monkeypatch):
    def fail(settings):
        raise ZeroDivisionError("in a cell")

    works = {"one": Work(), "two": fail, "three": Work(), "four": Work()}
    monkeypatch.setattr(gallery, "STUDIES", {name: study_of(work, name) for name, work in works.items()})
    perform(gallery.STUDIES["four"], "quick", tmp_path / "four", console())
    with claim(tmp_path / "four"):
        done = jbn("study", "all", "--size", "quick", "--out", tmp_path)
    assert done.exit_code == 1
    assert works["three"].done == [0, 1, 2]
    assert "Traceback" in done.stderr
    said = " ".join(done.output.split())
    assert re.search(r"one: 1 \S+.* two: failed: ZeroDivisionError\('in a cell'\) three: 1 ", said)
    assert f"four: not carried out: process {os.getpid()} on " in said
    assert "One page of all: jbn report" in said
    assert "jbn: 2 of 4 studies have no results. Go on with:" in done.stderr


def test_a_study_that_was_begun_otherwise_is_refused_before_the_others_are_measured(tmp_path, monkeypatch):
    works = {"one": Work(), "two": Work()}
    monkeypatch.setattr(gallery, "STUDIES", {name: study_of(work, name) for name, work in works.items()})
    perform(gallery.STUDIES["two"], "quick", tmp_path / "two", console())
    done = jbn("study", "all", "--size", "full", "--out", tmp_path)
    assert (done.exit_code, works["one"].done) == (2, [])
    assert "was begun with 'quick'" in " ".join(done.output.split())


def test_a_full_disk_ends_all_at_once(tmp_path, monkeypatch):
    def fill(settings):
        raise FileError("cannot write 'x' (no space)")

    works = {"one": fill, "two": Work()}
    monkeypatch.setattr(gallery, "STUDIES", {name: study_of(work, name) for name, work in works.items()})
    done = jbn("study", "all", "--size", "quick", "--out", tmp_path)
    assert (done.exit_code, works["two"].done) == (1, [])
    assert "what was measured before is kept. Go on with:" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["batch-sise"], "there is no study 'batch-sise'; did you mean batch-size?"),
        (["al"], "did you mean all?"),
        (["x"], f"there is no study 'x'; expected {', '.join(gallery.STUDIES)}, all"),
        (["batch-size", "--size", "small"], "got 'small'; expected quick, default or full"),
        (["batch-size", "--sise", "quick"], "--sise (Possible options: --size)"),
        (["batch-size", "more"], "unexpected extra argument"),
    ],
)
def test_wrong_names_and_options_are_one_clear_line(arguments, expected, tmp_path):
    result = jbn("study", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert expected in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_wrong_size_is_refused_by_the_function_too():
    with pytest.raises(OptionError, match="got 'small'; expected quick, default, full"):
        gallery.run("batch-size", size="small")


@pytest.mark.parametrize("study", gallery.STUDIES.values(), ids=lambda study: study.name)
def test_a_study_is_whole(study):
    assert study.question.endswith("?")
    assert study.claims
    assert all(re.search(r"\b(19|20)\d\d\b|^Asked here", claim.source) for claim in study.claims)
    for size in ("quick", "default", "full"):
        cells = study.cells(size)
        assert len({cell.name for cell in cells}) == len(cells)
        assert json.loads(json.dumps([dataclasses.asdict(cell) for cell in cells])) == [
            dataclasses.asdict(cell) for cell in cells
        ]
