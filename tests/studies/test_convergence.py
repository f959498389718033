"""The study of convergence: nothing here asserts how accurate a network becomes."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn.studies import convergence as study
from jbn.studies.gallery import run
from jbn.studies.networks import BatchNorm, Bias, Dense, FromZero, Residual
from jbn.studies.percentiles import inputs_of_last, travel
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet
from jbn.studies.training import Plan, accuracies, sweep, unseen

UNDECIDED = "not decided within the intervals"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    return run("convergence", size="quick", out=out), out / "convergence"


def test_each_arm_of_each_network_is_measured(quick):
    found, out = quick
    rows = {(row["case"], row["arm"]): row for row in found["summary"]["arms"]}
    assert set(rows) == {(name, arm) for name, case in study.CASES.items() for arm in case.arms}
    for row in rows.values():
        assert len(row["needed"]) == len(row["reached"]) == len(row["test_accuracy"]) == 2
        assert len(row["curve"]) == row["looks"]
        assert ("unit" in row) == (row["case"] != "residual")
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "does not hold", UNDECIDED}
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def measured(steps=None, ends=None, travels=None, seeds=4):
    """Return cells of 100 steps in which arms reach the level after ``steps`` (None: never) and end at ``ends``."""
    cells = []
    for cell in study.cells("default"):
        case, arm = cell.settings["case"], cell.settings["arm"]
        settings = cell.settings | {"steps": 100, "looks": 10, "rates": [0.1, 0.2, 0.4], "seeds": seeds}
        after, end = (steps or {}).get((case, arm), 50), (ends or {}).get((case, arm), 0.92)
        curve = np.full((seeds, 3, 10), 0.2)
        if after:
            curve[:, 1, after // 10 - 1 :] = 0.91
        curve[..., -1] = end + 0.001 * np.arange(seeds)[:, None] - [0.5, 0, 0.5]
        far = (travels or {}).get(arm, 1.0) * np.linspace(0.9, 1.1, seeds)[:, None] * [9, 1, 9]
        numbers = {"validation": curve, "test": curve, "diverged": np.zeros((seeds, 3), bool)}
        if case != "residual":
            numbers |= {"travel": far, "unit": np.broadcast_to([-1, 0, 1], (3, 10, 3))}
        cells.append(Measured(settings, numbers))
    return cells


def outcomes(**numbers):
    summary = study.summarize(measured(**numbers))
    return [claim.judge(summary) for claim in study.CLAIMS]


def everywhere(norm, none):
    return {(name, arm): norm if arm == "batch norm" else none for name in study.CASES for arm in study.ARMS}


def test_claims_can_be_refuted_and_hold():
    def verdicts(**numbers):
        return [outcome.verdict for outcome in outcomes(**numbers)]

    assert verdicts() == [UNDECIDED] * 5 + ["holds"]
    for_them = verdicts(steps=everywhere(20, 50), ends={("sigmoid", "none"): 0.9}, travels={"none": 3.0})
    assert for_them == ["holds"] * 6
    ends = {("sigmoid", "none"): 0.95, ("residual", "from 0"): 0.9}
    assert verdicts(steps=everywhere(50, 20), ends=ends, travels={"none": 0.5}) == ["does not hold"] * 6


def test_what_never_gets_there_decides_nothing_in_its_favour():
    for norm, none, verdict in [(None, 50, "does not hold"), (20, None, "holds"), (None, None, UNDECIDED)]:
        ends = {where: 0.5 for where, after in everywhere(norm, none).items() if after is None}
        found = outcomes(steps=everywhere(norm, none), ends=ends)
        assert [found[number].verdict for number in (0, 3, 4)] == [verdict] * 3
        assert "4 of 4 seeds are late: not there after 100" in found[0].sentence
    summary = study.summarize(measured(steps=everywhere(20, 50)))
    for row in summary["arms"]:
        row["reached"] = [row["arm"] != "batch norm"] * 4
    assert study.CLAIMS[0].judge(summary).verdict == UNDECIDED


def test_steps_are_those_of_the_first_look_at_the_level():
    accuracy = [[0.1, 0.9, 0.8, 0.95], [0.1, 0.2, 0.3, 0.89]]
    steps, reached = study.steps_to(0.9, np.array(accuracy), 80)
    assert steps.tolist() == [40, 80]
    assert reached.tolist() == [True, False]


def test_the_rate_of_fewest_steps_and_that_of_the_best_end_differ():
    (cell, *_) = measured()
    curve = np.full((4, 3, 10), 0.2)
    curve[:, 1, 2:] = 0.91
    curve[:, 2, 5:] = 0.95
    numbers = cell.numbers | {"validation": curve, "test": curve - 0.02}
    (row,) = study.summarize([Measured(cell.settings, numbers)])["arms"]
    assert (row["rate"], row["edge"], row["end_rate"], row["end_edge"]) == (0.2, "", 0.4, "highest")
    assert row["needed"] == [100] * 4
    assert not any(row["reached"])
    np.testing.assert_allclose(row["test_accuracy"], 0.93)


def test_what_is_best_at_an_edge_of_the_grid_loses_nothing_for_certain():
    def verdicts(edges, **numbers):
        summary = study.summarize(measured(**numbers))
        for row in summary["arms"]:
            row["edge"] = row["end_edge"] = edges.get(row["arm"], "")
        return [claim.judge(summary).verdict for claim in study.CLAIMS]

    for_them = {"steps": everywhere(20, 50), "ends": {("sigmoid", "none"): 0.9}, "travels": {"none": 3.0}}
    against = {"steps": everywhere(50, 20), "ends": {("residual", "from 0"): 0.9}}
    assert verdicts({"batch norm": "highest"}, **for_them) == ["holds"] * 5 + [UNDECIDED]
    assert verdicts({"none": "highest"}, **for_them) == [UNDECIDED] * 2 + ["holds"] + [UNDECIDED] * 2 + ["holds"]
    assert verdicts({"from 0": "highest"}, **against)[3:] == ["does not hold"] * 2 + [UNDECIDED]
    assert verdicts({"batch norm": "highest"}, **against)[3:] == [UNDECIDED] * 2 + ["does not hold"]


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_its_terminal(width):
    sheet = study.tabulate(study.summarize(measured()))
    with io.StringIO() as file:
        show_sheet(Console(file=file, width=width), type(sheet)(sheet.heading, sheet.rows))
        lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(bool(re.search(r"50 +0\.2 +92\.\d ±0\.\d", line)) for line in lines) == len(sheet.rows)


def test_the_title_of_the_figure_says_what_came_out():
    steps = everywhere(20, 50) | {("residual", "none"): None, ("relu", "none"): 40}
    figure = study.draw(study.summarize(measured(steps=steps, ends={("residual", "none"): 0.5})))
    title = " ".join(figure.get_suptitle().split())
    assert title == (
        "Batch norm reaches 90% in fewer steps in 3 of 3 networks: without it, sigmoid units need 2.5 times as many, "
        "ReLU units 2.0 times, a residual network at least 5.0 times (0 of 4 seeds get there)"
    )
    assert [text.get_text() for text in figure.axes[5].texts] == ["none: 0 of 4\nget there"]
    assert "not drawn" not in figure.get_supxlabel()
    assert len(figure.axes) == 6
    figure = study.draw(study.summarize(measured(steps={("relu", "none"): 60}, travels={"none": 3.0})))
    assert "in fewer steps in 1 of 3 networks" in " ".join(figure.get_suptitle().split())
    moves = [axes.get_title("left").split("\n")[-1] for axes in figure.axes[3:5]]
    assert moves == ["travel 3.00 × spread)", "travel 1.00 × spread)"]


def test_the_figure_names_the_rate_of_a_better_end_that_it_does_not_draw():
    summary = study.summarize(measured())
    summary["arms"][0]["end_rate"] = 0.4
    summary["arms"][5]["reached"] = [True, True, False, True]
    figure = study.draw(summary)
    note = " ".join(figure.get_supxlabel().split())
    assert "Ends, each at its best rate, not drawn: sigmoid: batch norm 92.2 %, none 92.2 % (undecided). " in note
    assert "Begin at 0" not in note
    summary["arms"][0]["end_edge"] = "highest"
    at_edge = " ".join(study.draw(summary).get_supxlabel().split())
    assert "none 92.2 % (undecided, batch norm's rate, 0.4, is the highest tried). " in at_edge
    summary["arms"][0]["test_accuracy"] = [value + 0.01 for value in summary["arms"][0]["test_accuracy"]]
    assert "none 92.2 % (batch norm's rate, 0.4, is" in " ".join(study.draw(summary).get_supxlabel().split())
    assert [text.get_text() for text in figure.axes[5].texts] == ["none: 3 of 4\nget there"]


def test_a_verdict_that_an_edge_leaves_open_begins_with_the_reason():
    summary = study.summarize(measured(steps=everywhere(50, 20), ends={("residual", "from 0"): 0.5}))
    *_, faster, ends = [claim.judge(summary) for claim in study.CLAIMS]
    assert [each.verdict for each in (faster, ends)] == ["does not hold"] * 2
    assert "'none, from 0' is 42.0 points worse (42.0 to 42.0) than 'batch norm'" in ends.sentence
    for row in summary["arms"]:
        row["edge"], row["end_edge"] = "lowest" * (row["arm"] == "batch norm"), "highest" * (row["arm"] == "from 0")
    *_, faster, ends = [claim.judge(summary) for claim in study.CLAIMS]
    assert [each.verdict for each in (faster, ends)] == [UNDECIDED] * 2
    note = " ".join(study.draw(summary).get_supxlabel().split())
    assert "Begin at 0: its best rate is the highest tried and 100 steps are few: undecided." in note
    reason = "The best rate is at an edge of the grid, and a better one may lie outside:"
    assert faster.sentence.startswith(f"{reason} batch norm (lowest). To 90.0 %")
    assert ends.sentence.startswith(
        f"{reason} none, from 0 (highest). 100 steps are few for it: 4 of 4 seeds end below"
    )


def test_travel_is_in_units_of_the_distance():
    seen = np.zeros((4, 3, 1))
    seen[:, :, 0] = np.array([[-1, 0, 1]]) + np.array([[0], [1], [0], [1]])
    assert travel(seen) == pytest.approx(3 / 2)
    assert travel(7 * seen) == pytest.approx(3 / 2)
    assert travel(seen[:1]) == 0


@pytest.mark.parametrize("norm", [BatchNorm(0.9), Bias()], ids=["batch norm", "bias"])
def test_inputs_of_the_last_activations_are_those_of_training(norm):
    network = Dense((64, 7, 5, 10), norm)
    params, states = network.init(0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((50, 64)), jnp.float32)
    given = inputs_of_last(network, params, states, x)
    logits, _ = network(params, states, x, True, 0)
    np.testing.assert_allclose(np.maximum(given, 0) @ params["kernels"][-1], logits, rtol=1e-4, atol=1e-5)
    assert (given < 0).any()


def test_branches_that_begin_at_0_add_nothing_at_first():
    network = FromZero(8, Bias(), (4, 4, 8))
    params, states = network.init(0)
    plain, _ = Residual(8, Bias(), (4, 4, 8)).init(0)
    x = jnp.asarray(np.random.default_rng(1).random((3, 64)), jnp.float32)
    others = plain | {"kernels": [plain["kernels"][0], *(0 * kernel for kernel in plain["kernels"][1:])]}
    expected, _ = Residual(8, Bias(), (4, 4, 8))(others, states, x, True, 0)
    np.testing.assert_allclose(network(params, states, x, True, 0)[0], expected, rtol=1e-5)
    whole, _ = Residual(8, Bias(), (4, 4, 8))(plain, states, x, True, 0)
    ones = params | {"branches": np.ones(2, np.float32)}
    np.testing.assert_allclose(network(ones, states, x, True, 0)[0], whole, rtol=1e-5)


def test_accuracies_in_one_pass_are_those_of_two():
    network = Dense((64, 8, 10), Bias())
    found = sweep(network, Plan((0.1, 1e30), 2, 32, 96), {"one": unseen(network), "two": accuracies(network)})
    np.testing.assert_allclose(found["one"][..., 0], found["two"].validation)
    np.testing.assert_allclose(found["one"][..., 1], found["two"].test)
