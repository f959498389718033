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
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jbn
from jbn.cli.commands import app
from jbn.lab.options import TrainOptions
from jbn.lab.report import bar
from jbn.lab.run import directory
from jbn.lab.step import update
from jbn.version import install
from tests.support import oracle
from tests.support.runs import arrays, contents, lines_of, steps_of

STEPS = 110
LOOKS = [*range(0, STEPS, 5), STEPS]
CONV = ("--model", "conv", "--steps", str(STEPS), "--batch-size", "64", "--seed", "3")
NAMES = ("conv-without-batch-norm", "conv-with-batch-norm")

# Runs the command line in a process that does something when its n-th training step is due.
ACTING = """
import os, signal, sys
from jbn.__main__ import main
from jbn.lab import train
update, left, action = train.update, int(sys.argv.pop(1)), sys.argv.pop(1)
def acting(*args):
    global left
    left -= 1
    if left == 0:
        exec(action)
    return update(*args)
train.update = acting
main()
"""
KILL, INTERRUPT = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGINT"))

# What the compiler-only GPU plugin of the tests says to every process that looks for devices.
PLUGIN = r"(WARNING: All log messages before absl|I\d{4} .* cudart_stub|.*cuda_plugin_extension is not found).*\n"


def python(*arguments):
    completed = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
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
    update.clear_cache()
    result = demo("--model", "dense", "--steps", 7, "--batch-size", 400, "--learning-rate", "1e30", "--out", out)
    assert result.exit_code == 0, result.output
    assert steps_of(out / "dense-without-batch-norm" / "checkpoints") == [7]  # the weights moved on
    text = " ".join(result.output.split())
    return SimpleNamespace(text=text, results=strict_json(out / "results.json"), compilations=update._cache_size())


def test_results_say_what_happened(finished):
    out, text = finished
    results = strict_json(out / "results.json")
    options = {"model": ["conv"], "learning_rate": None, "steps": STEPS, "batch_size": 64, "seed": 3}
    options |= {"data": "digits"}
    assert results["options"] == options
    assert results["versions"]["jax"] == jax.__version__
    for network, batch_norm in zip(results["networks"], (False, True), strict=True):
        assert (network["model"], network["batch_norm"]) == ("conv", batch_norm)
        assert network["test_accuracy"] > 0.85
        assert f"{network['test_accuracy']:.1%}" in text
        assert network["median_step_ms"] > 0
        history = network["history"]
        assert len(history["training_loss"]) == STEPS
        assert history["evaluation_steps"] == LOOKS
        assert np.shape(list(history["preactivation_percentiles"].values())) == (5, len(LOOKS))
        accuracy = dict(zip(history["evaluation_steps"], history["validation_accuracy"], strict=True))
        for name, least in (("steps_to_90_percent", 0.90), ("steps_to_95_percent", 0.95)):
            assert network[name] == min((step for step, value in accuracy.items() if value >= least), default=None)
    assert {path.name for path in out.iterdir()} == {*NAMES, "figure.png", "lock", "options.json", "results.json"}
    assert "conv with batch norm: " in text.splitlines()[1]  # a line per network, as it ends
    assert len((out / "results.json").read_text().splitlines()) < 100
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_preactivations_start_normalized(finished):
    networks = strict_json(finished[0] / "results.json")["networks"]
    first = {n["batch_norm"]: [p[0] for p in n["history"]["preactivation_percentiles"].values()] for n in networks}
    # Units of mean 0 and variance 1 each; without batch norm they are as small as weights and images.
    assert np.ptp(first[True]) > 1.5 * np.ptp(first[False])
    assert abs(first[True][2]) < 0.2


def test_the_folder_of_a_network_is_that_of_a_training_run(finished, whole):
    out, _ = finished
    for name, batch_norm in zip(NAMES, (False, True), strict=True):
        drawn = {"figure.png"}  # the networks of the demo are drawn beside each other
        assert {path.name for path in (out / name).iterdir()} == {path.name for path in whole.iterdir()} - drawn
        assert steps_of(out / name / "checkpoints") == [STEPS]
        options = directory.read_options(out / name, TrainOptions)
        assert (options.model, options.batch_norm, options.steps, options.seed) == ("conv", batch_norm, STEPS, 3)
        lines, those = lines_of(out / name), lines_of(whole)
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
        assert next(line for line in lines if "loss" in line).keys() == those[0].keys()
        results = strict_json(out / name / "results.json")
        assert strict_json(whole / "results.json").keys() - results.keys() == {"average_loss", "average_accuracy"}


