import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jbn.lab import train as trainer
from jbn.lab.batches import Batches
from jbn.lab.checkpoints import Checkpoints, set_aside
from jbn.lab.commands import app
from jbn.lab.data import Held, Images
from jbn.lab.devices import mesh_of
from jbn.lab.metrics import Metrics
from jbn.lab.models import ConvNetwork
from jbn.lab.recipe import State, initial, update
from jbn.lab.run_directory import FileError, OptionError
from tests import oracle
from tests.test_train import RECIPE, SHAPE, assert_same_bits, begun, by_name, dense_judged, one_batch, random_data
from tests.test_train import replace as changed

STEPS = 18
WHOLE = {"--model": "dense", "--epochs": 2, "--devices": 1, "--ema": 0.9, "--save-every": 5, "--keep": 10}
SMALL = changed(RECIPE, network=ConvNetwork(batch_norm=True), ema=0.5)


def train(out, arguments=()):
    """Run `jbn train` in this process, which has eight devices."""
    jax.devices()
    return CliRunner().invoke(app, ["train", "--out", str(out), *map(str, arguments)], prog_name="jbn")


def options(**changes):
    return [part for option in (WHOLE | changes).items() for part in option]


def shapes(recipe, shape=SHAPE):
    return jax.eval_shape(lambda: initial(recipe, shape))


def restored(checkpoints, recipe=SMALL, devices=1, shape=SHAPE):
    with Checkpoints(checkpoints, 10) as kept:
        return kept.restore(shapes(recipe, shape), mesh_of(devices))


def end_of(out):
    recipe = changed(RECIPE, ema=0.9)
    state = restored(out / "checkpoints", recipe)
    assert int(state.step) == STEPS
    return state


def saved(path, states, keep=10):
    with Checkpoints(path, keep) as checkpoints:
        for state in states:
            checkpoints.save(state)
        checkpoints.finish()
    return path


