"""Data that are not what they were when a run began, and data that are allowed and seldom meant."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from jbn.lab import train as trainer
from jbn.lab.data.folder import open_folder
from jbn.lab.data.images import Held
from jbn.lab.data.parts import parts_of
from jbn.lab.devices import mesh_of
from jbn.lab.errors import OptionError
from jbn.lab.options import TrainOptions
from jbn.lab.run.metrics import LEAST_TIMED, Pace
from jbn.lab.step import update
from jbn.paths import count_of
from tests.lab.test_folder import IMAGES, LABELS
from tests.lab.test_train import random_data
from tests.support.runs import folder, options, steps_of, train


def fingerprint(path, *, name="b.npz", images=IMAGES, labels=LABELS, save=np.savez):
    path.mkdir()
    np.savez(path / "a.npz", images=IMAGES.astype(images.dtype), labels=LABELS)
    save(path / name, images=images, labels=labels)
    return open_folder(path).fingerprint


def test_the_fingerprint_tells_whether_the_data_is_the_same(tmp_path):
    first = fingerprint(tmp_path / "first")
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    assert fingerprint(tmp_path / "copy") == first
    assert fingerprint(tmp_path / "packed", save=np.savez_compressed) == first
    others = [
        fingerprint(tmp_path / "name", name="c.npz"),
        fingerprint(tmp_path / "label", labels=[0, 1, 2, 2]),
        fingerprint(tmp_path / "order", labels=LABELS[::-1]),
        fingerprint(tmp_path / "axis", images=IMAGES[..., np.newaxis]),
        fingerprint(tmp_path / "count", images=IMAGES[:3], labels=LABELS[:3]),
        fingerprint(tmp_path / "dtype", images=IMAGES.astype(np.float32)),
    ]
    for place in range(IMAGES.size):
        one = IMAGES.copy()
        one.flat[place] = 1
        others.append(fingerprint(tmp_path / f"pixel-{place}", images=one))
    assert len({first, *others}) == 7 + IMAGES.size


def test_of_data_in_memory_every_pixel_counts():
    data, other = random_data(20), random_data(20)
    other.images[7, 3, 2] += np.float32(1e-3)
    first, second = (Held("", one).fingerprint for one in (data, other))
    assert first == Held("", random_data(20)).fingerprint != second
    assert Held("", other, data).fingerprint == first  # what devices computed of it does not count


def test_digits_are_what_they_were_in_any_size():
    fingerprints = [
        parts_of(TrainOptions(model=model, seed=seed)).fingerprint
        for model, seed in (("dense", 0), ("dense", 1), ("conv64", 0))
    ]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


@pytest.mark.parametrize(("which", "option"), [("data", "--data"), ("validation", "--validation")])
def test_a_changed_image_is_noticed_when_a_run_goes_on(which, option, tmp_path):
    parts = random_data(30), random_data(34)
    places = {name: folder(tmp_path / name, *parts) for name in ("data", "validation")}
    out = tmp_path / "run"
    given = {"--data": places["data"], "--validation": places["validation"], "--batch-size": 32, "--epochs": 1}
    assert train(out, options(**given)).exit_code == 0
    file = places[which] / "part-1.npz"
    before = file.stat()
    parts[1].images[5, 0, 0] = 0
    np.savez(file, images=parts[1].images, labels=parts[1].labels)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    result = train(out, ["--resume", "--devices", 1])
    assert result.exit_code == 2, result.output
    assert f"'{option}': is not what it was when the run in '{out}' began; expected the same files" in result.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [(Path.unlink, "No such file or directory"), (lambda file: os.utime(file, (1, 1)), "changed after it was opened")],
)
def test_a_data_file_that_goes_or_changes_meanwhile_ends_the_run_with_1(tmp_path, monkeypatch, change, reason):
    where, out = folder(tmp_path / "data", random_data(30), random_data(34)), tmp_path / "run"

    def acting(recipe, state, batch):
        if int(state.step) == 3:
            change(where / "part-1.npz")
        return update(recipe, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", acting)
        result = train(out, options(**{"--data": where, "--batch-size": 16, "--save-every": 1, "--keep": 9}))
    assert result.exit_code == 1, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("jbn: "))
    assert f"'{where / 'part-1.npz'}'" in line
    assert reason in line
    assert steps_of(out / "checkpoints") in ([1, 2, 3], [1, 2])  # what was begun has been written
    assert "Traceback" not in result.output


def labelled(count, *labels):
    data = random_data(count)
    return data._replace(labels=np.resize(np.array(labels, np.int32), count))


@pytest.mark.parametrize("label", [0, 3])
def test_one_class_is_refused(tmp_path, label):
    where = folder(tmp_path / "data", labelled(20, label))
    result = train(tmp_path / "run", options(**{"--data": where}))
    assert result.exit_code == 2
    assert f"'--data': all labels in '{where}' are {label}; expected two classes or more" in result.output
    assert not (tmp_path / "run").exists()


def test_validation_of_another_scale_is_refused(tmp_path):
    where = folder(tmp_path / "data", random_data(40))
    other = folder(tmp_path / "other", random_data(4)._replace(images=np.zeros((4, 8, 8), np.uint8)))
    result = train(tmp_path / "run", options(**{"--data": where, "--validation": other}))
    assert result.exit_code == 2
    assert f"'--validation': '{other}' holds uint8 images, --data float; expected uint8 in all files" in result.output


@pytest.mark.parametrize(
    ("data", "arguments", "notes"),
    [
        (labelled(40, 0, 1, 2), {"--warmup-epochs": 0.5}, []),
        (
            labelled(40, 0, 2, 5),
            {"--warmup-epochs": 0},
            [
                "of the labels 0 to 5 the training data have 3: 0, 2, 5. The network has 6 outputs; "
                "numbered from 0 on the classes would need 3"
            ],
        ),
        (
            labelled(40, 0, 1),
            {"--warmup-epochs": 0, "--batch-size": 41},
            ["--batch-size 41 is more than the 40 training images: every step takes all of them"],
        ),
        (
            labelled(40, 0, 1),
            {"--warmup-epochs": 2, "--learning-rate": 0.4},
            ["--warmup-epochs 2 lasts 4 steps, and the run 4: the learning rate grows to its end, where it is 0.3"],
        ),
        (
            labelled(40, 0, 1)._replace(images=np.zeros((40, 8, 8))),
            {},
            ["every value in 16 images of --data is 0: images that are alike teach nothing"],
        ),
        (
            labelled(40, 0, 1)._replace(images=np.full((40, 8, 8), 255.0)),
            {"--warmup-epochs": 1, "--batch-size": 40, "--epochs": 1},
            [
                "--warmup-epochs 1 lasts 1 step, and the run 1: the learning rate grows to its end, where it is 0",
                "the largest value in 16 images of --data is 255 (uint8 is divided by 255, floats are taken as they "
                "are): scale them to about 1",
            ],
        ),
    ],
    ids=["nothing", "holes", "batch", "warmup", "zeros", "scale"],
)
def test_what_is_seldom_meant_is_said_once(tmp_path, data, arguments, notes):
    given = {"--data": folder(tmp_path / "data", data), "--batch-size": 20} | arguments
    result = train(tmp_path / "run", options(**given))
    assert result.exit_code == 0, result.output
    assert re.findall("^Note: (.*).$", result.output, re.MULTILINE) == notes
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    made = count_of(results["steps"], "step")
    made = f"{made} of {min(given['--batch-size'], 40)} images on one device"
    assert made in " ".join(result.output.split())
    assert "ms a step" not in result.output  # of so few
    assert results["median_step_ms"] is None


def paced(seconds, done=0, per_epoch=10):
    """Return the pace of steps that take so long, in epochs whose last batches are masked."""
    pace = Pace(done, per_epoch)
    for step, took in enumerate(seconds, done + 1):
        pace.note(step, step % per_epoch == 0, took)
    return pace.milliseconds


def test_what_compiles_has_no_part_in_the_time_of_a_step():
    assert paced([9.0, *[1.0] * 8, 9.0, *[1.0] * LEAST_TIMED]) == 1000
    assert paced([9.0] + [1.0] * 8 + [9.0] + [1.0] * 2) == 1000
    assert paced([9.0] + [1.0] * 8 + [9.0] + [1.0]) is None
    assert paced([1.0] * LEAST_TIMED, per_epoch=100) is None


def test_an_epoch_that_another_process_began_is_not_timed():
    assert paced([9.0] * 7 + [1.0] * (LEAST_TIMED - 1), done=3) is None
    assert paced([9.0] * 7 + [1.0] * LEAST_TIMED, done=3) == 1000
    assert paced([9.0] + [1.0] * 30, done=10) == 1000


def test_data_have_a_name_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mnist", labelled(40, 0, 1))
    named, of_folder = (TrainOptions(data=data, batch_size=20) for data in ("mnist", "./mnist"))
    assert [len(parts_of(options).training) for options in (named, of_folder)] == [3000, 40]
    (note,) = trainer.Job(named, parts_of(named), mesh_of(1)).notes()
    assert note == "--data mnist are the images that jbn knows by this name; the folder is ./mnist"
    assert not list(trainer.Job(of_folder, parts_of(of_folder), mesh_of(1)).notes())
    with pytest.raises(OptionError, match=r"given beside --data mnist, .* expected --data DIR, or no --validation"):
        parts_of(TrainOptions(data="mnist", validation="mnist"))
    assert TrainOptions(data=None) == TrainOptions()  # what files of earlier versions hold