def test_a_network_of_the_demo_can_be_diagnosed(finished, tmp_path):
    out, _ = finished

    def diagnose(path):
        result = CliRunner().invoke(app, ["diagnose", str(path)])
        return result.exit_code, result.output

    status, text = diagnose(out)  # its only one with batch norm
    assert text.startswith(f"conv in '{out / NAMES[1]}' after step {STEPS}, 64 training images")
    assert (status, text) == diagnose(out / NAMES[1])
    status, text = diagnose(out / NAMES[0])
    assert status == 2
    assert f"'CHECKPOINT': the network in '{out / NAMES[0]}' has no batch normalization" in text

    several = shutil.copytree(out, tmp_path / "run")
    second = shutil.copytree(several / NAMES[1], several / "dense-with-batch-norm")
    status, text = diagnose(several)
    assert status == 2
    assert text.endswith(
        f"'{several}' is a run of jbn demo; expected a network with batch norm, '{several / NAMES[1]}' or '{second}'\n"
    )
    for network in (several / NAMES[1], second):
        shutil.rmtree(network)
    assert "expected a network with batch norm, another one: none of its networks has any" in diagnose(several)[1]


def test_killed_and_interrupted_run_ends_the_same_to_the_bit(finished, tmp_path):
    reference, out = finished[0], tmp_path / "a run"

    killed = python("-c", ACTING, 73, KILL, "demo", *CONV, "--out", out)
    assert killed.returncode == -signal.SIGKILL
    saved = max(steps_of(out / NAMES[0] / "checkpoints"), default=0)  # the process may be killed while it writes
    assert saved in (0, 50)

    # What is left of a checkpoint that was being deleted.
    (out / NAMES[0] / "checkpoints" / "25.orbax-checkpoint-tmp").mkdir()

    # The first network has some steps to go: the one after them is the first one of the second network.
    killed = python("-c", ACTING, STEPS - saved + 1, KILL, "demo", *CONV, "--out", out, "--resume")
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    assert steps_of(out / NAMES[0] / "checkpoints") == [STEPS]
    assert not (out / NAMES[1] / "results.json").exists()
    first = contents(out / NAMES[0])

    stopped = python("-c", ACTING, 60, INTERRUPT, "demo", "--out", out, "--resume")
    assert stopped.returncode == 130
    assert "conv without batch norm: " in stopped.stdout
    *_, said, command = stopped.stderr.splitlines()
    where = f"stopped by SIGINT after step 61 of {STEPS}, which is saved. Go on with:"
    assert said == f"jbn: conv with batch norm: {where}"
    assert command == f"  {shlex.quote(sys.executable)} -m jbn demo --out '{out}' --resume"
    assert steps_of(out / NAMES[1] / "checkpoints") == [61]

    assert subprocess.run(command, shell=True, capture_output=True, timeout=300).returncode == 0
    assert contents(out / NAMES[0]) == first  # what has ended is not touched
    for name in NAMES:
        expected, arrived = arrays(reference / name), arrays(out / name)
        assert expected.keys() == arrived.keys()
        for key, array in expected.items():
            assert (array.dtype, array.shape) == (arrived[key].dtype, arrived[key].shape)
            assert array.tobytes() == arrived[key].tobytes(), key
        assert (out / name / "metrics.jsonl").read_bytes() == (reference / name / "metrics.jsonl").read_bytes()
    results = [without_times(strict_json(path / "results.json")) for path in (reference, out)]
    assert results[0] == results[1]


def test_four_simulated_devices_then_three_end_as_one_did(finished, tmp_path):
    reference, out = finished[0], tmp_path / "run"
    stopped = python("-c", ACTING, 73, INTERRUPT, "demo", *CONV, "--devices", 4, "--out", out)
    assert stopped.returncode == 130
    assert stopped.stderr.endswith(f"demo {shlex.join(CONV)} --devices 4 --out {out} --resume\n")
    assert steps_of(out / NAMES[0] / "checkpoints") == [74]

    resumed = python("-m", "jbn", "demo", "--out", out, "--resume", "--devices", 3)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "on 3 devices (cpu)" in resumed.stdout
    assert "on one device (cpu)" in finished[1]
    counts = [strict_json(path / "results.json")["devices"] for path in (reference, out)]
    assert counts == [1, 3]
    assert (reference / "options.json").read_bytes() == (out / "options.json").read_bytes()
    for name in NAMES:
        assert {key: array.shape for key, array in arrays(out / name).items()} == {
            key: array.shape for key, array in arrays(reference / name).items()
        }
        # Before the first update they differ by rounding alone; tests/lab/test_demo_devices.py looks at the end, where
        # a pre-activation of 1e-8 has a gradient in a ReLU on one side of zero, and on the other none.
        losses = [next(line["loss"] for line in lines_of(path / name) if "loss" in line) for path in (reference, out)]
        np.testing.assert_allclose(*losses, rtol=oracle.tolerance("float32", 64))
        assert [line["step"] for line in lines_of(out / name)] == [line["step"] for line in lines_of(reference / name)]


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    twice = f"{INTERRUPT}; {INTERRUPT}"
    stopped = python("-c", ACTING, 3, twice, "demo", "--model", "dense", "--steps", 9, "--out", tmp_path / "run")
    assert stopped.returncode == 130
    said, command = stopped.stderr.splitlines()
    assert said == "jbn: stopped at once. Go on with:"
    assert command.endswith(f"demo --model dense --steps 9 --out {tmp_path / 'run'} --resume")
    assert not (tmp_path / "run" / "dense-without-batch-norm" / "checkpoints").exists()


