"""The study of recurrent networks: nothing here asserts how accurate a network becomes."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from jbn.studies import recurrent as study
from jbn.studies.gallery import run
from jbn.studies.recurrent_claims import ARMS, CLAIMS, SCALES, TANH, find_tanh
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet

VERDICTS = {"holds", "does not hold", "not decided within the intervals"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    said = Console(file=io.StringIO(), width=80)
    return run("recurrent", size="quick", out=out, console=said), out / "recurrent", said.file.getvalue()


def test_it_runs_and_says_what_it_leaves_out(quick):
    found, out, text = quick
    summary = found["summary"]
    assert [row["arm"] for row in summary["lstm"]] == list(study.EXTENTS["quick"].arms)
    assert [row["scale"] for row in summary["tanh"]] == list(SCALES)
    for row in summary["lstm"]:
        assert len(row["accuracy"]) == len(row["pooled"]) == len(row["to_level"]) == summary["seeds"]
        assert row["rate"] in summary["rates"]
        assert len(row["begin"]["path"]) == len(row["end"]["path"]) == 8
        assert row["begin"]["path"][-1] == {"mean": 0, "low": 0, "high": 0}
    assert all(len(row["path"]) == 64 for row in summary["tanh"])
    assert {claim["verdict"] for claim in found["claims"]} <= VERDICTS
    assert found["claims"][-1]["sentence"] == "Not measured at this size: layer norm."
    kept = json.loads((out / "results.json").read_text())
    assert {name: kept[name] for name in found} == found
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert max(map(len, text[: text.index("Correct: test")].splitlines())) <= 80


def measured(seeds=4, accuracy=0.9, pooled=0.9, steps=10, first=0.0, left=None, level=None, better=None):
    """Return cells: of LSTMs with these accuracies, and the rate 0.2 best; of tanh networks with these gradients."""
    better, level, left, noise = better or {}, level or {}, left or {}, 0.002 * np.arange(seeds)
    cells = []
    for name in TANH:
        at_first = np.stack([left.get((name, scale), first) + noise for scale in SCALES])
        paths = np.stack([at_first, 0.5 * at_first, 0 * at_first], -1) - 3
        cells.append(Measured({"tanh": name, "seeds": seeds, "units": 8}, {"gradients": paths}))
    for arm in ARMS:
        at_end = accuracy + better.get(arm, 0) + noise
        looks = np.arange(1, 41)[:, None, None]
        reached = looks >= level.get(arm, 20)
        curve = np.where(reached, at_end[None, None], 0.1) * np.array([0.5, 1.0, 0.5])[:, None]
        gradients = np.zeros((2, 3, seeds, 8)) - np.arange(8)
        numbers = {
            "validation": curve,
            "test": curve,
            "pooled": np.tile(pooled + noise, (3, 1)),
            "gradients": gradients,
        }
        settings = {"arm": arm, "seeds": seeds, "steps": 400, "look": steps, "rates": [0.1, 0.2, 0.4]}
        cells.append(Measured(settings, numbers))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in CLAIMS]


def test_claims_can_be_refuted_and_hold():
    undecided = "not decided within the intervals"
    alike = ["does not hold", "holds", undecided, "does not hold", *[undecided] * 3]
    alike += ["does not hold", "holds", "does not hold"]
    assert verdicts(measured()) == alike
    gone = {("", 1.0): -5.0, ("", 0.1): -0.2, ("tanh' taken for 1", 1.0): 7.0, ("orthogonal", 1.0): -4.0}
    for_them = measured(
        pooled=0.5,
        left=gone,
        better={"BN, γ = 0.1": 0.05, "BN, γ = 1": 0.02},
        level={"none": 30, "BN, γ = 1": 25, "layer norm": 10},
    )
    assert verdicts(for_them) == ["holds"] * 10
    against = measured(
        left={("", 1.0): -5.0, ("", 0.1): -2.0, ("tanh' taken for 1", 1.0): -3.0},
        better={"BN, γ = 1": 0.02, "none": 0.03},
        level={"none": 10, "BN, γ = 1": 15, "layer norm": 21},
    )
    assert verdicts(against) == ["holds"] + ["does not hold"] * 9


def test_what_never_gets_there_decides_nothing_in_its_favour():
    def of_steps(**level):
        found = verdicts(measured(level={"none": level["none"], "BN, γ = 0.1": level["small"]}))
        return found[5], found[9]

    never, undecided = 99, "not decided within the intervals"
    assert of_steps(none=never, small=20) == ("holds", "does not hold")
    assert of_steps(none=20, small=never) == ("does not hold", "holds")
    assert of_steps(none=never, small=never) == (undecided, "holds")
    # Steps of which the sooner one ran out as well may be any number more.
    summary = study.summarize(measured(level={"none": 30}))
    for row in summary["lstm"]:
        row["never"] = 1 if row["arm"] == "BN, γ = 0.1" else 0
    assert CLAIMS[5].judge(summary).verdict == undecided
    assert "BN, γ = 0.1: at least 200, none: 300; fewer by 100" in CLAIMS[5].judge(summary).sentence
    assert (
        "BN, γ = 1 takes 200, 100 (100 to 100) fewer than none and 0 (0 to 0) fewer than BN, γ = 0.1"
        in CLAIMS[5].judge(summary).sentence
    )


def test_a_rate_at_an_edge_decides_nothing_against_its_arm_and_is_said_first():
    summary = study.summarize(measured(level={"none": 30}, better={"BN, γ = 0.1": 0.05}))
    for row in summary["lstm"]:
        row["edge"] = row["soonest_edge"] = "highest" if row["arm"] == "none" else ""
    for claim, rate in ((CLAIMS[5], "of fewest steps"), (CLAIMS[6], "that ends most accurate")):
        outcome = claim.judge(summary)
        assert outcome.verdict == "not decided within the intervals"
        assert outcome.sentence.startswith(f"The rate {rate} is at an edge of the grid")


def test_only_the_rate_that_is_at_an_edge_is_said_to_be():
    summary = study.summarize(measured())
    summary["lstm"][0]["soonest_edge"] = "highest"
    assert "that ends most accurate" not in study.draw(summary).get_supxlabel()
    notes = " ".join(study.tabulate(summary).notes)
    assert "The rate of fewest steps is at an edge of the grid" in notes
    assert "The rate that ends most accurate" not in notes


def test_the_same_share_of_steps_helps_and_is_substantial():
    def of_steps(level):
        found = verdicts(measured(level=level))
        return found[8], found[9]

    for steps, verdict in ((37, ("holds", "does not hold")), (35, ("does not hold", "holds"))):
        assert of_steps({arm: 40 for arm in ARMS} | {"BN, γ = 1": steps, "layer norm": steps}) == verdict


def test_the_rates_are_those_of_validation_rows():
    cells = measured()
    numbers = cells[-1].numbers
    numbers["validation"] = numbers["validation"][:, [1, 0, 2]]
    row = study.summarize(cells)["lstm"][-1]
    assert (row["rate"], row["edge"], row["soonest_rate"], row["soonest_edge"]) == (0.1, "lowest", 0.1, "lowest")
    np.testing.assert_allclose(row["accuracy"], numbers["test"][-1, 0])
    assert row["to_level"] == [410] * 4
    assert row["never"] == 4
    note = " ".join(study.draw(study.summarize(cells)).get_supxlabel().split())
    rates = ("The rate that ends most accurate", "The rate of fewest steps")
    assert note.endswith(" ".join(f"{rate} of 'layer norm, γ = 1' is at an edge of the grid." for rate in rates))
    notes = " ".join(study.tabulate(study.summarize(cells)).notes)
    for rate in rates:
        assert f"{rate} is at an edge of the grid, and a better one may lie outside: layer norm (lowest)." in notes
    assert "Seeds that never came to 85%, and count as 410 steps: 4 of layer norm." in notes


def test_the_gradient_is_that_of_the_first_step_beside_the_last():
    summary = study.summarize(measured(left={("", 1.0): -5.0}))
    row = find_tanh(summary, 1.0)
    np.testing.assert_allclose(row["first"], -5 + 0.002 * np.arange(4))
    assert [round(step["mean"], 4) for step in row["path"]] == [-4.997, -2.4985, 0.0]
    assert summary["lstm"][0]["end"]["first"] == [7.0] * 4


def test_the_derivative_of_tanh_has_the_moments_of_many_numbers():
    found = study._saturate(np.array([0.1, 1.0]))
    x = np.random.default_rng(0).standard_normal(400_000)
    for at, deviation in enumerate((0.1, 1.0)):
        slopes = 1 - np.tanh(deviation * x) ** 2
        expected = [slopes.mean(), *np.percentile(slopes, [25, 75])]
        np.testing.assert_allclose([found[name][at] for name in ("mean", "low", "high")], expected, atol=5e-3)


@pytest.mark.parametrize(("width", "encoding"), [(80, "utf-8"), (60, "utf-8"), (60, "ascii")])
def test_the_table_fits_its_terminal(width, encoding):
    with io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace") as file:
        sheet = study.tabulate(study.summarize(measured()))
        show_sheet(Console(file=file, width=width), type(sheet)(sheet.heading, sheet.rows))
        file.flush()
        lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= width
    words = [word for line in lines for word in re.findall(r"[^\s|]+", line)]
    assert words.count("90.3") == 8


def test_the_figure_says_what_came_out():
    left = {("", 1.0): -5.0, ("orthogonal", 1.0): 2.0}
    cells = measured(left=left, better={"BN, γ = 0.1": 0.02}, level={"BN, γ = 1": 10, "none": 30})
    figure = study.draw(study.summarize(cells))
    title = " ".join(figure.get_suptitle().split())
    assert "ends more accurate than with γ = 1 (92.3 against 90.3 %) but learns more slowly (200 against 100" in title
    assert "; beside no norm (90.3 %, 300 steps) it ends more accurate, learns faster. " in title
    assert title.endswith("at the last: identity kernel 1e-05 (vanishes), orthogonal 100 (grows)")
    other = study.draw(study.summarize(measured(level={"BN, γ = 1": 30}))).get_suptitle()
    assert "learns faster (200 against 300 steps)" in " ".join(other.split())
    assert "ends neither more nor less accurate for certain than" in " ".join(other.split())
    assert "; whether it beats no norm (90.3 %, 200 steps) is undecided. " in " ".join(other.split())
    accuracy, steps, begun = figure.axes
    assert [text.get_text() for text in accuracy.get_yticklabels()] == [arm.label for arm in ARMS.values()]
    shown = [line for line in begun.lines if len(line.get_xdata()) > 2]
    assert [text.get_text() for text in begun.get_legend().get_texts()] == list(study.SHOWN)
    assert len(accuracy.containers) == len(steps.containers) == len(ARMS)
    assert len({line.get_marker() for line in shown}) == len(study.SHOWN)
