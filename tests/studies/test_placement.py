"""The study of places: nothing here asserts how accurate a network becomes."""

import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn.studies import placement as study
from jbn.studies.gallery import run
from jbn.studies.networks import Dense
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet
from jbn.studies.training import Rows, loss_of

UNDECIDED = "not decided within the intervals"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    return run("placement", size="quick", out=out), out / "placement"


def test_each_arm_is_measured(quick):
    found, out = quick
    arms = found["summary"]["arms"]
    assert list(arms) == list(study.ARMS)
    assert all(len(arm["test_accuracy"]) == 2 for arm in arms.values())
    assert {arm for arm, found in arms.items() if found["bias"]} >= {"after", "none"}
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "does not hold", UNDECIDED}
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def measured(seeds=4, **better):
    """Return cells with the same accuracies in all arms, and better ones by so much."""
    cells = []
    for arm in study.ARMS:
        test = 0.9 + better.get(arm, 0) + 0.001 * np.arange(seeds)[:, None] - [0.2, 0, 0.1]
        settings = {"arm": arm, "rates": [0.1, 0.2, 0.4], "seeds": seeds, "steps": 8}
        numbers = {"validation": test, "test": test, "diverged": test < 0, "bias": 0 * test}
        cells.append(Measured(settings, numbers))
    return cells


def verdicts(**better):
    summary = study.summarize(measured(**better))
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    assert verdicts() == ["does not hold", UNDECIDED, "holds", "holds"]
    # What is called the same is no better place, also where the interval excludes 0; slightly better it may be.
    same = ["does not hold", "holds", "holds", "holds"]
    assert verdicts(after=0.005, biased=0.005, unscaled=0.005) == same
    assert verdicts(after=-0.005)[:2] == ["does not hold"] * 2
    assert verdicts(after=-0.02, biased=-0.02, unscaled=0.02) == ["holds", *["does not hold"] * 3]
    assert verdicts(after=0.02)[:2] == ["does not hold", "holds"]


def test_a_bias_before_the_norm_is_given_no_gradient():
    rng = np.random.default_rng(0)
    rows = Rows(jnp.asarray(rng.standard_normal((20, 6)), jnp.float32), jnp.asarray(rng.integers(0, 10, 20)))
    for arm, useless in (("biased", True), ("after", False)):
        network = Dense((6, 8, 7, 10), study.ARMS[arm])
        params, states = network.init(0)
        grads = jax.grad(lambda params, network=network, states=states: loss_of(network, params, states, rows, 0)[0])(
            params
        )
        sizes = [float(jnp.abs(norm["bias"]).max()) for norm in grads["norms"]]
        assert all((size < 1e-6) == useless for size in sizes), (arm, sizes)


@pytest.mark.parametrize("arm", study.ARMS)
def test_an_arm_is_what_its_row_says(arm):
    layer = study.ARMS[arm]
    params, state = layer.init(3, np.random.default_rng(0))
    if layer.bias:
        params = params | {"bias": jnp.array([[0.5, -1.0, 2.0]])}
    x = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    y, _ = layer(params, state, jnp.asarray(x), True, 0)
    seen = np.float64(x)
    for step in layer.what.split(", ")[1:]:
        if step == "bias":
            seen = seen + np.array([0.5, -1.0, 2.0])
        elif step == "ReLU":
            seen = np.maximum(seen, 0)
        else:
            seen = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
    np.testing.assert_allclose(y, seen, rtol=1e-4, atol=1e-5)
    if layer.place:
        assert (params["norm"].scale is None) == ("without scale" in layer.what)


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_its_terminal(width):
    sheet = study.tabulate(study.summarize(measured(after=0.02)))
    with io.StringIO() as file:
        show_sheet(Console(file=file, width=width), type(sheet)(sheet.heading, sheet.rows))
        text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "+2.0 ±0.0" in text


def test_the_title_of_the_figure_says_what_came_out():
    for by, said in (
        (0.02, "2.0 points better (2.0 to 2.0) than before it, beyond"),
        (-0.02, "2.0 points worse (2.0 to 2.0) than before it, beyond"),
        (-0.004, "0.4 points worse (0.4 to 0.4) than before it, within"),
    ):
        figure = study.draw(study.summarize(measured(after=by, none=-0.3)))
        seen = " ".join(figure.get_suptitle().split())
        assert seen == (
            f"After the ReLU batch norm is {said} the 1.0 that are called the same; "
            "with no norm it is 30.0 points worse (30.0 to 30.0)"
        )
        assert [text.get_text().split(":")[0] for text in figure.axes[0].get_xticklabels()] == list(study.ARMS)


def test_seeds_that_came_out_equal_lie_side_by_side():
    np.testing.assert_array_equal(study._count_equal(np.array([0.1, 0.2, 0.3 - 0.2, 0.1])), [0, 0, 1, 2])


def test_an_interval_wider_than_accuracies_can_lie_is_not_told():
    cells = measured(seeds=2)
    cells[0].numbers["test"] = cells[0].numbers["test"] * [[0.1], [1]]
    sheet = study.tabulate(study.summarize(cells))
    assert [row[2].split()[1] for row in sheet.rows] == ["±?", *["±0.6"] * 4]
    assert "; ±?: it is wider than accuracies can lie)" in sheet.notes[1]
    assert "±?" not in study.tabulate(study.summarize(measured(seeds=2))).notes[1]


def test_what_is_best_at_an_edge_of_the_grid_loses_nothing_for_certain():
    for places, worse, better in [([1, 0, 2], UNDECIDED, "holds"), ([0, 2, 1], UNDECIDED, "holds")]:
        for by, verdict in ((-0.02, worse), (0.02, better)):
            cells = measured(after=by)
            (after,) = (cell for cell in cells if cell.settings["arm"] == "after")
            after.numbers.update({name: after.numbers[name][:, places] for name in ("validation", "test")})
            outcome = study.CLAIMS[1].judge(study.summarize(cells))
            assert outcome.verdict == verdict
            reason = (
                r"The best rate is at an edge of the grid, and a better one may lie outside: after \((low|high)est\)"
            )
            assert re.match(reason, outcome.sentence)
