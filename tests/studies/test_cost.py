"""The study of what batch norm costs: nothing here asserts how long anything takes."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn.lab.models import NETWORKS
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
    monkeypatch.setitem(study.ARMS, "Flax", study.Arm("wrong", study.Bias))
    study.prepare.cache_clear()
    with pytest.raises(ArithmeticError, match="conv: loss and gradient of Flax are"):
        study.prepare("conv", (8, 8, 8, 1))


@pytest.mark.parametrize("network", ["conv", "resnet"])
def test_the_networks_are_the_same_with_either_norm(network):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32))
    answers = []
    for norm in (study.OfFlax, study.BatchNorm):
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
    least = study.kept_bytes(product, (a, b), jnp.ones((3, 4)))
    assert least % (12 * 4) == 0
    assert 2 * 48 <= least <= 5 * 48


def measured(repeats=4, share=None, more=0.0, kept=None, traffic=2e7, flops=1.1e8):
    """Return repeats in which norms take these shares of a step, of what no norm takes 1 s."""
    share, kept, cells = share or {}, kept or {}, []
    for network in ("dense", "resnet"):
        for repeat in range(repeats):
            wait = 1 + 0.001 * repeat
            seconds = {arm: np.full(3, wait / (1 - share.get(arm, 0.0))) for arm in study.ARMS}
            seconds["jbn"] = seconds["jbn"] * (1 + 0.002 * repeat)
            seconds["jbn, remat"] = seconds["jbn"] * (1 + more + 0.001 * repeat)
            needs = {arm: NEEDS | {"kept": kept.get(arm, 4e6)} for arm in study.ARMS}
            needs["jbn"] |= {"traffic": traffic, "flops": flops}
            settings = {"network": network, "shape": [8, 4, 4, 1], "repeat": repeat, "rounds": 3}
            cells.append(Measured(settings, {"seconds": seconds, "needs": needs}))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    undecided = "not decided within the intervals"
    assert verdicts(measured(share={"jbn": 0.3}, kept={"jbn, remat": 1.9e6}, more=0.01)) == ["holds"] * 4
    against = measured(share={"jbn": 0.02}, kept={"jbn, remat": 3e6}, more=0.3, flops=9e8)
    assert verdicts(against) == ["does not hold"] * 4
    assert verdicts(measured(share={"jbn": 0.098}, more=0.0185))[::3] == [undecided] * 2
    # Half of what most libraries keep is saved, whatever other arms keep.
    assert verdicts(measured(kept={"Flax": 8e6, "jbn, remat": 3.9e6}))[2] == "holds"
    assert verdicts(measured(kept={"jbn": 8e6, "none": 8e6, "jbn, remat": 3.9e6}))[2] == "does not hold"


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
    figure = study.draw(study.summarize(cells))
    title = " ".join(figure.get_suptitle().split())
    assert title == (
        "In the resnet, jbn with remat_policy keeps least for the backward pass: 0.75 times what none keeps "
        "(Flax 2.00, jbn 1.25), and takes 30 % of the step (Flax 50 %, jbn 30 %)"
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [arm.label for arm in study.ARMS.values()]
