"""What `jbn export` writes gives what the network gives, or is not there."""

import errno
import logging
import os
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from rich.console import Console
from typer.testing import CliRunner

from jbn import load_arrays
from jbn.cli.commands import app
from jbn.lab import export as lab
from jbn.lab.demo import plan_of
from jbn.lab.devices import mesh_of
from jbn.lab.kinds import EXPORTS
from jbn.lab.options import DemoOptions, TrainPlace
from jbn.lab.run.saved import find_saved
from jbn.lab.train import train
from jbn.version import install
from tests.lab.test_diagnose_command import refused, saved
from tests.lab.test_train import random_data
from tests.support.oracle import relative_l2, tolerance
from tests.support.runs import folder, options
from tests.support.runs import train as train_command

IMAGES = random_data(5).images


def run(*arguments):
    """Run `jbn export` in this process."""
    return CliRunner().invoke(app, ["export", *map(str, arguments)], prog_name="jbn")


def network_of(path):
    """Return the network in evaluation, as it was trained, and its variables."""
    kept = find_saved(path)
    recipe, state = kept.read(mesh_of(1))
    return lambda variables, x: recipe.network.apply(variables, x, train=False), state


@pytest.fixture(scope="module", params=["dense", "conv", "resnet"])
def out(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param) / "run", model=request.param)


def test_a_program_gives_the_logits_of_the_network_for_any_number_of_images(out, tmp_path):
    file = tmp_path / "network.jaxexport"
    result = run(out, file)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith(f"Wrote {file}: its logits of 128 images differ by ")
    program = export.deserialize(bytearray(file.read_bytes()))
    apply, state = network_of(out)
    assert {"cpu", "cuda", "tpu"} == set(program.platforms)
    assert "rsqrt" not in program.mlir_module()  # folded
    for number in (1, 5):
        expected = apply(state.variables, IMAGES[:number])
        assert relative_l2(program.call(IMAGES[:number]), expected) < tolerance(np.float32, 1000)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_weights_come_back_under_their_names(out, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    result = run(out, file)
    assert result.exit_code == 0, result.output
    assert "its logits of 128 images are the same" in result.output
    _, state = network_of(out)
    expected, found = flatten_dict(state.variables, sep="/"), load_arrays(file)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore")  # what the exporter and its packages warn of is theirs
def test_onnx_gives_the_logits_of_the_network_for_any_number_of_images(out, tmp_path):
    pytest.importorskip("jax2onnx")
    runtime, level = pytest.importorskip("onnxruntime"), logging.getLogger("onnx_ir").level
    with jax.numpy_rank_promotion("allow"):  # the exporter's own layers promote
        result = run(out, tmp_path / "network.onnx")
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    apply, state = network_of(out)
    for number in (1, 5):
        (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:number]})
        assert relative_l2(logits, apply(state.variables, IMAGES[:number])) < tolerance(np.float32, 1000)
    assert logging.getLogger("onnx_ir").level == level


def test_the_average_of_weights_is_exported_where_it_is_asked_for(whole, tmp_path):
    assert run(whole, tmp_path / "last.npz", tmp_path / "last.jaxexport").exit_code == 0
    result = run(whole, "--average", tmp_path / "average.npz", tmp_path / "average.jaxexport")
    assert result.exit_code == 0, result.output
    assert ", the average of its weights" in result.output.splitlines()[0]
    apply, state = network_of(whole)
    for name, variables in (("last", state.variables), ("average", state.average)):
        expected = apply(variables, IMAGES)
        kept = unflatten_dict(load_arrays(tmp_path / f"{name}.npz"), sep="/")
        assert np.array_equal(apply(kept, IMAGES), expected)
        program = export.deserialize(bytearray((tmp_path / f"{name}.jaxexport").read_bytes()))
        assert relative_l2(program.call(IMAGES), expected) < tolerance(np.float32, 1000)


def test_a_network_whose_data_are_gone_is_tried_on_noise(tmp_path):
    data, out, file = folder(tmp_path / "data", random_data(40)), tmp_path / "run", tmp_path / "network.jaxexport"
    assert train_command(out, options(**{"--data": data, "--epochs": 1, "--batch-size": 7})).exit_code == 0
    shutil.rmtree(data)
    result = run(out, file)
    assert result.exit_code == 0, result.output
    assert "its logits of 7 images of noise, for the data of its run cannot be read, differ by" in result.output
    apply, state = network_of(out)
    logits = export.deserialize(bytearray(file.read_bytes())).call(IMAGES)
    assert relative_l2(logits, apply(state.variables, IMAGES)) < tolerance(np.float32, 1000)


