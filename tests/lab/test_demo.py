import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jbn
from jbn.lab import run_directory, training
from jbn.lab.commands import app
from jbn.lab.data import batch, digits, enlarged
from jbn.lab.demo import resume_command
from jbn.lab.models import MODELS
from jbn.lab.report import add_bar, progress_bars, show_step
from jbn.lab.training import TrainState, evaluate, evaluation_steps, initial_state, train_step

STEPS = 110
CONV = ("--model", "conv", "--steps", str(STEPS), "--batch-size", "64", "--seed", "3")
NETWORKS = ("conv-without-batch-norm", "conv-with-batch-norm")

# Runs the command line in a process that sends itself a signal when its n-th training step is due.
STOPPING = """
import os, sys
from jbn.__main__ import main
from jbn.lab import training
step, left, number = training.train_step, int(sys.argv.pop(1)), int(sys.argv.pop(1))
def stopping(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
    return step(*args)
training.train_step = stopping
main()
"""


# What the compiler-only GPU plugin of the tests says to every process that looks for devices.
PLUGIN = r"(WARNING: All log messages before absl|I\d{4} .* cudart_stub|.*cuda_plugin_extension is not found).*\n"


def python(*arguments):
    completed = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "100"},
    )
    completed.stderr = re.sub(PLUGIN, "", completed.stderr)
    return completed


def demo(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], prog_name="jbn")


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def final_arrays(out, network):
    """Everything in the last checkpoint, except the times of the steps."""
    with ocp.CheckpointManager(out / "checkpoints" / network) as manager:
        assert manager.all_steps() == [STEPS]
        tree = manager.restore(STEPS, args=ocp.args.StandardRestore())
    del tree["seconds"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def without_times(results):
    for network in results["networks"]:
        del network["median_step_ms"]
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    completed = python("-m", "jbn", "demo", *CONV, "--out", out)
    assert (completed.returncode, completed.stderr) == (0, "")
    return out, completed.stdout


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    out = tmp_path_factory.mktemp("diverged")
    train_step.clear_cache()
    result = demo("--model", "dense", "--steps", 7, "--batch-size", 400, "--learning-rate", "1e30", "--out", out)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    return SimpleNamespace(text=text, results=strict_json(out / "results.json"), compilations=train_step._cache_size())


@pytest.fixture(scope="module")
def data():
    return digits(0)


def test_results_say_what_happened(finished):
    out, text = finished
    results = strict_json(out / "results.json")
    options = {"model": ["conv"], "learning_rate": None, "steps": STEPS, "batch_size": 64, "seed": 3}
    assert results["options"] == options
    assert results["versions"]["jax"] == jax.__version__
    for network, batch_norm in zip(results["networks"], (False, True), strict=True):
        assert (network["model"], network["batch_norm"]) == ("conv", batch_norm)
        assert network["test_accuracy"] > 0.9
        assert f"{network['test_accuracy']:.1%}" in text
        assert network["median_step_ms"] > 0
        history = network["history"]
        assert len(history["training_loss"]) == STEPS
        assert history["evaluation_steps"] == evaluation_steps(STEPS)
        assert np.shape(list(history["preactivation_percentiles"].values())) == (5, len(evaluation_steps(STEPS)))
        accuracy = dict(zip(history["evaluation_steps"], history["validation_accuracy"], strict=True))
        reached = network["steps_to_90_percent"]
        assert accuracy[reached] >= 0.9 - 1e-6
        assert all(value < 0.9 for step, value in accuracy.items() if step < reached)
    assert {path.name for path in out.iterdir()} == {"checkpoints", "figure.png", "options.json", "results.json"}
    assert "conv with batch norm: " in text.splitlines()[1]  # a line per network, as it ends
    assert len((out / "results.json").read_text().splitlines()) < 100
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_preactivations_start_normalized(finished):
    networks = strict_json(finished[0] / "results.json")["networks"]
    first = {n["batch_norm"]: [p[0] for p in n["history"]["preactivation_percentiles"].values()] for n in networks}
    # Units of mean 0 and variance 1 each; without batch norm they are as small as weights and images.
    assert np.ptp(first[True]) > 1.5 * np.ptp(first[False])
    assert abs(first[True][2]) < 0.2


def test_killed_and_interrupted_run_ends_the_same_to_the_bit(finished, tmp_path):
    reference, out = finished[0], tmp_path / "a run"
    kill, interrupt = int(signal.SIGKILL), int(signal.SIGINT)

    killed = python("-c", STOPPING, 73, kill, "demo", *CONV, "--out", out)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (out / "checkpoints" / NETWORKS[0]).iterdir()] == ["50"]

    # What is left of a checkpoint that was being deleted.
    (out / "checkpoints" / NETWORKS[0] / "25").mkdir()

    # From 50 the first network has 60 steps to go: the 61st is the first one of the second network.
    killed = python("-c", STOPPING, 61, kill, "demo", *CONV, "--out", out, "--resume")
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    assert [path.name for path in (out / "checkpoints" / NETWORKS[0]).iterdir()] == [str(STEPS)]
    assert list((out / "checkpoints" / NETWORKS[1]).iterdir()) == []

    stopped = python("-c", STOPPING, 60, interrupt, "demo", "--out", out, "--resume")
    assert (stopped.returncode, stopped.stderr) == (130, "")
    assert f"conv with batch norm: stopped at step 59 of {STEPS}; the last checkpoint holds step 50." in stopped.stdout
    command = stopped.stdout.splitlines()[-1].strip()
    assert command == f"{shlex.quote(sys.executable)} -m jbn demo --out '{out}' --resume"

    assert subprocess.run(command, shell=True, capture_output=True, timeout=120).returncode == 0
    for network in NETWORKS:
        expected, arrived = final_arrays(reference, network), final_arrays(out, network)
        assert expected.keys() == arrived.keys()
        for name, array in expected.items():
            assert (array.dtype, array.shape) == (arrived[name].dtype, arrived[name].shape)
            assert array.tobytes() == arrived[name].tobytes(), name
    results = [without_times(strict_json(path / "results.json")) for path in (reference, out)]
    assert results[0] == results[1]


