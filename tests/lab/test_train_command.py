import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from jbn.lab import step
from jbn.lab.data.batches import Batches
from jbn.lab.data.images import Held, Images
from jbn.lab.devices import mesh_of
from jbn.lab.errors import FileError
from jbn.lab.run.metrics import Metrics
from tests.lab.test_train import RECIPE, changed, dense_judged, random_data
from tests.support import oracle
from tests.support.runs import (
    STEPS,
    contents,
    folder,
    lines_of,
    options,
    restored,
    train,
)


def test_a_line_for_each_step_and_evaluation(whole):
    lines = lines_of(whole)
    of_steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in of_steps] == list(range(1, STEPS + 1))
    assert all(line.keys() == {"step", "loss", "accuracy", "gradient_norm", "learning_rate"} for line in of_steps)
    names = {f"{name}_{what}" for name in ("validation", "average") for what in ("loss", "accuracy")}
    assert [(line["step"], line.keys()) for line in lines if line not in of_steps] == [
        (step, {"step", *names}) for step in (9, 18)
    ]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert [path.name.split(".")[2] for path in (whole / "tensorboard").iterdir()] == ["tfevents"]
    results = json.loads((whole / "results.json").read_text())
    assert {name: results[name] for name in names} == {name: lines[-1][name] for name in names}


