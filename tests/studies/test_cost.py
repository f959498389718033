"""The study of what batch norm costs: nothing here asserts how long anything takes."""

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn.lab.models import NETWORKS
from jbn.studies import compiled
from jbn.studies import cost as study
from jbn.studies.gallery import run
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet

VERDICTS = {"holds", "does not hold", "not decided within the intervals"}
NEEDS = {"kept": 4e6, "temporaries": 1e6, "traffic": 1e7, "flops": 1e8}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    said = Console(file=io.StringIO(), width=80)
    return run("cost", size="quick", out=out, console=said), out / "cost", said.file.getvalue()


def test_each_network_has_each_arm(quick):
    found, out, _ = quick
    summary = found["summary"]
    assert [row["arm"] for row in summary["rows"]] == list(study.ARMS)
    for row in summary["rows"]:
        assert len(row["milliseconds"]) == len(row["by none"]) == summary["repeats"]
        assert min(row["milliseconds"]) > 0
        assert row["kept"] > 0
        assert row["traffic"] > 0
    kept = {row["arm"]: row["kept"] for row in summary["rows"]}
    assert kept["jbn, remat"] < kept["jbn"] < kept["Flax"]
    assert {claim["verdict"] for claim in found["claims"]} <= VERDICTS
    read = json.loads((out / "results.json").read_text())
    assert {name: read[name] for name in found} == found
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_answer_is_not_timed(quick, monkeypatch):
    monkeypatch.setitem(study.ARMS, "Flax", compiled.Arm("wrong", compiled.Bias))
    compiled.prepare.cache_clear()
    with pytest.raises(ArithmeticError, match="conv: loss and gradient of Flax are"):
        compiled.prepare("conv", (8, 8, 8, 1))


@pytest.mark.parametrize("network", ["conv", "resnet"])
def test_the_networks_are_the_same_with_either_norm(network):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32))
    answers = []
    for norm in (compiled.OfFlax, compiled.BatchNorm):
        model = NETWORKS[network](batch_norm=True, norm=norm)
        variables = model.init(jax.random.key(0), x, train=False)
        answers.append(
            jax.jit(lambda v, model=model: model.apply(v, x, train=True, mutable=["batch_stats"])[0])(variables)
        )
    np.testing.assert_allclose(*answers, rtol=1e-3, atol=1e-4)


def test_what_is_kept_is_counted_once():
    def product(varied, other):
        a, b = varied
        return (a * b * other).sum() + (a * b).sum(), None

    a, b = jnp.ones((3, 4)), jnp.ones((3, 4))
    least = compiled.kept_bytes(product, (a, b), jnp.ones((3, 4)))
    assert least % (12 * 4) == 0
    assert 2 * 48 <= least <= 5 * 48


def measured(repeats=4, share=None, more=0.0, kept=None, held=None, traffic=2e7, flops=1.1e8):
    """Return repeats in which norms take these shares of a step, of what no norm takes 1 s; ``held``: in the dense."""
    share, kept, held, cells = share or {}, kept or {}, held or {}, []
    for network in ("dense", "resnet"):
        for repeat in range(repeats):
            wait = 1 + 0.001 * repeat
            seconds = {arm: np.full(3, wait / (1 - share.get(arm, 0.0))) for arm in study.ARMS}
            seconds["jbn"] = seconds["jbn"] * (1 + 0.002 * repeat)
            seconds["jbn, remat"] = seconds["jbn"] * (1 + more + 0.001 * repeat)
            needs = {arm: NEEDS | {"kept": kept.get(arm, 4e6)} for arm in study.ARMS}
            for arm in held if network == "dense" else ():
                needs[arm]["temporaries"] = held[arm]
            needs["jbn"] |= {"traffic": traffic, "flops": flops}
            settings = {"network": network, "shape": [8, 4, 4, 1], "repeat": repeat, "rounds": 3}
            cells.append(Measured(settings, {"seconds": seconds, "needs": needs}))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    undecided = "not decided within the intervals"
    assert verdicts(measured(share={"jbn": 0.3}, held={"jbn, remat": 4.9e5}, more=0.01)) == ["holds"] * 4
    against = measured(share={"jbn": 0.02}, held={"jbn, remat": 6e5}, more=0.3, flops=9e8)
    assert verdicts(against) == ["does not hold"] * 4
    assert verdicts(measured(share={"jbn": 0.098}, more=0.0185))[::3] == [undecided] * 2
    # Half of what most libraries hold at the peak is saved, whatever other arms hold, and whatever is kept.
    assert verdicts(measured(held={"Flax": 2e6, "jbn, remat": 0.9e6}))[2] == "holds"
    assert verdicts(measured(held={"jbn": 2e6, "none": 2e6, "jbn, remat": 0.9e6}))[2] == "does not hold"
    assert verdicts(measured(kept={"jbn, remat": 1e5}))[2] == "does not hold"


