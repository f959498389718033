"""How `jbn evaluate` judges what a run has saved."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab import evaluation
from jbn.lab.data.images import Images
from jbn.lab.data.parts import parts_of
from jbn.lab.demo import plan_of
from jbn.lab.devices import mesh_of
from jbn.lab.evaluation import Evaluated, Judged, evaluate_run
from jbn.lab.options import DemoOptions, EvaluateOptions, TrainOptions, TrainPlace
from jbn.lab.report import show
from jbn.lab.run.directory import read_options
from jbn.lab.run.saved import find_saved
from jbn.lab.train import train as train_network
from tests.lab.test_diagnose_command import first, refused, saved
from tests.lab.test_train import dense_judged, random_data
from tests.support import oracle
from tests.support.runs import contents, folder, options, train


def evaluate(*arguments):
    """Run `jbn evaluate` in this process."""
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], prog_name="jbn")


def judged(path, **more):
    return evaluate_run(EvaluateOptions(path, **more))


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=oracle.tolerance("float32", 128))


def test_it_says_what_the_run_said_of_its_end(whole):
    results = json.loads((whole / "results.json").read_text())
    found = judged(whole)
    running, _, average = found.judged
    for name, each in (("validation", running), ("average", average)):
        assert (each.answers == found.labels).mean() == results[f"{name}_accuracy"]
        close(each.loss, results[f"{name}_loss"])
    result = evaluate(whole)
    assert result.exit_code == 0, result.output
    assert first(result) == f"dense in '{whole}' after step 18, 360 images of its validation"
    assert f"{results['validation_accuracy']:.1%}" in result.output
    assert f"{results['average_accuracy']:.1%}" in result.output


def test_each_image_is_judged_by_the_statistics_that_are_named(whole):
    found = judged(whole, batch_size=360)
    running, batch, _ = found.judged
    kept = find_saved(whole)
    parts = kept.data(validation=True)
    _, state = kept.read(mesh_of(1))
    data = parts.validation.rows(np.arange(360))
    losses, right = dense_judged(state.params, state.batch_stats, data)
    np.testing.assert_allclose(running.losses, losses, rtol=1e-4, atol=oracle.tolerance("float32", 128))
    assert ((running.answers == data.labels) == right).all()
    stats, x = {}, oracle.wide(data.images).reshape(360, -1)
    for layer in range(2):  # the oracle by the statistics of these images, layer by layer
        x = x @ oracle.wide(state.params[f"Dense_{layer}"]["kernel"])
        stats[f"BatchNorm_{layer}"] = {"mean": x.mean(0), "var": x.var(0)}
        norm = state.params[f"BatchNorm_{layer}"]
        own = x.mean(0), x.var(0)
        x = oracle.forward(x, norm["scale"], norm["bias"], stats=own, activation=jax.nn.relu).y
    losses, right = dense_judged(state.params, stats, data)
    np.testing.assert_allclose(batch.losses, losses, rtol=1e-4, atol=oracle.tolerance("float32", 128))
    assert batch.by == "statistics of batches of 360"
    assert not np.allclose(batch.losses, running.losses, rtol=1e-2)


@pytest.mark.parametrize("batch_size", [7, 100, 1000])
def test_the_running_statistics_judge_alike_whatever_is_judged_at_once(whole, batch_size):
    expected, found = (judged(whole, batch_size=size).judged[0] for size in (360, batch_size))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4, atol=oracle.tolerance("float32", 128))


def test_batches_are_of_one_size_and_of_many_classes(whole, tmp_path, monkeypatch):
    """Those of a folder in the order of its classes would be of one class each, as none was in training."""
    shares = []
    kept = evaluation._judge
    monkeypatch.setattr(evaluation, "_judge", lambda *args: (shares.extend(args[-1]), kept(*args))[1])
    data = random_data(180)
    in_order = folder(tmp_path / "in-order", Images(data.images, np.sort(data.labels)))
    labels = judged(whole, data=in_order, batch_size=50).labels
    assert {len(rows) for rows in shares} == {45}
    assert min(len(set(labels[rows])) for rows in shares) > 5


def test_other_images_than_those_of_the_run(tmp_path):
    """Also of a run that has no validation data."""
    data, other = random_data(64), random_data(41)
    where, sorted_ = folder(tmp_path / "data", data), np.argsort(other.labels)
    out = tmp_path / "run"
    assert train(out, options(**{"--data": where, "--epochs": 1})).exit_code == 0
    refused(evaluate(out), "'--data'", f"the run in '{out}' was started without --validation; expected a folder")
    shuffled = folder(tmp_path / "shuffled", other)
    in_order = folder(tmp_path / "in-order", Images(other.images[sorted_], other.labels[sorted_]))
    found = [judged(out, data=path) for path in (shuffled, in_order)]
    np.testing.assert_allclose(found[0].judged[0].losses[sorted_], found[1].judged[0].losses, rtol=1e-5)
    assert f"after step 1, 41 images in '{shuffled}'" in found[0].title


def test_other_images_need_no_data_of_the_training(tmp_path):
    data, other = (folder(tmp_path / name, random_data(number)) for name, number in (("data", 64), ("other", 41)))
    out = tmp_path / "run"
    assert train(out, options(**{"--data": data, "--validation": other, "--epochs": 1})).exit_code == 0
    expected = [judged(out, data=path) for path in (str(other), "digits")]
    assert expected[1].title.endswith("after step 1, 360 images of the test of digits")
    assert (expected[1].labels == parts_of(TrainOptions()).test.labels).all()
    shutil.rmtree(data)
    for before, path in zip(expected, (str(other), "digits"), strict=True):
        for each, same in zip(judged(out, data=path).judged, before.judged, strict=True):
            assert (each.losses == same.losses).all()
    refused(evaluate(out), "cannot use the data of the run", "--data names others to evaluate on")
    refused(evaluate(out, "--data", "mnist"), "'--data'", "mnist holds images of 28 x 28 x 1; expected 8 x 8 x 1")
    floats = folder(tmp_path / "floats", random_data(9))
    np.savez(floats / "part-0.npz", images=np.zeros((9, 8, 8, 1), np.uint8), labels=random_data(9).labels)
    refused(evaluate(out, "--data", floats), "holds uint8 images, the training data float")


def test_a_run_of_an_earlier_version_asks_its_data_for_their_form(whole, tmp_path):
    copied = shutil.copytree(whole, tmp_path / "run")
    text = json.loads((copied / "options.json").read_text())
    assert (text.pop("image_shape"), text.pop("classes"), text.pop("kind")) == ([8, 8, 1], 10, "")
    (copied / "options.json").write_text(json.dumps(text))
    found, expected = (judged(path).judged[0].losses for path in (copied, whole))
    assert (found == expected).all()


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (random_data(8, shape=(8, 9, 1)), "holds images of 8 x 9 x 1; expected 8 x 8 x 1, as in the training data"),
        (
            random_data(8)._replace(labels=np.full(8, 12)),
            "the label 12; expected at most 9, the largest in the training",
        ),
    ],
)
def test_images_that_do_not_fit_the_network(whole, part, expected, tmp_path):
    refused(evaluate(whole, "--data", folder(tmp_path / "other", part)), "'--data'", expected)


def test_nothing_is_written_into_the_run(whole):
    before, times = contents(whole), {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    time.sleep(0.01)
    assert "after step 10," in first(evaluate(whole / "checkpoints" / "10"))
    assert contents(whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times


def test_a_loss_that_is_not_finite_is_a_status_of_its_own(tmp_path):
    bad = random_data(40)
    bad.images[3] = np.nan
    out = saved(tmp_path / "run")
    result = evaluate(out, "--data", folder(tmp_path / "bad", bad))
    assert result.exit_code == 1, result.output
    assert "inf/NaN" in result.output


def test_a_network_without_batch_norm_has_no_statistics_of_batches(tmp_path):
    plan, quiet = plan_of(DemoOptions(steps=3), "dense", batch_norm=False), Console(quiet=True)
    train_network(plan, TrainPlace(out=tmp_path / "run", devices=1), quiet)
    assert [each.by for each in judged(tmp_path / "run").judged] == ["no statistics"]


def table(made, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        show(console, made)
    return capture.get()


def found_of(labels, answers):
    return Evaluated("", np.array(labels), (Judged("", np.zeros(len(labels), np.float32), np.array(answers)),))


def test_a_class_is_shown_with_what_it_is_taken_for():
    found = found_of([0] * 4 + [2] * 7, [0, 0, 1, 2, 2, 0, 0, 1, 1, 1, 3])
    for width in (40, 60, 80):
        text = table(evaluation.table_of_classes(found), width)
        assert [" ".join(line.split()) for line in text.splitlines()[2:4]] == [
            "0 4 50.0% 1 (1), 2 (1)",
            "2 7 14.3% 1 (3), 0 (2), 3 (1)",
        ]


def test_of_many_classes_the_worst_are_shown():
    labels = np.repeat(np.arange(50), 10)
    answers = np.where(np.arange(500) % 10 < labels // 5, 0, labels)  # the later, the more often wrong
    text = table(evaluation.table_of_classes(found_of(labels, answers)), 80)
    shown = [int(line.split()[0]) for line in text.splitlines()[2:] if line.split()[0].isdigit()]
    assert set(shown) == set(range(30, 50))
    assert "the worst 20 of 50 classes" in " ".join(text.split())


def test_what_cannot_be_evaluated(whole, tmp_path):
    refused(evaluate(tmp_path), "'CHECKPOINT'", f"no run of jbn train in '{tmp_path}'")
    refused(evaluate(whole / "checkpoints" / "7"), "no checkpoint of step 7", "saved are those of steps 5, 10, 15, 18")
    refused(evaluate(whole, "--batch-size", 1), "--batch-size", "got '1'", "from 2")
    copied = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(copied / "checkpoints" / "18" / "state")
    refused(evaluate(copied), f"the checkpoint '{copied / 'checkpoints' / '18'}' cannot be used (")
    text = json.loads((copied / "options.json").read_text())
    (copied / "options.json").write_text(json.dumps(text | {"seed": 1}))  # other images would be the validation's
    refused(evaluate(copied), "cannot use the data of the run", "not what they were when it began")
    assert parts_of(read_options(copied, TrainOptions)).fingerprint != text["fingerprint"]
