"""One run, one process that writes: the others are refused while it lives, and not a moment longer."""

import builtins
import errno
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab.errors import OptionError
from jbn.lab.options import TrainOptions
from jbn.lab.run.directory import claim
from tests.support.runs import contents, options, train

# Holds a folder as a run does, says so, and waits to be killed.
HOLDING = """
import pathlib, sys, time
from jbn.lab.run.directory import claim
with claim(pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "claimed\n"
        before = contents(tmp_path)
        with pytest.raises(OptionError, match=f"^process {first.pid} on .* writes to '{tmp_path}'; wait") as caught:
            claim(tmp_path, TrainOptions()).__enter__()
        assert (caught.value.option, caught.value.exit_code) == ("--out", 2)
        assert contents(tmp_path) == before
        first.send_signal(signal.SIGKILL)
    with claim(tmp_path, TrainOptions()):
        assert (tmp_path / "options.json").exists()
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def refused(result, out):
    assert result.exit_code == 2, result.output
    line = result.output.rstrip().splitlines()[-1]
    assert re.search(rf"'--out': process {os.getpid()} on .* writes to '{out}'; wait until it has ended", line)


def test_a_run_that_another_process_trains_is_not_gone_on_with(whole):
    with claim(whole):
        before = contents(whole)
        refused(train(whole, ["--resume", "--devices", 1]), whole)
        assert contents(whole) == before
        assert "already holds a run" in train(whole, options()).output


def test_a_demo_that_another_process_makes_is_not_made_twice(tmp_path):
    out = tmp_path / "run"
    with claim(tmp_path / "run", TrainOptions()):
        (out / "options.json").unlink()  # as if both had begun at once
        refused(CliRunner().invoke(app, ["demo", "--steps", "2", "--out", str(out)]), out)
        assert [path.name for path in out.iterdir()] == ["lock"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "figure.png", "lock"])
@pytest.mark.parametrize("content", [b"not of a run", b"\xff\x00\n"])
def test_files_of_somebody_else_are_not_written_over(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=rf"{name}\b.*, which a run would write over.*; take another --out$"):
        claim(tmp_path, TrainOptions()).__enter__()
    assert contents(tmp_path) == {Path(name): content}


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b", "\udce9"])
@pytest.mark.parametrize("new", [None, TrainOptions()])
def test_names_under_which_checkpoints_are_lost_are_refused(name, new, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(OptionError, match=rf"got '.*{re.escape(name)}/run'; expected a path in UTF-8 that holds no"):
        claim(Path("run"), new).__enter__()
    assert contents(tmp_path) == {}


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "run").symlink_to("nowhere/run")
    with pytest.raises(OptionError, match=r"'.*run' is a link to what is not there; expected a directory"):
        claim(tmp_path / "run", TrainOptions()).__enter__()


def test_a_full_disk_is_refused_in_one_line(tmp_path):
    """Closing the file would write once more what did not get in, and its error be the one that is seen."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with pytest.raises(OptionError) as caught:
            claim(tmp_path / "run", TrainOptions()).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    expected = f"cannot write to '{tmp_path / 'run'}' (File too large); expected a directory to write to"
    assert caught.value.message == expected


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_refuses_nobody(code, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with claim(tmp_path, TrainOptions()), claim(tmp_path):
        pass


def test_a_system_without_locks_refuses_nobody(tmp_path, monkeypatch):
    usual = builtins.__import__

    def without(name, *arguments):
        if name == "fcntl":
            raise ModuleNotFoundError(name=name)
        return usual(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with claim(tmp_path, TrainOptions()), claim(tmp_path):
        pass


def test_a_run_that_began_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    def begin_and_end(file, _):
        (tmp_path / "options.json").write_text("of another process")

    monkeypatch.setattr(fcntl, "flock", begin_and_end)
    with pytest.raises(OptionError, match="already holds a run"):
        claim(tmp_path, TrainOptions()).__enter__()
    assert (tmp_path / "options.json").read_text() == "of another process"