def steps_of(path):
    return sorted(int(folder.name) for folder in path.iterdir())


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def stopping(monkeypatch, step):
    """Let a run be sent SIGTERM in a step; it learns of it with the step after the next, whose batch is read later."""
    monkeypatch.setattr(
        trainer,
        "update",
        lambda recipe, state, batch: (
            signal.raise_signal(signal.SIGTERM) if int(state.step) == step else None,
            update(recipe, state, batch),
        )[1],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(out, options())
    assert result.exit_code == 0, result.output
    assert steps_of(out / "checkpoints") == [5, 10, 15, 18]
    return out


@pytest.fixture(scope="module")
def states():
    """Three states, one step apart."""
    states, batch = [begun(SMALL)], one_batch(random_data(16))
    for _ in range(2):
        states.append(update(SMALL, jax.tree.map(jnp.copy, states[-1]), batch)[0])
    return states


# Writes that TensorStore ends after Orbax has given up find its event loop closed, in threads of their own.
late_ends = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def damages(content):
    yield content[: len(content) // 2]
    yield b""
    for place in {len(content) // 2, len(content) - 1}:
        yield content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


def outcome(folder):
    """Return what is restored, or why nothing is."""
    try:
        return restored(folder)
    except OptionError as error:
        return error


def test_a_damaged_checkpoint_is_refused_or_read_exactly(tmp_path, states):
    folder = saved(tmp_path / "checkpoints", states[:2])
    files = [path for path in (folder / "1").rglob("*") if path.is_file()]
    assert len(files) > 10
    refused = 0
    for path in files:
        content = path.read_bytes()
        for damaged in damages(content) if content else ():
            path.write_bytes(damaged)
            read = outcome(folder)
            if isinstance(read, State):
                assert_same_bits(read, states[1])
            else:
                refused += 1
                assert read.option == "--resume"
                assert f"'{folder / '1'}' cannot be used (" in str(read)
                assert str(read).endswith("; go on from the one before it with --resume --at 0")
                assert "\n" not in str(read)
            path.write_bytes(content)
    assert refused > 10
    assert_same_bits(restored(folder), states[1])


def test_the_only_checkpoint_has_none_before_it(tmp_path, states):
    folder = saved(tmp_path / "checkpoints", states[:1])
    shutil.rmtree(folder / "0" / "state")
    with pytest.raises(OptionError, match="no other is before it"):
        restored(folder)


@pytest.mark.parametrize(
    ("recipe", "shape", "message"),
    [
        (changed(SMALL, ema=0.0), SHAPE, "['average']['batch_stats']"),
        (changed(RECIPE, ema=0.5), SHAPE, "['BatchNorm_0']['mean'] is float32 [32]; this run expects float32 [128]"),
        (SMALL, (8, 10, 1), "['Dense_0']['kernel'] is float32 [2048, 10]; this run expects float32 [2560, 10]"),
        (changed(SMALL, network=ConvNetwork(batch_norm=True, classes=7)), SHAPE, "float32 [7]"),
        (changed(SMALL, optimizer="adamw"), SHAPE, "this run expects"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, states, recipe, shape, message):
    folder = saved(tmp_path / "checkpoints", states[:2])
    with pytest.raises(OptionError) as caught:
        restored(folder, recipe, shape=shape)
    assert f"'{folder / '1'}' cannot be used" in str(caught.value)
    assert message in str(caught.value)


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path, states):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), states[1].params)
    folder = saved(tmp_path / "checkpoints", [states[0], states[1]._replace(params=params)])
    with pytest.raises(OptionError, match=r"is bfloat16 \[32\]; this run expects float32 \[32\]\); go on from"):
        restored(folder)


@pytest.mark.parametrize("inside", ["", "notes.txt", "state/notes.txt"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, states, inside):
    folder = saved(tmp_path / "checkpoints", states[:2])
    other = folder / "7" / inside
    (other.parent if inside else other).mkdir(parents=True)
    if inside:
        other.write_text("x")
    with pytest.raises(OptionError) as caught:
        restored(folder)
    assert f"'{folder / '7'}' cannot be used" in str(caught.value)
    assert "--resume --at 1" in str(caught.value)


def test_the_last_are_kept(tmp_path, states):
    assert steps_of(saved(tmp_path / "checkpoints", states, keep=2)) == [1, 2]


def test_what_was_saved_is_the_state_of_then(tmp_path, states):
    with Checkpoints(tmp_path / "checkpoints", 3) as checkpoints:
        state, batch = jax.tree.map(jnp.copy, states[1]), one_batch(random_data(16))
        checkpoints.save(state)
        for _ in range(20):
            state, _ = update(SMALL, state, batch)
        checkpoints.finish()
    assert_same_bits(restored(tmp_path / "checkpoints"), states[1])


@late_ends
def test_what_was_written_outlives_a_write_that_fails(tmp_path, states):
    folder = saved(tmp_path / "checkpoints", states[:1])
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(folder, 3) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            with pytest.raises(FileError) as caught:
                (checkpoints.save(states[1]), checkpoints.finish())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"cannot write '{folder}")
    assert str(caught.value).endswith("(File too large)")
    assert {path: content for path, content in contents(folder).items() if path.parts[0] == "0"} == before
    assert_same_bits(restored(folder), states[0])


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 4)])
def test_a_state_goes_on_on_other_devices(tmp_path, before, after):
    data = random_data(16)
    state, _ = update(SMALL, begun(SMALL, before), one_batch(data, before))
    arrived = restored(saved(tmp_path / "checkpoints", [state]), devices=after)
    assert_same_bits(arrived, state)
    for leaf in jax.tree.leaves(arrived):
        assert len(leaf.sharding.device_set) == after
        assert leaf.sharding.is_fully_replicated
    ends = [
        by_name(update(SMALL, start, one_batch(data, devices))[0].params)
        for start, devices in ((state, before), (arrived, after))
    ]
    for name, array in ends[0].items():
        # Of a bias and of a scale, 16 x 64 values.
        atol = oracle.tolerance("float32", 16 * 64, np.abs(array).max())
        np.testing.assert_allclose(ends[1][name], array, rtol=0, atol=atol, err_msg=name)