def test_four_simulated_devices_then_three_end_as_one_did(finished, tmp_path):
    reference, out = finished[0], tmp_path / "run"
    stopped = python("-c", STOPPING, 73, int(signal.SIGINT), "demo", *CONV, "--devices", 4, "--out", out)
    assert (stopped.returncode, stopped.stderr) == (130, "")
    assert stopped.stdout.endswith(f"demo --out {out} --resume --devices 4\n")
    assert [path.name for path in (out / "checkpoints" / NETWORKS[0]).iterdir()] == ["50"]

    resumed = python("-m", "jbn", "demo", "--out", out, "--resume", "--devices", 3)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "on 3 devices (cpu)" in resumed.stdout
    assert "on one device (cpu)" in finished[1]
    counts = [strict_json(path / "results.json")["devices"] for path in (reference, out)]
    assert counts == [1, 3]
    assert (reference / "options.json").read_bytes() == (out / "options.json").read_bytes()
    for network in NETWORKS:
        expected, arrived = final_arrays(reference, network), final_arrays(out, network)
        assert expected.keys() == arrived.keys()
        for name, array in expected.items():
            # Rounding, and what ReLU makes of it: a pre-activation of 1e-8 on one side of zero has a gradient, on the
            # other none. tests/test_demo_devices.py tells the two apart.
            np.testing.assert_allclose(arrived[name], array, rtol=0, atol=1e-2 * np.max(np.abs(array)), err_msg=name)


def test_one_compilation_per_network(diverged):
    assert diverged.compilations == 2


def test_loss_that_is_not_finite_is_said_and_recorded_as_null(diverged):
    assert "dense without batch norm: the loss is not finite at step" in diverged.text
    plain = diverged.results["networks"][0]
    first = plain["first_step_with_loss_not_finite"]
    assert plain["history"]["training_loss"][first - 1] is None
    assert None not in plain["history"]["training_loss"][: first - 1]
    assert plain["history"]["evaluation_steps"] == [0, 5, 7]


