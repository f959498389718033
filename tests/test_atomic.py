"""Files are replaced in one move: who fails, is killed or writes beside another one loses and leaves nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jbn
from jbn.atomic import replace_file


def test_what_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "m.npz"
    jbn.save_arrays(file, {"a": np.ones(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{re.escape(str(file))}'$"):
        jbn.save_arrays(file, {"a": np.zeros(3)})
    assert jbn.load_arrays(file)["a"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_two_who_write_one_file_leave_a_whole_one(tmp_path, monkeypatch):
    """As the processes of a run do that all save: the second begins and ends while the first writes."""
    file, replace = tmp_path / "m.npz", os.replace

    def write_between(partial, path):
        monkeypatch.setattr("os.replace", replace)
        jbn.save_arrays(file, {"a": np.zeros(3)})
        assert jbn.load_arrays(file)["a"].tolist() == [0, 0, 0]
        replace(partial, path)

    monkeypatch.setattr("os.replace", write_between)
    jbn.save_arrays(file, {"a": np.ones(3)})
    assert jbn.load_arrays(file)["a"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_killed_writers_left_is_removed(tmp_path):
    """Theirs alone: nothing that somebody still writes, and no file of others."""
    others = [tmp_path / ".0123456789abcdef0123456789abcdef.partial", tmp_path / ".jbn-old"]
    for other in others:
        other.touch()
    kill = "import os, pathlib, jbn.atomic as a; a.replace_file(pathlib.Path('b.npz'), lambda file: os._exit(9))"
    assert subprocess.run([sys.executable, "-c", kill], cwd=tmp_path, check=False).returncode == 9
    assert len(list(tmp_path.glob(".jbn-*.partial"))) == 1
    jbn.save_arrays(tmp_path / "a.npz", {"a": np.ones(3)})
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "a.npz"])


def test_a_link_stays_and_leads_to_the_new_arrays(tmp_path):
    real, link = tmp_path / "elsewhere" / "run1.npz", tmp_path / "latest.npz"
    real.parent.mkdir()
    jbn.save_arrays(real, {"a": np.ones(3)})
    real.chmod(0o600)
    link.symlink_to(real)
    jbn.save_arrays(link, {"a": np.zeros(3)})
    assert link.is_symlink()
    assert jbn.load_arrays(real)["a"].tolist() == [0, 0, 0]
    assert real.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in real.parent.iterdir()] == ["run1.npz"]


@pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "a folder"), (os.mkfifo, "no file")])
def test_what_is_no_file_stays(tmp_path, make, what):
    make(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=f"path is '.*m.npz', {what}; expected a file, or a name that is free"):
        jbn.save_arrays(tmp_path / "m.npz", {"a": np.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


def test_a_writer_that_fails_half_way_leaves_the_old_file(tmp_path):
    directory = pytest.importorskip("jbn.lab.run.directory")
    path = tmp_path / "results.json"
    directory.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.write_json(path, {"new": float("nan")})

    def fail(file):
        file.write(b"half")
        raise OSError(5, "half")

    with pytest.raises(OSError, match="half"):
        replace_file(path, fail)
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