def test_metrics_without_tensorboard_and_without_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(1, loss=float("nan"), norm=float("inf"), rate=0.5)
    assert lines_of(tmp_path) == [{"step": 1, "loss": None, "norm": None, "rate": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with Metrics(None, 0) as metrics:
        metrics.write(1, loss=1.0)


def test_of_a_record_what_can_be_read_is_kept_and_what_is_missing_is_known(tmp_path):
    whole = [{"step": step, "loss": 1.0} for step in (1, 2, 4)] + [{"step": 4, "validation_loss": 2.0}]
    odd = ["1", "[]", "null", "{}", '{"step": "x"}', "\xff\0", '{"step": 5, "lo']
    copied = [*whole[2:], *whole]  # as by a copy that was put before the rest
    text = "\n".join(map(json.dumps, copied)) + "\n" + "\n".join(odd)
    for done, lost in ((0, ""), (2, ""), (4, "step 3"), (6, "3 of the steps 3 to 6")):
        (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
        with Metrics(tmp_path, done) as metrics:
            assert metrics.lost == lost
        assert lines_of(tmp_path) == [line for line in whole if line["step"] <= done]


def test_a_file_in_the_place_of_tensorboard_is_said(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(FileError, match=f"cannot write '{tmp_path / 'tensorboard'}'"):
        Metrics(tmp_path, 0)


@pytest.mark.parametrize("devices", [1, 3])
def test_results_of_a_folder_are_those_of_its_images(tmp_path, devices):
    training = folder(tmp_path / "data", random_data(50), random_data(41))
    watched = random_data(37), random_data(8)
    validation = folder(tmp_path / "validation", *watched)
    given = {"--data": training, "--validation": validation, "--batch-size": 16, "--devices": devices}
    out = tmp_path / "run"
    result = train(out, options(**given))
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert results["images"] == {"training": 91, "validation": 45}
    assert (results["steps"], results["devices"]) == (12, devices)
    state = restored(out / "checkpoints", changed(RECIPE, ema=0.9))
    data = Images(*map(np.concatenate, zip(*watched, strict=True)))
    averages = {"validation": (state.params, state.batch_stats), "average": tuple(state.average.values())}
    for name, (params, stats) in averages.items():
        stats, params = (params, stats) if "Dense_0" in stats else (stats, params)
        losses, right = dense_judged(params, stats, data)
        rtol = oracle.tolerance("float32", 128)
        np.testing.assert_allclose(results[f"{name}_loss"], losses.mean(), rtol=rtol)
        assert results[f"{name}_accuracy"] == right.mean()


def test_validation_that_is_not_finite_is_null(tmp_path):
    bad = random_data(8)
    bad.images[3] = np.nan
    given = {"--data": folder(tmp_path / "data", random_data(30)), "--validation": folder(tmp_path / "v", bad)}
    result = train(tmp_path / "run", options(**given))
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation_loss"] is None
    assert results["average_loss"] is None


def test_a_run_may_be_all_warmup(tmp_path):
    result = train(tmp_path / "run", options(**{"--epochs": 1}))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", 4], "'--seed': got '4', but the run in '{out}' was started with '0'"),
        (["--epochs", 3], "'--epochs': got '3', but the run in '{out}' was started with '2'"),
        (["--batch-size", 64], "'--batch-size': got '64', but the run in '{out}' was started with '128'"),
        (
            ["--learning-rate", 0.2],
            "'--learning-rate': got '0.2', but the run in '{out}' was started with the default, 0.05",
        ),
        (["--model", "conv"], "'--model': got 'conv', but the run in '{out}' was started with 'dense'"),
        (["--augment", "flip"], "'--augment': got 'flip', but the run in '{out}' was started with 'none'"),
        (["--ema", 0], "'--ema': got '0', but the run in '{out}' was started with '0.9'"),
    ],
)
def test_resume_with_another_option_names_both_values(whole, arguments, message):
    before = contents(whole)
    result = train(whole, ["--resume", "--devices", 1, *arguments])
    assert result.exit_code == 2
    assert message.format(out=whole) in result.output
    assert contents(whole) == before


def test_a_run_is_never_overwritten(whole):
    before = contents(whole)
    result = train(whole, ["--devices", 1])
    assert result.exit_code == 2
    assert f"'{whole}' already holds a run" in result.output
    assert contents(whole) == before


def test_data_that_changed_are_refused(tmp_path):
    parts = random_data(30), random_data(34)
    where, out = folder(tmp_path / "data", *parts), tmp_path / "run"
    given = options(**{"--data": where, "--batch-size": 16})
    assert train(out, given).exit_code == 0
    assert train(out, ["--resume", "--devices", 1]).exit_code == 0
    np.savez(where / "part-1.npz", images=parts[1].images, labels=parts[1].labels[::-1])
    result = train(out, ["--resume", "--devices", 1])
    assert result.exit_code == 2
    assert f"'--data': is not what it was when the run in '{out}' began; expected the same files" in result.output


def test_an_image_that_is_not_finite_ends_the_run_and_is_named(tmp_path):
    parts = random_data(30), random_data(34)
    parts[1].images[17, 0, 0] = np.inf
    where = folder(tmp_path / "data", *parts)
    out = tmp_path / "run"
    result = train(out, options(**{"--data": where, "--batch-size": 8, "--save-every": 1}))
    batches = Batches(Held("", Images(*map(np.concatenate, zip(*parts, strict=True)))), 8, mesh_of(1))
    step = next(step for step in range(8) if 47 in batches.rows(step, 0))
    assert step > 0
    assert result.exit_code == 1, result.output
    message = result.output.strip().splitlines()[-1]
    assert message == (
        f"jbn: loss nan at step {step + 1}: {where / 'part-1.npz'}, image 17 has values that are not finite; "
        f"the last good checkpoint is that of step {step}. Mend the data, in another --out."
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_its_layer_is_named(tmp_path):
    result = train(tmp_path / "run", options(**{"--learning-rate": 1e38, "--warmup-epochs": 0, "--save-every": 1}))
    assert result.exit_code == 1, result.output
    message = result.output.strip().splitlines()[-1]
    for part in (
        "jbn: loss nan at step 2: the first statistics that are not finite are those of BatchNorm_0",
        "the last good checkpoint is that of step 1",
        "Try a smaller --learning-rate",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "option", "arrived", "expected"),
    [
        (["--model", "vgg"], "--model", "'vgg'", "expected dense, conv or resnet"),
        (["--model", "resnt"], "--model", "got 'resnt'", "expected dense, conv or resnet; did you mean resnet?"),
        (["--data", "nowhere"], "--data", "'nowhere'", "expected a folder of .npz files"),
        (["--data", "mnis"], "--data", "got 'mnis'", "did you mean mnist?"),
        (
            ["--validation", "nowhere"],
            "--validation",
            "beside --data digits",
            "expected --data DIR, or no --validation",
        ),
        (["--epochs", "0"], "--epochs", "'0'", "from 1 to 100000"),
        (["--epochs", "2.5"], "--epochs", "'2.5'", "a whole number"),
        (["--batch-size", "1"], "--batch-size", "'1'", "from 2"),
        (["--optimizer", "lamb"], "--optimizer", "'lamb'", "expected sgd or adamw"),
        (["--learning-rate", "0"], "--learning-rate", "'0'", "greater than 0"),
        (["--learning-rate", "nan"], "--learning-rate", "'nan'", "greater than 0"),
        (["--learning-rate", "1e39"], "--learning-rate", "'1e39'", "greater than 0 that float32 has"),
        (["--learning-rate", "1e-46"], "--learning-rate", "'1e-46'", "greater than 0 that float32 has"),
        (["--weight-decay", "1e39"], "--weight-decay", "'1e39'", "from 0 on that float32 has"),
        (["--warmup-epochs", "1e300"], "--warmup-epochs", "'1e300'", "from 0 on, up to 100000"),
        (["--schedule", "step"], "--schedule", "'step'", "expected cosine or constant"),
        (["--warmup-epochs", "-1"], "--warmup-epochs", "'-1'", "from 0 on"),
        (["--weight-decay", "inf"], "--weight-decay", "'inf'", "from 0 on"),
        (["--augment", "rotate"], "--augment", "'rotate'", "expected shift or flip"),
        (["--ema", "1"], "--ema", "'1'", "from 0 to below 1"),
        (["--dtype", "float16"], "--dtype", "'float16'", "expected float32 or bfloat16"),
        (["--seed", "-1"], "--seed", "'-1'", "from 0"),
        (["--devices", "0"], "--devices", "'0'", "from 1 to 64"),
        (["--devices", "9"], "--devices", "got '9'", "JAX finds 8 devices (cpu) here; expected at most 8"),
        (["--save-every", "0"], "--save-every", "'0'", "from 1"),
        (["--keep", "0"], "--keep", "'0'", "from 1 to 1000"),
        (["--timeout", "1"], "--timeout", "'1'", "from 5 to 3600"),
        (["--at", "5"], "--at", "got '5'", "expected --resume beside it"),
        (["--coordinator", "localhost:1"], "--num-processes", "is missing", "--process-id together, or --cluster"),
        (["--process-id", "0", "--num-processes", "2"], "--coordinator", "is missing", "together, or --cluster"),
        (["--coordinator", "host"], "--coordinator", "'host'", "such as HOST:8476"),
        (["--coordinator", "::1:80"], "--coordinator", "'::1:80'", "such as HOST:8476"),
        (["--coordinator", "host:65536"], "--coordinator", "'host:65536'", "with a port from 1 to 65535"),
        (["--coordinator", "host:0"], "--coordinator", "'host:0'", "with a port from 1 to 65535"),
        (
            ["--coordinator", "localhost:1", "--num-processes", 2, "--process-id", 2],
            "--process-id",
            "got '2'",
            "expected less than --num-processes 2: the first is 0",
        ),
        (["--data", ""], "--data", "''", "expected a name"),
        (["--out", ""], "--out", "''", "expected a name"),
        (["--out", "of latin-1 \udce9"], "--out", "of latin-1", "in UTF-8"),
        (["--out", "x" * 300], "--out", "cannot write", "File name too long"),
        (["--out", os.devnull], "--out", os.devnull, "expected a directory"),
        (["--out", Path(os.devnull) / "x"], "--out", os.devnull, "cannot write"),
        (["--resume"], "--out", "no run in", "expected the --out of an earlier run"),
        (["--epoch", "3"], "--epoch", "--epoch", "--epochs"),
    ],
)
def test_wrong_values_are_one_clear_line_and_leave_nothing_behind(tmp_path, arguments, option, arrived, expected):
    out = tmp_path / "run"
    result = train(out, arguments)
    assert result.exit_code == 2, result.output
    line = result.output.rstrip().splitlines()[-1]
    assert option in line
    assert arrived in line
    assert expected in line
    assert not out.exists()


@pytest.mark.parametrize("option", ["--epochs", "--warmup-epochs"])
def test_more_steps_than_are_counted_are_refused(tmp_path, monkeypatch, option):
    monkeypatch.setattr(step, "MOST_STEPS", 1000)
    result = train(tmp_path / "run", options(**{option: 200}))
    assert result.exit_code == 2
    assert f"'{option}': makes 1800 steps of these data; expected 1000 or fewer" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 8, 9))}, "holds images of 8 x 9 x 1; expected 8 x 8 x 1, as in --data"),
        ({"labels": np.full(4, 12)}, "has the label 12; expected at most 9, the largest in --data"),
    ],
)
def test_validation_data_are_those_of_the_training_data(tmp_path, changes, message):
    where = folder(tmp_path / "data", random_data(40))
    watched = folder(tmp_path / "watched", random_data(4)._replace(**changes))
    result = train(tmp_path / "run", options(**{"--data": where, "--validation": watched}))
    assert result.exit_code == 2
    assert f"'--validation': '{watched}' {message}" in result.output
    assert not (tmp_path / "run").exists()