def test_both_libraries_are_told_of_all_networks_and_which_decides():
    outcome = study.CLAIMS[0].judge(study.summarize(measured(share={"jbn": 0.3, "Flax": 0.05})))
    assert re.fullmatch(
        r"Shares of a step .* jbn's: resnet 5 \(.*\) % and 30 \(.*\) %; dense 5 \(.*\) % and 30 \(.*\) %\. "
        r"Significant is 10 %; jbn's in the resnet decides\.",
        outcome.sentence,
    )
    assert outcome.verdict == "holds"


def test_what_is_held_at_the_peak_is_said_before_what_is_kept():
    kept = {"none": 4e6, "Flax": 8e6, "jbn": 5e6, "jbn, remat": 3e6}
    cells = measured(held={"Flax": 1e6, "jbn, remat": 8e5}, kept=kept)
    sentence = study.CLAIMS[2].judge(study.summarize(cells)).sentence
    assert "at its peak" in sentence.lower()
    assert (
        "has temporaries of 1 MB (none), 1 MB (Flax), 1 MB (jbn), 1 MB (jbn, remat). The last is 0 % less" in sentence
    )
    assert "(in other networks: dense 20 % less)" in sentence
    assert "3 MB (jbn, remat). The last is 62 % less than Flax's, 40 % less than jbn's otherwise." in sentence
    minor = study.CLAIMS[3].judge(study.summarize(measured(more=0.3))).sentence
    assert re.fullmatch(r"A step .* than with jbn otherwise; in other networks: dense 30\.\d \(.* to .*\) %\.", minor)


@pytest.mark.parametrize("nothing", [0, None])
def test_a_peak_that_the_compiler_does_not_tell_decides_nothing(nothing):
    summary = study.summarize(measured(held={"jbn, remat": nothing}))
    outcome = study.CLAIMS[2].judge(summary)
    assert outcome.verdict == "not decided within the intervals"
    assert outcome.sentence.startswith("The compiler does not tell what a step has at its peak. Kept for")
    summary = study.summarize(measured()[4:])
    for row in summary["rows"]:
        row["temporaries"] = nothing
    assert "peak" not in study.draw(summary).get_suptitle()


@pytest.mark.parametrize("told", [{"traffic": None}, {"flops": None}, {"traffic": 9e6}])
def test_what_the_compiler_does_not_tell_decides_nothing(told):
    cells = measured(**told)
    assert verdicts(cells)[1] == "not decided within the intervals"
    study.tabulate(study.summarize(cells))


def test_ratios_are_those_of_a_round():
    cells = measured(repeats=2)
    cells[0].numbers["seconds"] |= {"none": np.array([1.0, 10.0, 1.0]), "Flax": np.array([2.0, 20.0, 3.0])}
    row = study.find(study.summarize(cells), "dense", "Flax")
    assert row["by none"] == [2.0, 1.0]
    assert row["milliseconds"][0] == 3000.0


@pytest.mark.parametrize(("width", "encoding"), [(80, "utf-8"), (60, "utf-8"), (60, "ascii")])
def test_the_table_fits_its_terminal(width, encoding):
    with io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace") as file:
        sheet = study.tabulate(study.summarize(measured()))
        show_sheet(Console(file=file, width=width), type(sheet)(sheet.heading, sheet.rows))
        file.flush()
        lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("resnet: " in line for line in lines) == len(study.ARMS)


def test_the_title_of_the_figure_says_what_came_out():
    cells = measured(share={"jbn": 0.3, "Flax": 0.5}, kept={"Flax": 8e6, "jbn": 5e6, "jbn, remat": 3e6})
    for cell in cells:
        cell.numbers["needs"]["jbn"]["temporaries"] = 5e5
    figure = study.draw(study.summarize(cells))
    title = " ".join(figure.get_suptitle().split())
    assert title == (
        "Batch norm (jbn's) takes 30 (30 to 30) % of a resnet's step. Computing its results again (remat_policy) keeps "
        "40 % less for the backward pass, needs 100 % more at the peak, and takes 0.1 (-0.1 to 0.4) % more time, "
        "undecided, than jbn without it"
    )
    note = " ".join(figure.get_supxlabel().split())
    assert re.search(r"\(%, \+: slower\): dense Flax [+-][\d.]+ ±[\d.]+, remat_policy \+0\.1 ±0\.2; resnet Flax", note)
    assert re.search(r"which 'kept' may include; \w+: 0\.50 to 1\.00 MB\. ", note)
    assert [axes.get_title("left").split()[0] for axes in figure.axes] == ["share", "kept", "temporaries"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [arm.label for arm in study.ARMS.values()]