def test_a_network_in_bfloat16(tmp_path):
    half = saved(tmp_path / "half", dtype="bfloat16")
    result = run(half, tmp_path / "half.jaxexport", tmp_path / "half.npz")
    assert result.exit_code == 0, result.output
    assert "Folded into the layers beside them" in result.output
    result = run(half, tmp_path / "alone.npz")  # arrays are not folded
    assert result.exit_code == 0, result.output
    assert "Folded" not in result.output


def test_a_network_without_batch_norm(tmp_path):
    plan, out = plan_of(DemoOptions(steps=3), "dense", batch_norm=False), tmp_path / "run"
    train(plan, TrainPlace(out=out, devices=1), Console(quiet=True))
    result = run(out, tmp_path / "plain.jaxexport", tmp_path / "plain.npz")
    assert result.exit_code == 0, result.output
    assert "Folded" not in result.output


@pytest.fixture
def dense(tmp_path):
    return saved(tmp_path / "run")


@pytest.mark.parametrize("suffix", EXPORTS)
def test_a_file_that_gives_other_logits_is_not_written(dense, tmp_path, monkeypatch, suffix):
    def answer(product, *_):
        return 1.001 * product.network.apply(product.variables, product.images, train=False)

    monkeypatch.setattr(lab, "find_spec", lambda name: name)
    monkeypatch.setitem(lab.FORMS, suffix, (lambda *_: b"", answer))
    file = tmp_path / f"network{suffix}"
    file.write_text("of before")
    result = run(dense, "--force", file)
    assert result.exit_code == 1
    line = result.output.splitlines()[-1]
    assert line.startswith(f"jbn: '{file}' is not written: its logits differ from those of the network by 1e-03")
    assert file.read_text() == "of before"


def test_logits_that_are_not_numbers_are_not_written(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(lab.FORMS, ".npz", (lambda *_: b"", lambda product, *_: np.nan * np.ones((128, 10))))
    assert run(dense, tmp_path / "network.npz").exit_code == 1
    assert not (tmp_path / "network.npz").exists()


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only")])
def test_a_file_that_cannot_be_written_leaves_what_was_there(dense, tmp_path, monkeypatch, code, said):
    file = tmp_path / "network.npz"
    file.write_text("of before")

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("jbn.atomic.os.fsync", fail)
    result = run(dense, "--force", file)
    assert result.exit_code == 1
    assert f"jbn: cannot write '{file}' ({said}" in result.output.splitlines()[-1]
    assert file.read_text() == "of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.npz", "run"]


def test_a_disk_that_returns_other_bytes_is_noticed(dense, tmp_path, monkeypatch):
    kept = lab.Path.read_bytes
    monkeypatch.setattr(lab.Path, "read_bytes", lambda path: kept(path) + b"?" * (path.suffix == ".partial"))
    result = run(dense, tmp_path / "network.npz")
    assert result.exit_code == 1
    assert "what was written reads otherwise" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_that_are_there_are_written_over_only_where_that_is_asked_for(dense, tmp_path):
    there, new = tmp_path / "there.npz", tmp_path / "new.npz"
    there.write_text("of before")
    refused(run(dense, new, there), "'FILE'", f"'{there}' is there; write over it with --force")
    assert there.read_text() == "of before"
    assert not new.exists()  # what is refused leaves nothing behind
    assert run(dense, "--force", new, there).exit_code == 0
    assert load_arrays(there).keys() == load_arrays(new).keys()
    (tmp_path / "alias").symlink_to(tmp_path)
    refused(run(dense, "--force", new, there, tmp_path / "alias" / "new.npz"), "'FILE'", f"got '{new}' twice")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["network.pt"], ["'FILE'", "got 'network.pt'; expected a name that ends in .jaxexport, .onnx, .safetensors"]),
        ([""], ["'FILE'", "got ''"]),
        (["nowhere/network.npz"], ["'FILE'", "got 'nowhere/network.npz'", "in a folder that is there"]),
        ([], ["Missing argument 'FILE'"]),
        (["a.npz", "--average"], ["'--average'", "was started without --ema"]),
    ],
)
def test_wrong_arguments(dense, arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run(dense, *arguments), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_package_that_is_lacking_is_named_before_anything_is_computed(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    result = run(dense, tmp_path / "network.onnx")
    refused(result, "needs jax2onnx and onnxruntime, not installed here", install("onnx"))


def test_what_cannot_be_exported(tmp_path, whole):
    refused(run(tmp_path, tmp_path / "a.npz"), "'CHECKPOINT'", f"no run of jbn train in '{tmp_path}'")
    refused(run(whole / "checkpoints" / "7", tmp_path / "a.npz"), "no checkpoint of step 7")
    assert list(tmp_path.iterdir()) == []