def test_a_damaged_network_is_named_and_can_be_trained_anew(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / NAMES[1] / "results.json").unlink()
    shutil.rmtree(out / NAMES[1] / "checkpoints" / str(STEPS) / "state")
    result = demo("--out", out, "--resume")
    assert result.exit_code == 2
    line = result.output.rstrip().splitlines()[-1]
    assert f"'--resume': the checkpoint '{out / NAMES[1] / 'checkpoints' / str(STEPS)}' cannot be used (" in line
    assert line.endswith(f"; remove '{out / NAMES[1]}' to train this network anew")
    shutil.rmtree(out / NAMES[1])
    assert demo("--out", out, "--resume").exit_code == 0
    assert (out / NAMES[1] / "metrics.jsonl").read_bytes() == (finished[0] / NAMES[1] / "metrics.jsonl").read_bytes()


def test_a_run_of_an_earlier_demo_is_refused_in_words(finished, tmp_path):
    (tmp_path / "checkpoints" / NAMES[0] / "50").mkdir(parents=True)
    shutil.copy(finished[0] / "options.json", tmp_path)
    before = contents(tmp_path)
    result = demo("--out", tmp_path, "--resume")
    assert result.exit_code == 2
    line = result.output.rstrip().splitlines()[-1]
    for part in ("'--resume'", f"'{tmp_path / 'checkpoints'}' is of an earlier jbn demo", "in another --out"):
        assert part in line
    assert contents(tmp_path) == before


def test_two_compilations_per_network(diverged):
    assert diverged.compilations == 4  # the last batch of an epoch is masked


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
        (["--batch-size", "1"], "--batch-size", "'1'", "from 2 to 3000"),
        (["--batch-size", "3001", "--data", "mnist"], "--batch-size", "'3001'", "from 2 to 3000"),
        (["--batch-size", "1078"], "--batch-size", "got '1078'", "digits has 1077 training images"),
        (["--data", "cifar"], "--data", "'cifar'", "expected digits or mnist"),
        (["--learning-rate", "0"], "--learning-rate", "'0'", "greater than 0"),
        (["--learning-rate", "nan"], "--learning-rate", "'nan'", "greater than 0"),
        (["--learning-rate", "fast"], "--learning-rate", "'fast'", "a number"),
        (["--seed", "-1"], "--seed", "'-1'", "from 0"),
        (["--model", "resnet"], "--model", "'resnet'", "expected dense, conv, conv64 or all"),
        (["--devices", "0"], "--devices", "'0'", "from 1 to 64"),
        (["--devices", "1000"], "--devices", "'1000'", "from 1 to 64"),
        (["--devices", "9"], "--devices", "got '9'", "JAX finds 8 devices (cpu) here; expected at most 8"),
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
        (["--seed", "4"], "'--seed': got '4', but the run in '{out}' was started with '3'"),
        (["--steps", "111"], "'--steps': got '111', but the run in '{out}' was started with '110'"),
        (["--batch-size", "65"], "'--batch-size': got '65', but the run in '{out}' was started with '64'"),
        (
            ["--learning-rate", "0.2"],
            "'--learning-rate': got '0.2', but the run in '{out}' was started with the default, 0.1 for conv",
        ),
        (
            ["--model", "all"],
            "'--model': got 'dense conv conv64', but the run in '{out}' was started with 'conv'",
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


def test_the_command_to_go_on_with_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/jbn", "demo", "--out", "a run", "--at", "5", "--at=6"])
    assert directory.go_on() == "Go on with:\n  .venv/bin/jbn demo --out 'a run' --resume"
    monkeypatch.setattr(shutil, "which", lambda name: ".venv/bin/jbn")
    monkeypatch.setattr(sys, "argv", [".venv/bin/jbn", "demo", "--resume", "--devices", "3"])
    assert directory.go_on() == "Go on with:\n  jbn demo --devices 3 --resume"


def test_a_bar_compiles_and_runs():
    console = Console(force_terminal=True, file=io.StringIO(), width=200)
    with bar(console, "dense", 2) as show:
        show(0)
        show(1, loss="loss 2.5")
        show(1, accuracy="validation 10.0%")
    text = console.file.getvalue()
    assert re.search(r"dense.*0/2.*compiling", text)
    assert re.search(r"dense.*1/2.*loss 2.5.*validation 10.0%", text)


@pytest.mark.parametrize("missing", ["typer", "orbax"])
def test_without_the_extra_the_command_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from jbn.__main__ import main; main()"
    result = python("-c", code, "demo", "--out", os.devnull)
    assert result.returncode == 2
    assert result.stderr == f"jbn: the command line needs {missing}, which is not installed: {install('lab')}\n"


def test_importing_the_library_does_not_import_the_lab():
    code = "import sys, jbn; jbn.fold; print([m for m in ('jbn.lab', 'typer', 'sklearn', 'optax') if m in sys.modules])"
    assert python("-c", code).stdout == "[]\n"