def test_a_damaged_run_goes_on_from_the_checkpoint_that_is_offered(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    folder, aside = out / "checkpoints", out / "checkpoints-set-aside"
    (folder / "18" / "contents" / "metadata").write_text("")
    later = [contents(folder / step) for step in ("15", "18")]
    result = train(out, ["--resume", "--devices", 1])
    assert result.exit_code == 2
    assert result.output.strip().splitlines()[-1].endswith("; go on from the one before it with --resume --at 15")
    assert steps_of(folder) == [5, 10, 15, 18]

    for wrong in (7, 19):
        result = train(out, ["--resume", "--devices", 1, "--at", wrong])
        assert result.exit_code == 2
        line = result.output.strip().splitlines()[-1]
        assert line.endswith(f"'--at': got {wrong}, but '{folder}' holds 5, 10, 15, 18")
        assert steps_of(folder) == [5, 10, 15, 18]
        assert not aside.exists()

    result = train(out, ["--resume", "--devices", 1, "--at", 10, "--keep", 10, "--save-every", 5])
    assert result.exit_code == 0, result.output
    assert f"Moved a later checkpoint to {aside / '18'}" in result.output
    assert [contents(aside / step) for step in ("15", "18")] == later
    assert steps_of(folder) == [5, 10, 15, 18]
    assert_same_bits(end_of(out), end_of(whole))
    assert lines_of(out) == lines_of(whole)
    results = [json.loads((path / "results.json").read_text()) for path in (out, whole)]
    assert len({json.dumps(content | {"median_step_ms": 0}) for content in results}) == 1

    set_aside(folder, 5)  # a second time
    assert sorted(path.name for path in aside.iterdir()) == ["10", "15", "15.1", "18", "18.1"]


def test_a_stopped_run_records_every_step_once(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        stopping(patch, 6)
        result = train(out, options())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    (stopped,) = set(steps_of(out / "checkpoints")) - {5}
    assert stopped in (7, 8)
    assert f"jbn: stopped by SIGTERM after step {stopped} of 18, which is saved. Go on with:" in result.output
    assert [line["step"] for line in lines_of(out)] == list(range(1, stopped + 1))
    with (out / "metrics.jsonl").open("a") as file:  # of a run that was killed later
        file.write(json.dumps({"step": stopped + 1, "loss": 0.0}) + '\n{"step": 9, "lo')
    result = train(out, ["--resume", "--devices", 1, "--keep", 10, "--save-every", 5])
    assert result.exit_code == 0, result.output
    assert_same_bits(end_of(out), end_of(whole))
    assert lines_of(out) == lines_of(whole)


def test_a_run_goes_on_on_fewer_devices(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping(patch, 6)
        assert train(out, options(**{"--devices": 3})).exit_code == 143
    result = train(out, ["--resume", "--devices", 1])
    assert result.exit_code == 0, result.output
    assert "Going on with" in result.output
    assert "after 18 steps of 128 images on one device" in result.output
    assert int(end_of(out).step) == STEPS


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
        (["--seed", 4], "'--seed': got 4, but the run in '{out}' was started with 0"),
        (["--epochs", 3], "'--epochs': got 3, but the run in '{out}' was started with 2"),
        (["--batch-size", 64], "'--batch-size': got 64, but the run in '{out}' was started with 128"),
        (
            ["--learning-rate", 0.2],
            "'--learning-rate': got 0.2, but the run in '{out}' was started with the default, 0.05",
        ),
        (["--model", "conv"], "'--model': got conv, but the run in '{out}' was started with dense"),
        (["--augment", "flip"], "'--augment': got flip, but the run in '{out}' was started with "),
        (["--ema", 0], "'--ema': got 0.0, but the run in '{out}' was started with 0.9"),
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


def folder(path, *parts):
    path.mkdir()
    for number, part in enumerate(parts):
        np.savez(path / f"part-{number}.npz", images=part.images, labels=part.labels)
    return path


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
        (["--data", "nowhere"], "--data", "'nowhere'", "expected a folder of .npz files"),
        (["--validation", "nowhere"], "--validation", "without --data", "expected both"),
        (["--epochs", "0"], "--epochs", "'0'", "from 1 to 100000"),
        (["--epochs", "2.5"], "--epochs", "'2.5'", "a whole number"),
        (["--batch-size", "1"], "--batch-size", "'1'", "from 2"),
        (["--optimizer", "lamb"], "--optimizer", "'lamb'", "expected sgd or adamw"),
        (["--learning-rate", "0"], "--learning-rate", "'0'", "greater than 0"),
        (["--learning-rate", "nan"], "--learning-rate", "'nan'", "greater than 0"),
        (["--schedule", "step"], "--schedule", "'step'", "expected cosine or constant"),
        (["--warmup-epochs", "-1"], "--warmup-epochs", "'-1'", "from 0 on"),
        (["--weight-decay", "inf"], "--weight-decay", "'inf'", "from 0 on"),
        (["--augment", "rotate"], "--augment", "'rotate'", "expected shift or flip"),
        (["--ema", "1"], "--ema", "'1'", "from 0 to below 1"),
        (["--dtype", "float16"], "--dtype", "'float16'", "expected float32 or bfloat16"),
        (["--seed", "-1"], "--seed", "'-1'", "from 0"),
        (["--devices", "0"], "--devices", "'0'", "from 1 to 64"),
        (["--devices", "9"], "--devices", "got 9", "JAX finds 8 cpu devices here; expected at most 8"),
        (["--save-every", "0"], "--save-every", "'0'", "from 1"),
        (["--keep", "0"], "--keep", "'0'", "from 1 to 1000"),
        (["--timeout", "1"], "--timeout", "'1'", "from 5 to 3600"),
        (["--at", "5"], "--at", "got 5", "expected --resume beside it"),
        (["--coordinator", "localhost:1"], "--num-processes", "is missing", "--process-id together, or --cluster"),
        (["--process-id", "0", "--num-processes", "2"], "--coordinator", "is missing", "together, or --cluster"),
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
