import contextlib
import json
import re
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.lab.devices import mesh_of
from jbn.lab.errors import FileError, OptionError
from jbn.lab.models import NETWORKS
from jbn.lab.run.checkpoints import Checkpoints
from jbn.lab.step import State, update
from tests.lab.test_train import RECIPE, SHAPE, assert_same_bits, begun, by_name, changed, one_batch, random_data
from tests.support import oracle
from tests.support.runs import (
    SMALL,
    STEPS,
    contents,
    end_of,
    lines_of,
    options,
    restored,
    shapes,
    steps_of,
    stopping,
    train,
)


def saved(path, states, keep=10):
    with Checkpoints(path, keep) as checkpoints:
        for state in states:
            checkpoints.save(state)
        checkpoints.finish()
    return path


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


def test_a_step_of_a_run_that_saved_none(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole / "options.json", out)
    result = train(out, ["--resume", "--devices", 1, "--at", 5])
    assert result.exit_code == 2
    assert "'--at': got '5'; expected no --at, for nothing is saved in" in result.output


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_taken_for_empty(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("options.json", "metrics.jsonl"):
        shutil.copy(whole / name, out)
    (out / "checkpoints").write_text("as one whose permissions are lost")
    before = contents(out)
    result = train(out, ["--resume", "--devices", 1])
    assert result.exit_code == 1
    assert f"cannot read '{out / 'checkpoints'}' (Not a directory)" in result.output
    assert {name: content for name, content in contents(out).items() if name != Path("lock")} == before


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
        (changed(SMALL, network=NETWORKS["conv"](batch_norm=True, classes=7)), SHAPE, "float32 [7]"),
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


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@pytest.fixture
def snapshots(tmp_path):
    """Yield a function that watches a folder from then on; it returns copies of it, from before each change."""
    taken, watched, copying = [], [], threading.local()

    def copy(event, arguments):
        changes = event in CHANGES and watched and str(arguments[0]).startswith(str(watched[0]))
        if not changes or getattr(copying, "now", False):
            return
        copying.now = True
        taken.append(tmp_path / "snapshots" / str(len(taken)))
        with contextlib.suppress(OSError, shutil.Error):  # files move while they are copied: those of a half write
            shutil.copytree(watched[0], taken[-1])
        copying.now = False

    sys.addaudithook(copy)  # for good: it looks at nothing once the list is empty
    yield lambda folder: watched.append(folder) or taken
    watched.clear()


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path, states, snapshots):
    folder = saved(tmp_path / "checkpoints", states[:1], keep=1)
    taken = snapshots(folder)
    saved(folder, states[1:], keep=1)
    seen = {}
    for shot in filter(Path.exists, list(taken)):
        names = tuple(sorted(re.sub("[^0-9].*", " unfinished", path.name) for path in shot.iterdir()))
        seen.setdefault(names, []).append(shot)
    assert {("0", "1 unfinished"), ("0", "1"), ("0 unfinished", "1"), ("1", "2 unfinished")} <= seen.keys()
    for shots in seen.values():
        for shot in shots[:: max(1, len(shots) // 3)]:
            with Checkpoints(shot, 10) as checkpoints:
                assert all(path.name.isdigit() for path in shot.iterdir())  # what is unfinished has gone
                for step in checkpoints.steps():
                    assert_same_bits(checkpoints.restore(shapes(SMALL), mesh_of(1), step), states[step])


def test_of_what_is_set_aside_the_last_goes_first(tmp_path, states):
    # Killed between two moves, the last that is left would be gone on with.
    with Checkpoints(saved(tmp_path / "checkpoints", states), 10) as checkpoints:
        assert [path.name for path in checkpoints.set_aside(0)] == ["2", "1"]


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
        assert line.endswith(f"'--at': got '{wrong}'; expected one of 5, 10, 15, 18, saved in '{folder}'")
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

    with Checkpoints(folder, 10) as checkpoints:
        checkpoints.set_aside(5)  # a second time
    assert sorted(path.name for path in aside.iterdir()) == ["10", "15", "15.1", "18", "18.1"]


def test_a_record_that_was_cut_is_said(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    text = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join(text[:7]))
    result = train(out, ["--resume", "--devices", 1, "--keep", 10])
    assert result.exit_code == 0, result.output
    assert f"Note: '{out / 'metrics.jsonl'}' does not hold 11 of the steps 8 to 18 any more." in result.output


def test_only_numbers_as_python_writes_them_are_checkpoints(tmp_path):
    for name in ("5", "10", "007", "0", "²", "٣", "5.1", "x"):
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path, 0) as checkpoints:
        assert checkpoints.steps() == [0, 5, 10]


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
    assert "18 steps of 128 images on one device" in " ".join(result.output.split())
    assert int(end_of(out).step) == STEPS
