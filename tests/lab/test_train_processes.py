"""Runs of `jbn train` in several processes, and what ends them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab.run import processes
from tests.support.runs import arrays

pytestmark = pytest.mark.usefixtures("smooth")
# Seconds after which a silent process is lost. JAX looks for signs of life every few seconds, and the machine is busy.
TIMEOUT = 20

# The command line in a process that does something when its n-th step is due. ReLU is replaced as in the fixture.
ACTING = """
import os, resource, signal, sys
from flax import linen as nn
nn.relu = nn.silu
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
KILL, TERM = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGTERM"))
# The checkpoint of step 10 is written while the steps go on.
FULL = """
while not os.path.exists(sys.argv[sys.argv.index("--out") + 1] + "/checkpoints/10"):
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
"""
NEVER = 10**9
DENSE = ("--model", "dense", "--epochs", 2, "--batch-size", 50, "--save-every", 10, "--ema", 0.9, "--augment", "shift")
STEPS = 44


def begin(*arguments, step=NEVER, action="pass", job=None):
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", ACTING, str(step), action, "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | (job or {}),
    )


def ended(process):
    """Return the exit status and the output of a process."""
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


def both(*arguments, actions=({}, {})):
    """Start two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = (*arguments, "--coordinator", coordinator, "--num-processes", 2, "--timeout", TIMEOUT)
    return [begin(*shared, "--process-id", process, **action) for process, action in enumerate(actions)]


def here(*arguments):
    """Run the command line in this process, which has eight devices."""
    jax.devices()  # all of them, before the command asks for fewer
    result = CliRunner().invoke(app, ["train", *map(str, arguments)], prog_name="jbn")
    assert result.exit_code == 0, result.output
    return result.output


def saved(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def assert_close(arrived, expected, tolerance):
    assert arrived.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(
            arrived[name], array, rtol=0, atol=tolerance * np.max(np.abs(array), initial=0), err_msg=name
        )


def assert_same_bits(arrived, expected):
    assert arrived.keys() == expected.keys()
    assert all(array.tobytes() == arrived[name].tobytes() for name, array in expected.items())


def assert_one_line_a_step(out, steps):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Run on two devices of one process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    here(*DENSE, "--devices", 2, "--out", out)
    return out


# One step further rounding errors begin to grow, a few times a step: of a network, not of its devices.
@pytest.mark.parametrize("model", ["dense", pytest.param("resnet", marks=pytest.mark.slow)])
def test_the_global_batch_decides(model, tmp_path):
    options = ("--model", model, "--epochs", 1, "--batch-size", 90, "--augment", "flip", "--ema", 0.9)
    pair = both(*options, "--devices", 2, "--out", tmp_path / "2x2")
    for devices in (4, 1):
        here(*options, "--devices", devices, "--out", tmp_path / f"1x{devices}")
    first, second = map(ended, pair)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert "on 4 devices (cpu)" in first[1]
    assert "epoch" not in second[1]  # one process says how it goes
    expected = arrays(tmp_path / "1x4")
    assert_close(arrays(tmp_path / "2x2"), expected, 1e-6)
    assert_close(arrays(tmp_path / "1x1"), expected, 1e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("2x2", "1x4")]
    assert [(result["processes"], result["devices"]) for result in results] == [(2, 4), (1, 4)]
    for what in ("validation_loss", "average_loss"):
        assert results[0][what] == pytest.approx(results[1][what], rel=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_the_run_goes_on_elsewhere(victim, uninterrupted, tmp_path):
    out = tmp_path / "run"
    actions = [{}, {}]
    actions[victim] = {"step": 25, "action": KILL}
    pair = both(*DENSE, "--out", out, actions=actions)
    assert ended(pair[victim])[0] == -signal.SIGKILL
    lost = time.monotonic()
    status, output = ended(pair[1 - victim])
    assert time.monotonic() - lost < 2 * TIMEOUT
    assert status == 75, output
    words = f"lost another process after step 24; step {saved(out)[-1]} is saved. Go on with:\n"
    assert f"jbn: process {1 - victim} {words}" in output
    assert output.splitlines()[-1].endswith(f"--process-id {1 - victim} --resume")
    assert saved(out)[-1] in ("10", "20")
    where = ("--devices", 3) if victim else ("--devices", 1)
    output = here("--out", out, "--resume", "--save-every", 10, *where)
    assert f"Going on with '{out}' after step" in output
    assert_close(arrays(out), arrays(uninterrupted), 1e-4)
    assert_one_line_a_step(out, STEPS)


def test_a_killed_run_ends_the_same_to_the_bit_on_as_many_devices(uninterrupted, tmp_path):
    out = tmp_path / "run"
    assert ended(begin(*DENSE, "--devices", 2, "--out", out, step=25, action=KILL))[0] == -signal.SIGKILL
    assert saved(out)[-1] in ("10", "20")
    assert f"Going on with '{out}' after step" in here("--out", out, "--resume", "--devices", 2)
    assert_same_bits(arrays(out), arrays(uninterrupted))
    assert_one_line_a_step(out, STEPS)


def test_sigterm_to_one_process_saves_and_stops_all(uninterrupted, tmp_path):
    out = tmp_path / "run"
    pair = both(*DENSE, "--out", out, actions=({}, {"step": 15, "action": TERM}))
    for status, output in map(ended, pair):
        assert status == 128 + signal.SIGTERM, output
        assert f"jbn: stopped by SIGTERM after step 16 of {STEPS}, which is saved. Go on with:\n" in output
    assert saved(out) == ["10", "16"]
    resumed = both("--out", out, "--resume")
    assert [ended(process)[0] for process in resumed] == [0, 0]
    assert_close(arrays(out), arrays(uninterrupted), 1e-4)
    assert_one_line_a_step(out, STEPS)


def test_a_full_disk_loses_nothing_saved(uninterrupted, tmp_path):
    out = tmp_path / "run"
    status, output = ended(begin(*DENSE, "--devices", 2, "--out", out, step=15, action=FULL))
    assert status == 1, output
    assert f"jbn: cannot write '{out / 'checkpoints'}" in output
    assert "File too large" in output
    assert saved(out) == ["10"]
    here("--out", out, "--resume", "--devices", 2)
    assert_same_bits(arrays(out), arrays(uninterrupted))


def test_a_process_that_cannot_write_ends_the_others_too(tmp_path):
    out = tmp_path / "run"
    (first, _), (second, output) = map(ended, both(*DENSE, "--out", out, actions=({"step": 15, "action": FULL}, {})))
    assert (first, second) == (1, 75)
    assert "lost another process" in output
    assert saved(out) == ["10"]


def test_what_one_process_refuses_all_refuse(uninterrupted):
    out = uninterrupted
    for process, (status, output) in enumerate(map(ended, both(*DENSE, "--out", out))):
        assert status == 2, output
        assert f"'{out}' already holds a run" in output
        assert ("says process 0" in output) == (process == 1)


def test_slurm_tells_who_the_processes_are(tmp_path):
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    options = ("--model", "dense", "--epochs", 1, "--cluster", "--timeout", TIMEOUT, "--out", tmp_path / "run")
    pair = [begin(*options, job=job | {"SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in "01"]
    (first, output), (second, _) = map(ended, pair)
    assert (first, second) == (0, 0), output
    assert "on 2 devices (cpu)" in output


@pytest.mark.parametrize(
    ("option", "values", "words"),
    [
        ("--seed", (0, 1), "stands for {0} in process {1} and for {2} in process"),
        # It says when all processes write together.
        ("--save-every", (3, 4), "stands for {0} in process {1} and for {2} in process"),
        ("--devices", (1, 2), "stands for 1 in process 0, 2 in process 1; expected as many devices in every process"),
    ],
)
def test_an_option_that_differs_between_processes_is_named(option, values, words, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = (*DENSE, "--out", tmp_path / "run", "--num-processes", 2, "--timeout", TIMEOUT)
        coordinator = ("--coordinator", f"127.0.0.1:{probe.getsockname()[1]}")
    pair = [begin(*shared, *coordinator, "--process-id", process, option, values[process]) for process in (0, 1)]
    for process, (status, output) in enumerate(map(ended, pair)):
        assert status == 2, output
        assert f"'{option}': {words.format(values[process], process, values[1 - process])}" in output


def answers(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for(process, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", process, "--timeout", 5)
    waiting = begin(*DENSE, *alone, "--out", tmp_path / "run")
    while process == 0 and waiting.poll() is None and not answers("127.0.0.1", port):
        time.sleep(0.05)
    if process == 0 and sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
        assert answers("127.0.0.1", port)
        assert not answers("127.0.0.2", port)
    status, output = ended(waiting)
    assert status == 75, output
    assert output.endswith(
        f"jbn: process {process} did not find the others; expected all of them within --timeout 5 seconds\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("coordinator", "expected"),
    [
        ("127.0.0.1:8476", "127.0.0.1:8476"),
        ("localhost:8476", "127.0.0.1:8476"),
        ("0.0.0.0:8476", "0.0.0.0:8476"),
        ("192.0.2.1:8476", None),  # an address of documentation, which no machine has
        ("host-of-process-0:8476", None),
        (None, None),
    ],
)
def test_process_0_listens_where_it_was_told_to(coordinator, expected):
    assert processes.bind_address(coordinator) == expected
    if coordinator and expected and socket.has_ipv6:
        assert processes.bind_address("[::]:8476") in ("[::]:8476", None)  # None where IPv6 is switched off