@pytest.mark.parametrize(
    ("arguments", "option", "arrived", "expected"),
    [
        (["--steps", "-3"], "--steps", "'-3'", "from 1 to 100000"),
        (["--steps", "2.5"], "--steps", "'2.5'", "a whole number"),
        (["--batch-size", "1"], "--batch-size", "'1'", "from 2 to 1077"),
        (["--batch-size", "1078"], "--batch-size", "'1078'", "from 2 to 1077"),
        (["--learning-rate", "0"], "--learning-rate", "'0'", "greater than 0"),
        (["--learning-rate", "nan"], "--learning-rate", "'nan'", "greater than 0"),
        (["--learning-rate", "fast"], "--learning-rate", "'fast'", "a number"),
        (["--seed", "-1"], "--seed", "'-1'", "from 0"),
        (["--model", "resnet"], "--model", "'resnet'", "expected dense, conv, conv64 or all"),
        (["--devices", "0"], "--devices", "'0'", "from 1 to 64"),
        (["--devices", "1000"], "--devices", "'1000'", "from 1 to 64"),
        (["--devices", "9"], "--devices", "got 9", "JAX finds 8 cpu devices here; expected at most 8"),
        (["--out", os.devnull], "--out", os.devnull, "expected a directory"),
        (["--out", Path(os.devnull) / "x"], "--out", os.devnull, "cannot write"),
        (["--step", "3"], "--step", "--step", "--steps"),
    ],
)
def test_wrong_values_are_one_clear_line(tmp_path, arguments, option, arrived, expected):
    jax.devices()  # the eight of the tests: a process that has not looked yet simulates as many as asked for
    out = tmp_path / "run"
    result = demo("--out", out, *arguments)
    assert result.exit_code == 2, result.output
    line = result.output.rstrip().splitlines()[-1]
    assert option in line
    assert arrived in line
    assert expected in line
    assert not out.exists()


def test_a_run_is_never_overwritten(finished):
    out, before = finished[0], (finished[0] / "results.json").read_bytes()
    result = demo("--out", out)
    assert result.exit_code == 2
    assert f"'{out}' already holds a run" in result.output
    assert "--resume" in result.output
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "4"], "'--seed': got 4, but the run in '{out}' was started with 3"),
        (["--steps", "111"], "'--steps': got 111, but the run in '{out}' was started with 110"),
        (["--batch-size", "65"], "'--batch-size': got 65, but the run in '{out}' was started with 64"),
        (
            ["--learning-rate", "0.2"],
            "'--learning-rate': got 0.2, but the run in '{out}' was started with the default, 0.1 for conv",
        ),
        (
            ["--model", "all"],
            "'--model': got dense conv conv64, but the run in '{out}' was started with conv",
        ),
    ],
)
def test_resume_with_another_option_names_both_values(finished, arguments, message):
    result = demo("--out", finished[0], "--resume", *arguments)
    assert result.exit_code == 2
    assert message.format(out=finished[0]) in result.output


