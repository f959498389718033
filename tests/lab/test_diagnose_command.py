import json
import os
import shutil
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console
from typer.testing import CliRunner

from jbn import recalibrate
from jbn.cli.commands import app
from jbn.lab import diagnosis as lab
from jbn.lab.data.batches import Batches
from jbn.lab.data.parts import parts_of
from jbn.lab.devices import mesh_of
from jbn.lab.models import NETWORKS
from jbn.lab.options import TrainOptions
from jbn.lab.report import show
from jbn.lab.run.checkpoints import Checkpoints
from jbn.lab.run.directory import claim
from jbn.lab.step import initial_state, recipe_of
from jbn.linen import BatchNorm
from jbn.observing import findings
from jbn.observing.findings import Examination
from tests.lab.test_train import random_data
from tests.observing.test_diagnose import HEAD, PARAMS, PLANTED, STATE, STEM, apply, changed, forward, rows
from tests.support.runs import contents, folder

LAYERS = ("BatchNorm_0", "BatchNorm_1")


def first(result):
    return result.output.splitlines()[0]


def diagnose(*arguments):
    """Run `jbn diagnose` in this process."""
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)], prog_name="jbn")


OPTIONS = TrainOptions(model="dense", epochs=2)


def saved(out, step=60, **changes):
    """Write what `jbn train` would after so many steps, with weights that are new and statistics that are theirs."""
    options = replace(OPTIONS, **changes)
    training = parts_of(options).training
    with claim(out, replace(options, fingerprint=training.fingerprint)):
        pass
    batches = Batches(training, options.batch_size, mesh_of(1))
    recipe = recipe_of(options, batches)
    state = initial_state(recipe, training.image_shape)
    parts = [batches.read(batches.in_order(index)) for index in range(len(training) // batches.size)]
    stats = recalibrate(lab._training_pass(recipe), state.params, state.batch_stats, parts)
    with Checkpoints(out / "checkpoints", 3) as checkpoints:
        checkpoints.save(state._replace(step=jnp.int32(step), batch_stats=stats))
        checkpoints.finish()
    return out


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("healthy") / "run")


def test_a_run_that_is_healthy(healthy):
    result = diagnose(healthy)
    assert result.exit_code == 0, result.output
    assert first(result) == f"dense in '{healthy}' after step 60, 128 training images"
    rows = [line.split() for line in result.output.splitlines() if line.split()[:1] and line.split()[0] in LAYERS]
    assert [row[:3] for row in rows] == [["BatchNorm_0", "128", "128"], ["BatchNorm_1", "64", "128"]]
    assert [row[6] for row in rows] == [f"{0.9**60:.0%}"] * 2
    assert result.output.splitlines()[-1] == "No findings in 2 layers."


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_of_32_has_no_finding_either(healthy, seed):
    result = diagnose(healthy, "--batch-size", 32, "--seed", seed)
    assert result.exit_code == 0, result.output
    assert "32 training images" in first(result)


def test_the_seed_chooses_the_images(healthy):
    tables = [diagnose(healthy, "--seed", seed).output for seed in (0, 0, 1)]
    assert tables[0] == tables[1] != tables[2]


def test_more_images_than_there_are(healthy):
    assert "1077 training images" in first(diagnose(healthy, "--batch-size", 5000))


def test_a_checkpoint_of_early_steps(whole):
    result = diagnose(whole / "checkpoints" / "5")
    assert result.exit_code == 1, result.output
    lines = result.output.splitlines()[-2:]
    for line, layer in zip(lines, LAYERS, strict=True):
        assert line.startswith(f"{layer}: running statistics are as if 59% of them were still the initial mean 0 and")
    assert "after step 5," in first(result)
    assert "after step 18," in first(diagnose(whole))


def test_few_images(healthy):
    result = diagnose(healthy, "--batch-size", 8)
    assert result.exit_code == 1
    assert "BatchNorm_0: only 8 values per channel in this batch, expected 16 or more" in result.output


def test_images_are_augmented_as_in_training(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(lab, "augment", lambda options, _, images: (asked.append(options.augment), 0 * images)[1])
    result = diagnose(saved(tmp_path / "run", batch_size=1077, augment=("flip",)))
    assert set(asked) == {("flip",)}
    assert "BatchNorm_0: constant in this batch: all 128 channels." in result.output


def test_nothing_is_written_into_the_run(whole):
    unfinished = whole / "checkpoints" / "20.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_text("of a process that still writes")
    before, times = contents(whole), {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    time.sleep(0.01)
    assert "after step 18," in first(diagnose(whole))
    assert contents(whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times
    shutil.rmtree(unfinished)


def test_a_relative_path(whole, monkeypatch):
    monkeypatch.chdir(whole / "checkpoints")
    assert "after step 10," in first(diagnose("10"))
    monkeypatch.chdir(whole)
    assert "after step 18," in first(diagnose("."))


def test_a_figure(healthy, tmp_path):
    path = tmp_path / "of[a] :dog:.png"  # what Rich reads as its own, were it let
    result = diagnose(healthy, "--figure", path)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"Wrote {path}"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == [path.name]


# What a table and a figure make of every planted fault.
@pytest.mark.parametrize("name", ["NaN in a running mean", "NaN in the batch", "a kernel of zeros", "one variance"])
def test_table_and_figure_of_what_is_broken(name, tmp_path):
    of_params, of_state, of_batch, expected = PLANTED[name]
    params, state = PARAMS, STATE
    for path, change in of_params.items():
        params = changed(params, path, change)
    for path, change in of_state.items():
        state = changed(state, path, change)
    batch = of_batch(rows(64)) if of_batch else rows(64)
    found = lab.Diagnosed(name, lab.diagnose(apply, params, state, batch))
    for width in (40, 60, 80):
        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            show(console, lab.table_of(found.diagnosis))
        text = capture.get()
        assert all(len(line) <= max(width, 60) for line in text.splitlines())
        assert all(layer.path in text for layer in found.diagnosis.layers)
        assert "…" not in text
    lab.figure_of(found.diagnosis, found.title).savefig(tmp_path / "figure.png")
    marked = lab._marks(found.diagnosis, expected[0], (6,))
    assert tuple(np.flatnonzero(marked)) == expected[2]


def test_table_and_figure_show_what_was_not_observed():
    def stem_evaluates(params, state, batch):
        return forward(params, state, batch, True)[1] | {"stem": state["stem"]}

    diagnosis = lab.diagnose(stem_evaluates, PARAMS, STATE, rows(32))
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(lab.table_of(diagnosis))
    (row,) = [line.split() for line in capture.get().splitlines() if STEM in line]
    assert row == [STEM, "6", "0", *"------"]
    figure = lab.figure_of(diagnosis)
    assert {label.get_text() for label in figure.axes[2].get_xticklabels()} == {f"{STEM}\n(evaluates)", HEAD}
    place = [layer.path for layer in diagnosis.layers].index(STEM)
    drawn = [
        line
        for axis in figure.axes
        for line in axis.lines
        if np.any(np.abs(np.asarray(line.get_xdata()) - place) < 0.4)
    ]
    assert {line.get_label() for line in drawn} == {"running"} | {
        line.get_label() for line in drawn if line.get_label().startswith("findings begin")
    }


def lines_of(figure):
    """Return the height of the dotted line in each panel."""
    return [
        line.get_ydata()[0]
        for axis in figure.axes
        for line in axis.lines
        if line.get_label().startswith("findings begin")
    ]


def kinds(layer, epsilon=lab.EPSILON):
    return {finding.kind for finding in Examination(layer, epsilon, "jbn").findings()}


@pytest.mark.parametrize(
    ("panel", "name", "kind", "direction"),
    [(0, "gap_by_prior", "prior", 1), (1, "batch_var", "below epsilon", -1), (2, "ratio", "far mean", 1)],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_the_lines_of_the_figure_are_where_findings_begin(panel, name, kind, direction, factor, monkeypatch):
    for limit in ("LEAST_GAP", "_BY_PRIOR", "FAR"):
        monkeypatch.setattr(findings, limit, factor * getattr(findings, limit))
        if hasattr(lab, limit):
            monkeypatch.setattr(lab, limit, getattr(findings, limit))
    healthy = lab.diagnose(apply, PARAMS, STATE, rows(256)).layers[0]
    nothing = {each: np.zeros(6) for each in ("gap", "gap_by_prior", "gap_beyond_prior", "ratio")}
    layer = replace(healthy, prior=0.5, count=np.full(6, 256.0), independent=np.full(6, 256.0), **nothing)
    epsilon = lab.EPSILON
    line = lines_of(lab.figure_of(lab.Diagnosis((layer,), ()), epsilon=epsilon))[panel]
    for beyond in (0.999, 1.001):
        values = np.full(6, line * beyond**direction)
        assert (kinds(replace(layer, **{name: values})) == {kind}) == (beyond > 1), (values, beyond)


def test_the_epsilon_and_momentum_of_a_diagnosis_are_those_of_the_networks():
    for network in (make(batch_norm=True) for make in NETWORKS.values()):
        met = []
        with nn.intercept_methods(
            lambda call, args, kwargs, context, met=met: (met.append(context.module), call(*args, **kwargs))[1]
        ):
            jax.eval_shape(lambda net=network: net.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False))
        norms = [module for module in met if isinstance(module, BatchNorm)]
        assert {(norm.epsilon, norm.momentum) for norm in norms} == {(lab.EPSILON, lab.MOMENTUM)}


def test_channels_of_stacked_layers_are_marked():
    finding = replace(lab.diagnose(apply, PARAMS, STATE, rows(8)).findings[0], path="a", channels=((1, 2), (0, 3)))
    marked = lab._marks(lab.Diagnosis((), (finding,)), "a", (2, 4))
    assert np.flatnonzero(marked).tolist() == [3, 6]


# Mistakes


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    line = result.output.rstrip().splitlines()[-1]
    for part in parts:
        assert part in line


def test_no_run(tmp_path):
    refused(diagnose(tmp_path), "'CHECKPOINT'", f"no run of jbn train in '{tmp_path}'", "expected its --out")
    refused(diagnose(tmp_path / "checkpoints" / "5"), f"no run of jbn train in '{tmp_path}'")
    refused(diagnose(), "Missing argument 'CHECKPOINT'")
    refused(diagnose(""), "'CHECKPOINT'", "got ''; expected a name")
    (tmp_path / "link").symlink_to("link")
    for odd in (tmp_path / "link", tmp_path / ("x" * 300)):
        refused(diagnose(odd), f"no run of jbn train in '{odd}'")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--batch-size", 1], ["--batch-size", "'1'", "from 2"]),
        (["--seed", -1], ["--seed", "'-1'", "from 0"]),
        (["--figure", "figure.pdf"], ["--figure", "'figure.pdf'", "ends in .png"]),
        (["--figure", "nowhere/figure.png"], ["--figure", "'nowhere/figure.png'", "a folder that is there"]),
        (["--figur", "x.png"], ["--figur", "--figure"]),
    ],
)
def test_wrong_options(whole, arguments, parts):
    refused(diagnose(whole, *arguments), *parts)


def test_a_figure_that_cannot_be_written(healthy, tmp_path):
    (tmp_path / "figure.png").mkdir()
    refused(diagnose(healthy, "--figure", tmp_path / "figure.png"), "'--figure'", "cannot write", "Is a directory")


def test_a_step_that_is_not_saved(whole):
    refused(diagnose(whole / "checkpoints" / "7"), "no checkpoint of step 7", "saved are those of steps 5, 10, 15, 18")


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_nothing_is_saved(copied):
    shutil.rmtree(copied / "checkpoints")
    refused(diagnose(copied), "'CHECKPOINT'", "none is saved")


def test_a_damaged_checkpoint(copied):
    shutil.rmtree(copied / "checkpoints" / "18" / "state")
    last, before = (copied / "checkpoints" / str(step) for step in (18, 15))
    refused(diagnose(copied), f"the checkpoint '{last}' cannot be used (", f"; take the one before it, '{before}'")
    assert "after step 15," in first(diagnose(before))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"model": "dense"}',
        "[]",
        {"epochs": "many"},
        {"epochs": 0},
        {"epochs": None},
        {"epochs": True},
        {"learning_rate": "0.1"},
        {"seed": 0.5},
        {"augment": ["turn"]},
        {"augment": "flip"},
        {"fingerprint": None},
        {"batch_norm": "no"},
        {"steps": "9"},
    ],
)
def test_damaged_options(copied, text):
    path = copied / "options.json"
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    refused(diagnose(copied), "'CHECKPOINT'", f"cannot read '{copied / 'options.json'}'")


def test_data_that_are_gone_or_changed(tmp_path):
    parts = random_data(30), random_data(34)
    where = folder(tmp_path / "data", *parts)
    out = saved(tmp_path / "run", data=str(where), batch_size=64)
    np.savez(where / "part-1.npz", images=parts[1].images, labels=parts[1].labels[::-1])
    refused(diagnose(out), f"cannot use the data of the run in '{out}'", "not what they were when it began")
    shutil.rmtree(where)
    refused(diagnose(out), f"cannot use the data of the run in '{out}'", f"cannot open '{where}'")
