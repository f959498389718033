"""The study of inference: nothing here asserts how accurate a network becomes."""

import io
import re

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
        for number, name in enumerate(study.READOUTS):
            values = np.full((seeds, 3, looks), 0.8) + 0.002 * np.arange(seeds)[:, None, None]
            values[..., :2] += better.get(f"early_{size}_{name}", 0)
            values[..., -1] += better.get(f"end_{size}_{name}", 0)
            test[name] = values + 1e-5 * (number * (-1.0) ** np.arange(seeds))[:, None, None]
        validation = np.tile([0.7, 0.8, 0.6], (seeds, 1))
        settings = {"batch_size": size, "rates": [0.1, 0.2, 0.4], "seeds": seeds, "examples": 320, "looks": looks}
        numbers = {"validation": validation, "test": test, "diverged": np.zeros((seeds, 3), bool)}
        cells.append(Measured(settings, numbers))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    no = "does not hold"
    assert verdicts(measured()) == [no] * 2 + ["holds"] + [no] * 6
    # What lies as far apart as still counts as the same, with seeds on both sides of it, decides nothing.
    early = {"early_40_0.9": -0.01, "early_40_0.99": -0.02, "early_40_debiased": 0.015}
    end = {"end_4_batches": 0.01, "end_40_0.9": -0.01, "end_40_0.1": -0.02, "end_4_0.1": -0.01, "end_40_0.99": -0.01}
    assert verdicts(measured(**early, **end, end_4_unbiased=0.01)) == [UNDECIDED] * 9
    early = {"early_40_0.9": -0.1, "early_40_0.99": -0.2}
    end = {"end_4_batches": 0.1, "end_40_0.1": -0.1, "end_4_0.1": -0.1, "end_40_0.99": -0.2, "end_4_unbiased": 0.1}
    assert verdicts(measured(**early, **end)) == ["holds"] * 9
    early = {"early_40_0.9": 0.1, "early_40_0.99": 0.2}
    end = {"end_4_batches": -0.1, "end_40_0.1": 0.2, "end_4_0.1": 0.2, "end_40_0.99": 0.2, "end_4_unbiased": -0.1}
    assert verdicts(measured(**early, **end, **{"end_40_0.9": 0.1})) == ["does not hold"] * 9


def test_a_momentum_that_decides_nothing_is_told():
    cells = measured(**{"end_40_0.999": -0.3})
    still = next(claim for claim in study.CLAIMS if "0.99, the default of Keras" in claim.sentence)
    outcome = still.judge(study.summarize(cells))
    assert outcome.verdict == "does not hold"
    assert re.search(r"0\.999, which decides nothing: 50\.3 %, 30\.0 points worse \(.*\)\.$", outcome.sentence)


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
        "Running statistics of a large momentum lag early: batches of 40, on average over the first 2 steps, errors "
        "are 39.7 % by 0.99, 29.7 % by 0.9, 19.7 % by all training rows (at the end 19.7, 19.7 and 19.7 %). With "
        "batches of 4, PyTorch's 0.1, taken for the weight of the OLD value, ends with 49.7 %; what PyTorch does, 0.9, "
        "with 19.7 %"
    )
    note = " ".join(figure.get_supxlabel().split())
    assert note.endswith("Not drawn, but in the table: momentum 0, 0.5, 0.999, debiased, unbiased, all test")
    same = study.draw(study.summarize(measured())).get_suptitle()
    assert "a large momentum do not lag for certain early" in " ".join(same.split())
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
    """Where the labels are what float64 NumPy answers by the statistics that a readout names, it makes no error."""
    network, data = Dense(study.WIDTHS, study.Recorded()), parts_of(0, Plan((0.1,), 1, 1, 1))
    # A few rows of training, and darker: their statistics are not those of the test rows.
    data = data._replace(training=data.training._replace(x=data.training.x[:50] ** 3))
    params, states = network.init(0)
    look, x = study.evaluate(study.SMALL), np.float64(data.test.x)
    expected = {
        study.POPULATION: answer(params, x, [np.float64(data.training.x)]),
        study.TEST: answer(params, x, [x]),
        study.BATCHES: answer(params, x, np.split(x, len(x) // study.SMALL)),
        "0.9": answer(params, x, None),
    }
    for name, labels in expected.items():
        found = look(params, states, data._replace(test=data.test._replace(labels=labels)))
        # One row may lie so near two classes that float32 answers the other.
        assert float(found[name]) > 1 - 1.5 / len(x), name


def answer(params, x, batches):
    """Return the classes of x, of which as many rows are normalized by each batch; by mean 0, variance 1 for None."""
    for kernel in params["kernels"][:-1]:
        x, batches = x @ kernel, batches and [batch @ kernel for batch in batches]
        seen = [(batch.mean(0), batch.var(0)) for batch in batches] if batches else [(0, 1)]
        x = np.concatenate([hidden(*pair) for pair in zip(np.split(x, len(seen)), seen, strict=True)])
        batches = batches and [hidden(*pair) for pair in zip(batches, seen, strict=True)]
    return (x @ params["kernels"][-1]).argmax(1)


def hidden(x, seen):
    mean, var = seen
    return np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
