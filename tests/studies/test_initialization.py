"""The study of first parameters: nothing here asserts how accurate a network becomes, or which claim holds."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jbn.studies import initialization as study
from jbn.studies.gallery import run
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet

UNDECIDED = "not decided within the intervals"
RATES = [0.1, 0.2, 0.4]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    said = Console(file=io.StringIO(), width=80)
    return run("initialization", size="quick", out=out, console=said), out / "initialization", said.file.getvalue()


def test_every_pair_of_depth_and_gain_has_a_number(quick):
    found, out, text = quick
    summary = found["summary"]
    pairs = [(row["arm"], row["depth"], row["gain"]) for row in summary["cells"]]
    expected = [(arm, depth, gain) for arm in study.ARMS for depth in (3, 5) for gain in (0.01, 1.0)]
    assert pairs == expected
    assert all(len(row["test"]) == summary["seeds"] == 2 for row in summary["cells"])
    assert np.isfinite([*summary["growth"].values()]).all()
    assert all(np.shape(values) == (2, 2) for values in summary["scale"].values())
    assert json.loads((out / "results.json").read_text())["summary"] == summary
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "none 3" in text


def measured(accuracy=None, off=0.0, usual=0.0, growth=1.0, gains=(0.1, 1.0, 10.0), depths=(3, 20), seeds=4):
    """Return cells; ``accuracy`` by arm and gain, how far the scale moves what it should not, growth a layer."""
    noise, cells = 0.002 * np.arange(seeds), []
    for arm in study.ARMS:
        for depth in depths:
            seen = np.stack([noise + (accuracy or {}).get((arm, gain), 0.8) for gain in gains], 1)
            numbers = {
                "validation": np.stack([seen - 0.1, seen, seen - 0.2], 2),
                "diverged": np.zeros((seeds, len(gains), 3)),
            }
            settings = {"kind": "trained", "arm": arm, "depth": depth, "gains": list(gains), "seeds": seeds}
            settings |= {"rates": RATES, "steps": 4}
            cells.append(Measured(settings, numbers | {"test": numbers["validation"]}))
    moved = (1 + noise)[:, None] * np.ones(len(gains))
    scale = {
        f"{name} {each}": moved * by
        for each, by in (("exact", off), ("usual", usual))
        for name in ("logits", "trained")
    }
    scale |= {f"product {each}": 1 + moved * by for each, by in (("exact", off), ("usual", usual))}
    cells.append(Measured({"kind": "scale", "gains": list(gains), "seeds": seeds}, scale))
    for arm, by in (("none", 1.0), ("batch", growth)):
        settings = {"kind": "growth", "arm": arm, "seeds": seeds, "layers": 21, "width": 8, "rows": 32}
        numbers = {"gradients": (by + noise - noise.mean())[:, None] ** -np.arange(20)}
        cells.append(Measured(settings, numbers))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    falls = {("none", 0.1): 0.2, ("batch", 0.1): 0.7}
    assert verdicts(measured(falls, growth=study.YANG)) == ["holds"] * 7
    other = {("batch", 0.1): 0.2, ("none", 0.1): 0.7}
    assert verdicts(measured(other, off=0.1, usual=0.1, growth=0.9)) == ["does not hold"] * 7
    edges = measured(off=study.ROUNDING / 1.003, usual=study.NOTICED / 1.003, growth=1.0)
    assert verdicts(edges) == [UNDECIDED] * 6 + ["does not hold"]
    assert verdicts(measured(growth=study.YANG + study.NEAR))[-2:] == ["holds", UNDECIDED]


def test_what_trains_nowhere_does_not_depend_less():
    nowhere = {("none", gain): 0.1 for gain in (0.1, 1.0, 10.0)}
    assert verdicts(measured(nowhere | {("batch", 0.1): 0.1}))[0] == "holds"
    nowhere = {("batch", gain): 0.1 for gain in (0.1, 1.0, 10.0)}
    assert verdicts(measured(nowhere | {("none", 0.1): 0.1}))[0] == "does not hold"


def test_a_rate_at_an_edge_decides_nothing_against_its_arm_and_is_said_first():
    falls = {("none", gain): 0.1 for gain in (0.1, 10.0)}
    summary = study.summarize(measured(falls))
    assert study.CLAIMS[0].judge(summary).verdict == "holds"
    lost = [row for row in summary["cells"] if (row["arm"], row["gain"]) in falls]
    for count, verdict in ((2, "holds"), (4, UNDECIDED)):
        for row in lost[:count]:
            row["edge"] = "lowest"
        outcome = study.CLAIMS[0].judge(summary)
        assert outcome.verdict == verdict
        said = "The best rate is at an edge of the grid, and a better one may lie outside, in some pairs: "
        assert outcome.sentence.startswith(f"{said}{count} (no norm)")
    summary = study.summarize(measured({("batch", 0.1): 0.1}))
    assert study.CLAIMS[0].judge(summary).verdict == "does not hold"
    for row in summary["cells"]:
        row["edge"] = "highest" if row["arm"] == "batch" else ""
    assert study.CLAIMS[0].judge(summary).verdict == UNDECIDED


def test_the_gain_is_named_where_all_seeds_have_most_there():
    cells = measured(off=0.1)
    (scale,) = (cell for cell in cells if cell.settings["kind"] == "scale")
    scale.numbers["logits exact"][0, 2] *= 2
    assert "gain 10" not in study.CLAIMS[1].judge(study.summarize(cells)).sentence
    scale.numbers["logits exact"][1:, 2] *= 2
    sentence = study.CLAIMS[1].judge(study.summarize(cells)).sentence
    assert "differ from those of gain 1 by 20 % (20 to 20) of these (root mean square), the most of all" in sentence
    assert sentence.endswith("Less than 0.01 % counts as nothing.")
    assert "all at gain 10" in sentence


def test_growth_is_that_of_the_middle_of_the_network():
    gradients = 1.5 ** -np.arange(20.0)
    gradients[: study.SKIPPED] *= 100
    gradients[-study.SKIPPED :] /= 100
    summary = study.summarize([*measured()[:-1], Measured(measured()[-1].settings, {"gradients": [gradients] * 4})])
    np.testing.assert_allclose(summary["growth"]["batch"], 1.5, rtol=1e-5)


def test_the_rate_is_chosen_for_each_cell_by_validation_rows():
    cells = measured()
    numbers = cells[0].numbers
    numbers["validation"] = numbers["validation"].copy()
    numbers["validation"][:, 2] = numbers["validation"][:, 2, [1, 0, 2]]
    numbers["test"][:, 2] = [0.25, 0.9, 0.9]
    numbers["diverged"][0, 2, 0] = 1
    summary = study.summarize(cells)
    rates = {(row["arm"], row["depth"], row["gain"]): row["rate"] for row in summary["cells"]}
    assert rates.pop(("none", 3, 10.0)) == 0.1
    assert set(rates.values()) == {0.2}
    (row,) = (row for row in summary["cells"] if row["edge"])
    assert (row["interval"]["mean"], row["test"]) == (25.0, [25.0] * 4)
    notes = " ".join(study.tabulate(summary).notes)
    assert "is the lowest of the grid, and a better one may lie outside: none 3 at 10." in notes
    assert "Seeds that diverged, and count as chance (10%): 1 of none 3 at 10." in notes


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_its_terminal(width):
    said = Console(file=io.StringIO(), width=width)
    sheet = study.tabulate(study.summarize(measured(gains=study.GAINS)))
    show_sheet(said, type(sheet)(sheet.heading, sheet.rows))
    text = said.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.split().count("±0") == 28


def test_the_figure_writes_each_number_and_its_title_says_what_came_out():
    figure = study.draw(study.summarize(measured({("none", 0.1): 0.1, ("batch", 10.0): 0.6})))
    title = " ".join(figure.get_suptitle().split())
    assert (
        "trains at more pairs of gain and depth: 100 % of them reach 50 % accuracy on test rows, without it 67 %"
        in title
    )
    assert "grid" not in figure.get_supxlabel()
    for accuracy, word in (({("batch", 0.1): 0.1}, "fewer"), ({}, "about as many")):
        summary = study.summarize(measured(accuracy, growth=1.2))
        summary["cells"][0]["edge"] = "lowest"
        other = study.draw(summary)
        assert f"trains at {word} pairs" in " ".join(other.get_suptitle().split())
        note = " ".join(other.get_supxlabel().split())
        assert "(at an edge of the grid in 1 cells of 'no norm': a better one may lie outside; even if all" in note
        assert "Not drawn: before training the gradient of a kernel is 1.200 times that of the next layer's" in note
        assert "(about 38 times over 21 layers)" in note
    summary = study.summarize(measured({("none", 0.1): 0.1}))
    assert (summary["cells"][0]["arm"], summary["cells"][0]["gain"]) == ("none", 0.1)
    summary["cells"][0]["edge"] = "lowest"  # one of the two that do not train: 83 % would
    note = " ".join(study.draw(summary).get_supxlabel().split())
    assert "even if all of these trained, the title's difference, 33 points, would be 17 at least)" in note
    none, batch = figure.axes
    assert [text.get_text() for text in none.texts] == ["10", "80", "80"] * 2
    assert [text.get_text() for text in batch.texts] == ["80", "80", "60"] * 2
