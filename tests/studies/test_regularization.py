"""The study of regularization: nothing here asserts how accurate a network becomes."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jbn.studies import regularization as study
from jbn.studies import regularization_claims as claims
from jbn.studies.gallery import run
from jbn.studies.intervals import Interval
from jbn.studies.networks import Bias, Dense
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet

VERDICTS = {"holds", "does not hold", "not decided within the intervals"}
UNDECIDED = "not decided within the intervals"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run("regularization", size="quick", out=tmp_path_factory.mktemp("studies"))


def test_each_arm_has_its_numbers(quick):
    extent, summary = study.EXTENTS["quick"], quick["summary"]
    assert [row["arm"] for row in summary["arms"]] == [arm.name for arm in study.arms_of(extent)]
    for row in summary["arms"]:
        assert row["rate"] in study.rates_of(extent, row["noise"])
        gaps = np.subtract(row["training"], row["test"])
        np.testing.assert_allclose(row["gap"], gaps, atol=1e-5)
        assert len(gaps) == extent.seeds
    assert {claim["verdict"] for claim in quick["claims"]} <= VERDICTS


def measured(gap=0.2, noises=(0.0, 0.4), seeds=4, **better):
    """Return cells of equal accuracies, but ``arm_noise``, such as ``bn2_40``, are better on unseen rows by so much."""
    cells = []
    for noise in noises:
        for arm in study.arms_of(study.EXTENTS["default"]):
            name = f"{re.sub('[^a-z0-9]', '', arm.name)}_{noise:.0%}".strip("%")
            test = 0.8 + better.get(name, 0) + 0.002 * np.arange(seeds)
            unseen = np.stack([test - 0.1, test, test - 0.2], 1)
            numbers = {
                "training": np.full((seeds, 3), 0.8 + gap) + 0.001 * np.cos(np.arange(seeds) * arm.group)[:, None],
                "validation": unseen,
                "test": unseen,
                "diverged": np.zeros((seeds, 3), bool),
            }
            settings = vars(arm) | {"noise": noise, "rates": [0.1, 0.2, 0.4], "seeds": seeds, "steps": 8}
            cells.append(Measured(settings, numbers))
    return cells


def verdicts(cells):
    summary = study.summarize(cells)
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    same = ["does not hold"] * 2 + [UNDECIDED] * 2 + ["does not hold"] * 2 + ["holds"] * 2 + ["does not hold"]
    assert verdicts(measured()) == same
    # What is called the same in one claim is in each of them, also where the interval excludes 0.
    assert verdicts(measured(bn20_0=0.005, bn40_0=-0.005, bn40drop05_0=-0.006)) == same
    small = {f"bn{group}_{noise}": 0.05 / group**0.5 for group in (2, 4, 8, 20) for noise in (0, 40)}
    assert verdicts(measured(**small, bn40drop05_0=-0.1, bn40drop02_0=-0.1)) == ["holds"] * 9
    worse = {f"bn{group}_{noise}": -0.05 / group**0.5 for group in (2, 4, 8, 20, 40) for noise in (0, 40)}
    assert verdicts(measured(**worse, bn40drop05_0=0.05, bn40drop05_40=0.05)) == ["does not hold"] * 9


def test_groups_that_cannot_fit_the_training_rows_have_no_part_in_the_gap():
    cells = measured(bn4_0=0.03, bn8_0=0.01)
    cells[0].numbers["training"][:] = 0.5
    outcome = study.CLAIMS[2].judge(study.summarize(cells))
    assert outcome.verdict == "holds"
    assert outcome.sentence.startswith("Training less test, at rate 0.2 bn 4:")
    where = "of the training rows where labels are as they are"
    assert outcome.sentence.endswith(f"less than 99% {where} have no part in it: bn 2 (50.0 %).")
    outcome = study.CLAIMS[3].judge(study.summarize(measured(gap=0.1)))
    assert outcome == claims.Outcome(outcome.sentence, UNDECIDED)
    assert "no part in it: bn 2 (90.0 %), bn 4 (90.0 %)" in outcome.sentence


def test_only_groups_of_one_rate_tell_how_the_gap_grows():
    """At either rate the gap is the smaller the larger the group, and yet larger at the rate of the larger ones."""
    gap = {"bn2_0": 0.0, "bn4_0": 0.01, "bn8_0": 0.02, "bn20_0": -0.06, "bn40_0": -0.05, "bn200_0": -0.04}
    outcome = study.CLAIMS[2].judge(summary := study.summarize(measured(**gap)))
    assert outcome.verdict == "holds"
    for row in summary["arms"]:
        row["rate"] = 0.4 if row["group"] < 20 else 0.1
    outcome = study.CLAIMS[2].judge(summary)
    assert outcome.verdict == "does not hold"
    shown = "at rate 0.4 bn 2: 19.7, bn 4: 18.7, bn 8: 17.7; at rate 0.1 bn 20: 25.7, bn 40: 24.7, bn 200: 23.7 points"
    assert shown in outcome.sentence
    for row in summary["arms"]:
        row["rate"] = row["group"]
    outcome = study.CLAIMS[2].judge(summary)
    assert (outcome.verdict, outcome.sentence) == (UNDECIDED, "No two groups have the same rate.")


def test_a_sentence_begins_with_the_rates_at_an_edge_of_the_grid_which_decide_nothing_against_their_arms():
    cells = measured(none_0=0.05, bn2_0=0.02)
    assert study.CLAIMS[0].judge(study.summarize(cells)).verdict == "does not hold"
    for name in ("validation", "test"):
        cells[0].numbers[name] = cells[0].numbers[name][:, [1, 0, 2]]
    for claim in (study.CLAIMS[0], study.CLAIMS[2]):
        outcome = claim.judge(study.summarize(cells))
        assert outcome.verdict == UNDECIDED
        assert re.match(r"The best rate is at an edge .* lie outside: bn 2 \(lowest\)\. ", outcome.sentence)


def test_the_best_group_and_share_are_those_of_validation_rows():
    cells = measured(noises=(0.0,), bn2_0=0.01, drop02_0=0.02)
    for cell in cells:
        cell.numbers["test"] = 1 - cell.numbers["test"]
    summary = study.summarize(cells)
    assert claims.best_group(summary, 0.0)["group"] == 2
    assert claims.best_dropout(summary, 0.0, 0)["dropout"] == 0.2
    assert summary["arms"][0]["test"][0] == pytest.approx(0.19)


def test_what_is_at_an_edge_and_what_diverged_is_said():
    cells = measured()
    cells[0].numbers["validation"] = cells[0].numbers["validation"][:, [1, 0, 2]]
    cells[0].numbers["diverged"][0, 0] = True
    notes = " ".join(study.tabulate(study.summarize(cells)).notes)
    assert "a better one may lie outside: bn 2 at 0% (lowest)." in notes
    assert "Seeds that diverged, and count as chance (10%): 1 of bn 2 at 0%." in notes


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_its_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    sheet = study.tabulate(study.summarize(measured()))
    show_sheet(console, type(sheet)(sheet.heading, sheet.rows))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    # Where it is narrow a text breaks between its words.
    assert sum(("80.3 ±0.4" if width == 80 else "80.3") in line for line in lines) == len(sheet.rows)


def test_the_title_of_the_figure_says_what_came_out():
    figure = study.draw(study.summarize(measured(bn2_0=0.05, bn8_40=-0.1, none_40=0.02)))
    title = " ".join(figure.get_suptitle().split())
    assert title == (
        "With clean labels batch norm is 5.0 points better (5.0 to 5.0) than none (errors 14.7 % in groups of 2, none "
        "19.7 %). With 40 % of labels drawn at random batch norm is 2.0 points worse (2.0 to 2.0) than none (errors "
        "19.7 % in groups of 2, none 17.7 %). "
        "Dropout 0.2 in groups of 40: 19.7 and 19.7 %; dropout 0.2 without norm: 19.7 and 19.7 %"
    )
    assert len(figure.axes) == 2
    labels = [
        "ring: best on validation rows",
        "batch norm by groups",
        "no normalization",
        "dropout 0.2, no normalization",
    ]
    labels.append("groups of 40, dropout 0.2")
    labels[2:] = [labels[-1], *labels[2:-1]]
    assert [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()] == labels
    title = study.draw(study.summarize(measured(noises=(0.4,)))).get_suptitle()
    assert title.startswith(
        "With 40\N{NO-BREAK SPACE}% of labels drawn at random batch norm changes less than 1.0 points"
    )


@pytest.mark.parametrize(
    ("by", "edges", "said"),
    [
        (0.02, ("", ""), "batch norm is 2.0 points better (1.5 to 2.5) than none"),
        (-0.02, ("", ""), "batch norm is 2.0 points worse (1.5 to 2.5) than none"),
        (0.008, ("", ""), "batch norm is 0.8 points better (0.3 to 1.3) than none"),
        (0.006, ("", "highest"), "it is undecided whether batch norm helps"),
        (0.004, ("", ""), "batch norm changes less than 1.0 points"),
        (0.004, ("highest", ""), "it is undecided whether batch norm helps"),
    ],
)
def test_the_title_says_by_how_much_it_helps_only_where_that_is_decided(by, edges, said):
    named = list(zip(("bn 8", "none"), edges, strict=True))
    assert study._helps(Interval(by, by - 0.005, by + 0.005), named) == said


def test_the_figure_says_what_overlapping_bars_hide_and_what_they_leave_open():
    cells = measured(none_40=0.004)
    for cell in cells:
        if cell.settings["noise"]:
            cell.numbers["test"] = cell.numbers["test"] + np.linspace(-0.05, 0.05, 4)[:, None]
    note = " ".join(study.draw(study.summarize(cells)).get_supxlabel().split())
    assert "With 40 % of labels drawn at random bars of ring and no normalization overlap, but seed by seed" in note
    assert "the difference is 0.4 (0.4 to 0.4). " in note
    both = (
        r"both with dropout, in accuracy: with clean labels, equal in the mean \(.*\) \(undecided\); "
        r"with 40 % of labels drawn at random, equal in the mean \(.*\) \(undecided\)\."
    )
    assert re.search(both, note)
    for cell in cells:
        if cell.settings["group"] and cell.settings["dropout"]:
            cell.numbers["test"] = cell.numbers["test"] + 0.01
    assert "undecided" not in study.draw(study.summarize(cells)).get_supxlabel()


def test_dropout_keeps_the_mean_and_drops_others_at_each_step():
    norm = study.Dropout(Bias(), 0.25)
    params, state = norm.init(50, np.random.default_rng(0))
    x = jnp.ones((200, 50))
    first, kept = norm(params, state, x, True, jnp.int32(0))
    second, _ = norm(params, kept, x, True, jnp.int32(1))
    np.testing.assert_allclose(np.unique(first), [0, 4 / 3], rtol=1e-6)
    # Of 10 000 numbers; five standard deviations of their share.
    assert abs((np.asarray(first) == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / 10000) ** 0.5
    assert (first != second).any()
    np.testing.assert_array_equal(norm(params, state, x, False, jnp.int32(0))[0], x)


def test_layers_and_seeds_drop_different_features():
    states = [Dense(study.WIDTHS, study.norm_of(study.Arm(0, 0.5))).init(seed)[1] for seed in (0, 1)]
    keys = {tuple(key.tolist()) for of_seed in states for _, key in of_seed}
    assert len(keys) == 4


def test_arms_begin_alike():
    kernels = [
        Dense(study.WIDTHS, study.norm_of(arm)).init(3)[0]["kernels"] for arm in (study.Arm(2, 0), study.Arm(0, 0.5))
    ]
    for one, other in zip(*kernels, strict=True):
        np.testing.assert_array_equal(one, other)