def test_resume_without_a_run(tmp_path):
    result = demo("--out", tmp_path / "nothing", "--resume")
    assert result.exit_code == 2
    assert f"'--out': no run in '{tmp_path / 'nothing'}'" in result.output
    (tmp_path / "options.json").write_text("{", encoding="utf-8")
    result = demo("--out", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "options.json' (" in result.output


def test_help_and_misspelled_command_are_friendly():
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
    assert "[default: 400]" in demo("--help").output
    assert CliRunner().invoke(app, ["--version"]).output == f"jbn {jbn.__version__}\n"
    result = CliRunner().invoke(app, ["demp"])
    assert result.exit_code == 2
    assert "No such command 'demp'" in result.output


def test_the_learning_rate_of_before_may_be_said_again(finished):
    result = demo("--out", finished[0], "--resume", "--learning-rate", "0.1")
    assert result.exit_code == 0, result.output


def test_ctrl_c_while_a_loss_is_read(tmp_path, monkeypatch):
    class Loss:
        def __float__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_step", lambda *args: (args[2], Loss()))
    result = demo("--model", "dense", "--steps", 3, "--out", tmp_path)
    assert result.exit_code == 130
    assert "dense without batch norm: stopped at step 0 of 3; nothing of it is saved yet.\n" in result.output


def test_the_command_to_go_on_with_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/jbn"])
    assert resume_command(Path("a run"), 1) == ".venv/bin/jbn demo --out 'a run' --resume"
    monkeypatch.setattr(shutil, "which", lambda name: ".venv/bin/jbn")
    assert resume_command(Path("run"), 3) == "jbn demo --out run --resume --devices 3"


def test_bars_wait_compile_and_run():
    history = {"training_loss": np.array([2.5, np.nan]), "validation_accuracy": np.array([0.1, np.nan])}
    progress = progress_bars(Console(force_terminal=True, file=io.StringIO()))
    add_bar(progress, "dense", 2)
    bar = progress.tasks[0]
    assert (bar.started, bar.fields["loss"]) == (True, "waiting")  # rich pulses what has not started
    for done, loss in enumerate(["compiling", "loss 2.5"]):
        show_step(progress, bar.id, done, history)
        assert (bar.completed, bar.fields["loss"]) == (done, loss)


@pytest.mark.parametrize("missing", ["typer", "orbax"])
def test_without_the_extra_the_command_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from jbn.__main__ import main; main()"
    result = python("-c", code, "demo", "--out", os.devnull)
    assert result.returncode == 2
    assert result.stderr == (f'jbn: the command line needs {missing}, which is not installed: pip install "jbn[lab]"\n')


def test_importing_the_library_does_not_import_the_lab():
    code = "import jbn, sys; print([m for m in ('jbn.lab', 'typer', 'sklearn', 'optax') if m in sys.modules])"
    assert python("-c", code).stdout == "[]\n"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    run_directory.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        run_directory.write_json(path, {"new": float("nan")})

    def fail(partial):
        partial.write_text("half")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        run_directory.write_atomically(path, fail)
    assert strict_json(path) == {"old": 1}


def test_split_is_stratified_and_disjoint(data):
    assert [part.images.shape for part in data] == [(1077, 8, 8, 1), (360, 8, 8, 1), (360, 8, 8, 1)]
    for part in data:
        assert np.bincount(part.labels).min() / len(part.labels) > 0.08
    rows = np.concatenate([part.images for part in data]).reshape(1797, -1)
    assert len(np.unique(rows, axis=0)) == 1797
    assert not np.array_equal(digits(1).test.labels, data.test.labels)


def test_every_epoch_shows_each_image_at_most_once(data):
    training_set = data.training._replace(labels=np.arange(1077))
    epochs = [
        np.concatenate([batch(training_set, 0, step, 128).labels for step in range(start, start + 8)])
        for start in (0, 8)
    ]
    assert [len(np.unique(epoch)) for epoch in epochs] == [1024, 1024]
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(batch(training_set, 0, 3, 128).labels, epochs[0][3 * 128 : 4 * 128])


def test_enlarged_digits_are_64x64x3(data):
    small = data._replace(training=data.validation, test=data.validation)
    for part in enlarged(small):
        assert part.images.shape == (360, 64, 64, 3)
        assert part.images.dtype == np.float32
        assert np.all(part.images[..., :1] == part.images)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_networks_differ_in_batch_norm_alone(data, name):
    model = MODELS[name]
    plain, normalized = (
        initial_state(model.network(batch_norm=batch_norm), 0.1, np.uint32(7), data.training.images[:2])
        for batch_norm in (False, True)
    )
    kernels = {layer: leaves["kernel"] for layer, leaves in plain.params.items()}
    assert plain.batch_stats == {}
    for layer, kernel in kernels.items():
        np.testing.assert_array_equal(kernel, normalized.params[layer]["kernel"])
    assert len(normalized.batch_stats) == len(kernels) - 1
    assert sum("bias" in leaves for layer, leaves in normalized.params.items() if layer in kernels) == 1


def test_evaluation_uses_the_running_statistics(data):
    network = MODELS["dense"].network(batch_norm=True)
    state = initial_state(network, 0.1, np.uint32(0), data.training.images[:2])
    for step in range(20):
        before = state
        state, _ = train_step(network, 0.1, before, *batch(data.training, 0, step, 128))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
    images, labels = data.validation.images[:4], data.validation.labels[:4]
    together = evaluate(network, state, images, labels)[1]
    alone = [evaluate(network, state, images[i : i + 1], labels[i : i + 1])[1] for i in range(4)]
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)
    moved = jax.tree.map(lambda statistic: statistic + 1, state.batch_stats)
    other = evaluate(network, TrainState(state.params, moved, state.opt_state), images, labels)[1]
    assert abs(other - together) > 1e-3
