"""The study of batch sizes: nothing here asserts how accurate a network becomes."""

import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn.studies import batch_size as study
from jbn.studies import training
from jbn.studies.gallery import run
from jbn.studies.networks import BatchNorm, Bias, Dense
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet

VERDICTS = {"holds", "does not hold", "not decided within the intervals"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    said = Console(file=io.StringIO(), width=80)
    return run("batch-size", size="quick", out=out, console=said), out / "batch-size", said.file.getvalue()


def test_each_arm_has_a_number_or_a_reason_at_each_size(quick):
    found, out, _ = quick
    summary = found["summary"]
    rows = {(row["arm"], row["batch_size"]): row for row in summary["arms"]}
    assert len(rows) == len(summary["arms"])
    for arm in study.ARMS:
        for size in summary["batch_sizes"]:
            assert bool(study.reason_of_none(arm, size)) != ((arm, size) in rows)
    for row in rows.values():
        assert len(row["test_accuracy"]) == summary["seeds"]
        assert all(0 <= accuracy <= 1 for accuracy in row["test_accuracy"])
        assert row["rate"] in study.rates_of(study.EXTENTS["quick"], row["batch_size"])
        assert row["interval"]["low"] <= row["interval"]["mean"] <= row["interval"]["high"]
    assert {claim["verdict"] for claim in found["claims"]} <= VERDICTS
    kept = json.loads((out / "results.json").read_text())
    assert {name: kept[name] for name in found} == found
    assert kept["options"]["size"] == "quick"
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_says_why_there_is_no_number(quick):
    *_, text = quick
    assert re.search(r"^1( +-){4}( +[\d.]+( ±[\d.]+)?){3}$", text, re.MULTILINE), text
    notes = " ".join(text.split())
    assert "No number of batch norms at 1 row: it has no variance, and would be normalized to 0 in every" in notes
    assert "No number of ghost up to 16 rows: it is plain, as the batch is no larger than a group." in notes
    assert max(map(len, text[: text.index("Test accuracy")].splitlines())) <= 80


def measured(accuracy=0.9, batch_sizes=(2, 128), seeds=4, arms=study.ARMS, **better):
    """Return cells with the same accuracies everywhere, and those of ``arm_size`` better by so much."""
    cells = {}
    for arm in arms:
        for size in batch_sizes:
            by = accuracy + better.get(f"{arm.strip('.')}_{size}", 0) + 0.002 * np.arange(seeds)
            numbers = {"validation": np.stack([by - 0.1, by, by - 0.2], 1), "diverged": np.zeros((seeds, 3), bool)}
            settings = {"arm": arm, "batch_size": size, "rates": [0.1, 0.2, 0.4], "seeds": seeds, "examples": 256}
            cells[arm, size] = Measured(settings, {arm: numbers | {"test": numbers["validation"]}})
    return cells


def verdicts(cells):
    summary = study.summarize(list(cells.values()))
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    undecided = "not decided within the intervals"
    assert verdicts(measured()) == [undecided] * 3 + ["holds", undecided]
    for_them = measured(plain_2=-0.3, renorm_2=-0.1, recal_2=-0.2, group_2=0.005, ghost_128=0.02)
    assert verdicts(for_them) == ["holds"] * 5
    against = measured(plain_2=0.05, renorm_2=-0.1, recal_2=-0.2, group_2=0.2, ghost_128=-0.02)
    assert verdicts(against) == ["does not hold"] * 5


def test_group_norm_is_judged_between_the_sizes_of_its_source_and_a_part_says_how_much():
    better = {"group_1": 0.2, "group_128": -0.2, "plain_1": -0.3, "renorm_1": -0.2}
    summary = study.summarize(list(measured(batch_sizes=(1, 2, 32, 128), **better).values()))
    _, mends, _, independent, _ = [claim.judge(summary) for claim in study.CLAIMS]
    assert independent.verdict == "holds"
    assert independent.sentence.startswith(
        "group at 32 90.3 %, group at 2 90.3 %: equal in the mean (0.0 to 0.0 points)."
    )
    assert independent.sentence.endswith("Group norm has 70.3 % at 128 and 110.3 % at 1.")
    assert mends.sentence.endswith("That is 10.0 of the 30.0 points that plain loses from 128 to 1 rows.")


def test_the_rate_is_chosen_by_validation_rows_and_judged_by_test_rows():
    cell = measured(seeds=2)["plain", 2]
    numbers = {
        "validation": [[0.2, 0.9, 0.3], [0.2, 0.8, 0.3]],
        "test": [[0.99, 0.5, 0.3], [0.97, 0.7, 0.3]],
        "diverged": [[False, True, False], [False, False, False]],
    }
    (row,) = study.summarize([Measured(cell.settings, {"plain": numbers})])["arms"]
    assert (row["rate"], row["edge"], row["diverged"]) == (0.2, "", 1)
    assert row["test_accuracy"] == [0.5, 0.7]
    assert row["interval"]["mean"] == pytest.approx(0.6)


def test_what_is_at_an_edge_and_what_diverged_is_said():
    cells = measured()
    numbers = cells["none", 2].numbers["none"]
    numbers["validation"] = numbers["validation"][:, [1, 0, 2]]
    numbers["diverged"][0, 0] = True
    notes = " ".join(study.tabulate(study.summarize(list(cells.values()))).notes)
    assert "a better one may lie outside: none at 2 (lowest)." in notes
    assert "Seeds that diverged, and count as chance (10%): 1 of none at 2." in notes


@pytest.mark.parametrize(("width", "encoding"), [(80, "utf-8"), (60, "utf-8"), (60, "ascii")])
def test_the_table_fits_its_terminal(width, encoding):
    cells = measured(batch_sizes=(2, 16, 128))
    with io.TextIOWrapper(io.BytesIO(), encoding) as file:
        sheet = study.tabulate(study.summarize(list(cells.values())))
        show_sheet(Console(file=file, width=width), type(sheet)(sheet.heading, sheet.rows))
        file.flush()
        lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= width
    words = [word for line in lines for word in re.findall(r"[^\s|]+", line)]
    assert set(study.ARMS) <= set(words)
    assert words.count("90.3") == 21


def test_the_title_of_the_figure_says_what_came_out():
    cells = measured(plain_2=-0.3, renorm_2=-0.1, group_2=0.05)
    figure = study.draw(study.summarize(list(cells.values())))
    title = " ".join(figure.get_suptitle().split())
    expected = "with statistics taken anew 9.7 %, batch renormalization 19.7 %, group norm 4.7 %, no norm at all 9.7 %"
    assert title == f"With 2 rows a batch, batch norm makes the most errors: 39.7 %, {expected}"
    (axes,) = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [arm.label for arm in study.ARMS.values()]
    lines = [container.lines[0] for container in axes.containers]
    for look in ("get_marker", "get_color"):
        assert len({getattr(line, look)() for line in lines}) == len(study.ARMS)


def test_one_row_cannot_train_batch_norm():
    network = Dense(study.WIDTHS, study.norm_of("plain", 1, 4))
    with pytest.raises(ValueError, match="one value per channel in training"):
        training.sweep(network, training.Plan((0.1,), 2, 1, 4), {})


def test_recalibrated_statistics_are_those_of_all_rows_in_every_layer():
    network = Dense(study.WIDTHS, BatchNorm(0.9))
    params, states = network.init(0)
    x = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    seen = np.float64(x)
    for kernel, state in zip(params["kernels"], study.recalibrate(params, states, jnp.asarray(x)), strict=False):
        z = seen @ np.float64(kernel)
        np.testing.assert_allclose(state.mean, z.mean(0), atol=1e-5)
        np.testing.assert_allclose(state.var, z.var(0), rtol=1e-4)
        seen = np.maximum((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5), 0)


def test_arms_begin_alike():
    kernels = [Dense(study.WIDTHS, study.norm_of(arm, 32, 8)).init(3)[0]["kernels"] for arm in ("plain", "layer")]
    for one, other in zip(*kernels, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (kernels[0][0] != Dense(study.WIDTHS, Bias()).init(4)[0]["kernels"][0]).any()


def test_renorm_is_freed_over_the_first_half_of_the_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(study, "renorm", lambda r_max, d_max: seen.append((float(r_max), float(d_max))))
    tie = study.norm_of("renorm", 8, 400).tie
    for step in (0, 25, 200, 399):
        tie(step)
    assert seen == [(1.0, 0.0), (1.0, 0.0), (3.0, 5.0), (3.0, 5.0)]
