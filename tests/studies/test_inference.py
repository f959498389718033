"""The study of inference: nothing here asserts how accurate a network becomes."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn import bn_forward, bn_init
from jbn.studies import inference as study
from jbn.studies.gallery import run
from jbn.studies.networks import Dense
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet
from jbn.studies.training import Plan, parts_of

VERDICTS = {"holds", "does not hold", "not decided within the intervals"}
UNDECIDED = "not decided within the intervals"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run("inference", size="quick", out=tmp_path_factory.mktemp("studies"))


def test_each_readout_has_its_numbers(quick):
    extent, summary = study.EXTENTS["quick"], quick["summary"]
    assert [int(size) for size in summary["batches"]] == list(study.BATCH_SIZES)
    for size, found in summary["batches"].items():
        assert found["rate"] in study.rates_of(extent, int(size))
        for when in ("early", "whole", "end"):
            assert tuple(found[when]) == study.READOUTS
            assert all(len(values) == extent.seeds for values in found[when].values())
        assert all(len(curve) == extent.looks for curve in found["curves"].values())
    assert {claim["verdict"] for claim in quick["claims"]} <= VERDICTS


def measured(seeds=4, looks=8, **better):
    """Return cells of equal accuracies, but the readouts ``size_when_name`` are better by so much."""
    cells = []
    for size in study.BATCH_SIZES:
        test = {}
        for name in study.READOUTS:
            values = np.full((seeds, 3, looks), 0.8) + 0.002 * np.arange(seeds)[:, None, None]
            values[..., :2] += better.get(f"early_{size}_{name}", 0)
            values[..., -1] += better.get(f"end_{size}_{name}", 0)
            test[name] = values + 1e-4 * np.cos(np.arange(seeds) * len(name))[:, None, None]
        validation = np.tile([0.7, 0.8, 0.6], (seeds, 1))
        settings = {"batch_size": size, "rates": [0.1, 0.2, 0.4], "seeds": seeds, "examples": 320, "looks": looks}
        numbers = {"validation": validation, "test": test, "diverged": np.zeros((seeds, 3), bool)}
        cells.append(Measured(settings, numbers))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    assert verdicts(measured()) == [UNDECIDED] * 2 + ["holds"] + [UNDECIDED] * 6
    early = {"early_40_0.9": -0.1, "early_40_0.99": -0.2}
    end = {"end_4_batches": 0.1, "end_40_0.1": -0.1, "end_4_0.1": -0.1, "end_40_0.99": -0.2, "end_4_unbiased": 0.1}
    assert verdicts(measured(**early, **end)) == ["holds"] * 9
    early = {"early_40_0.9": 0.1, "early_40_0.99": 0.2}
    end = {"end_4_batches": -0.1, "end_40_0.1": 0.2, "end_4_0.1": 0.2, "end_40_0.99": 0.2, "end_4_unbiased": -0.1}
    assert verdicts(measured(**early, **end, **{"end_40_0.9": 0.1})) == ["does not hold"] * 9


def test_the_rate_is_that_of_validation_rows_and_its_edge_is_said():
    cells = measured()
    cells[0].numbers["validation"] = cells[0].numbers["validation"][:, [1, 0, 2]]
    cells[0].numbers["test"]["0.9"][:, 0] = 0.3
    cells[0].numbers["diverged"][1, 0] = True
    summary = study.summarize(cells)
    found = summary["batches"][str(study.SMALL)]
    assert found["rate"] == 0.1
    assert found["end"]["0.9"] == [0.3] * 4
    notes = " ".join(study.tabulate(summary).notes)
    assert "a better one may lie outside: batches of 4 (lowest)." in notes
    assert "Seeds that diverged, and count as chance (10%): 1 of batches of 4." in notes


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_its_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    sheet = study.tabulate(study.summarize(measured()))
    show_sheet(console, type(sheet)(sheet.heading, sheet.rows))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("80.3 ±0.4" in line for line in lines) == len(study.READOUTS)


def test_the_title_of_the_figure_says_what_came_out():
    better = {"early_40_0.9": -0.1, "early_40_0.99": -0.2, "end_4_0.1": -0.3}
    figure = study.draw(study.summarize(measured(**better)))
    title = " ".join(figure.get_suptitle().split())
    assert title == (
        "Batches of 40, in the first 2 steps: errors 29.7 % by running statistics of momentum 0.9, 39.7 % by 0.99, "
        "19.7 % by all training rows; at the end 19.7, 19.7 and 19.7 %. Momentum 0.1, batches of 4: 49.7 % at the end"
    )
    assert len(figure.axes) == 2
    assert len(figure.legends[0].get_texts()) == len(study.DRAWN)


def test_recorded_statistics_are_those_of_a_norm_that_trains_with_them():
    rng = np.random.default_rng(0)
    norm = study.Recorded()
    params, states = norm.init(3, rng)
    alone = {name: bn_init(3, counted=callable(each.momentum))[1] for name, each in study.RUNNING.items()}
    for step in range(3):
        x = jnp.asarray(rng.standard_normal((4, 3)) * 2 + step, jnp.float32)
        y, states = norm(params, states, x, True, jnp.int32(step))
        for name, each in study.RUNNING.items():
            expected, alone[name] = bn_forward(
                params, alone[name], x, True, momentum=each.momentum, unbiased=each.unbiased, activation=jax.nn.relu
            )
            np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(states[name].mean, alone[name].mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(states[name].var, alone[name].var, rtol=1e-5)


def test_readouts_are_what_they_are_called():
    """In float64 NumPy, layer by layer: of all training rows, of batches of test rows, and of all test rows."""
    network, data = Dense(study.WIDTHS, study.Recorded()), parts_of(0, Plan((0.1,), 1, 1, 1))
    params, states = network.init(0)
    found = study.evaluate(study.SMALL)(params, states, data)
    # With kernels as they are drawn few rows lie near two classes: float32 may count one of them otherwise.
    slack = 1.5 / len(data.test.labels)
    groups = len(data.test.labels) // study.SMALL
    assert abs(float(found[study.POPULATION]) - score(params, data.test, data.training.x)) < slack
    assert abs(float(found[study.TEST]) - score(params, data.test, data.test.x)) < slack
    parts = [type(data.test)(*(np.split(array, groups)[number] for array in data.test)) for number in range(groups)]
    expected = np.mean([score(params, part, part.x) for part in parts])
    assert abs(float(found[study.BATCHES]) - expected) < slack
    fresh = np.float64(data.test.x)
    for kernel in params["kernels"][:-1]:
        fresh = np.maximum(fresh @ kernel / np.sqrt(1 + 1e-5), 0)
    expected = ((fresh @ params["kernels"][-1]).argmax(1) == data.test.labels).mean()
    assert abs(float(found["0.9"]) - expected) < slack


def score(params, part, seen):
    """Return the accuracy on the rows of a part, normalized by the statistics of the rows that are seen."""
    x, seen = np.float64(part.x), np.float64(seen)
    for kernel in params["kernels"][:-1]:
        x, seen = x @ kernel, seen @ kernel
        mean, deviation = seen.mean(0), np.sqrt(seen.var(0) + 1e-5)
        x, seen = (np.maximum((each - mean) / deviation, 0) for each in (x, seen))
    return ((x @ params["kernels"][-1]).argmax(1) == part.labels).mean()
