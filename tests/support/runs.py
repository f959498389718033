"""Runs of `jbn train` in this process, and what they leave behind."""

import json
import signal

import jax
import numpy as np
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab import train as trainer
from jbn.lab.data.parts import parts_of
from jbn.lab.devices import mesh_of
from jbn.lab.options import TrainOptions
from jbn.lab.run.checkpoints import Checkpoints
from jbn.lab.run.directory import read_options
from jbn.lab.step import initial_state, update
from tests.lab.test_train import CONV, RECIPE, SHAPE, by_name, changed

STEPS = 18
WHOLE = {"--model": "dense", "--epochs": 2, "--devices": 1, "--ema": 0.9, "--save-every": 5, "--keep": 10}
SMALL = changed(RECIPE, network=CONV, ema=0.5)


def train(out, arguments=()):
    """Run `jbn train` in this process, which has eight devices."""
    jax.devices()
    return CliRunner().invoke(app, ["train", "--out", str(out), *map(str, arguments)], prog_name="jbn")


def options(**changes):
    return [part for option in (WHOLE | changes).items() for part in option]


def shapes(recipe, shape=SHAPE):
    return jax.eval_shape(lambda: initial_state(recipe, shape))


def restored(checkpoints, recipe=SMALL, devices=1, shape=SHAPE):
    with Checkpoints(checkpoints, 10) as kept:
        return kept.restore(shapes(recipe, shape), mesh_of(devices))


def end_of(out):
    recipe = changed(RECIPE, ema=0.9)
    state = restored(out / "checkpoints", recipe)
    assert int(state.step) == STEPS
    return state


def arrays(out):
    """Return the last checkpoint of a run, by name, as its own options describe it."""
    options, mesh = read_options(out, TrainOptions), mesh_of(1)
    parts = parts_of(options)
    recipe = trainer.Job(options, parts, mesh).recipe
    with Checkpoints(out / "checkpoints", 0) as checkpoints:
        return by_name(checkpoints.restore(shapes(recipe, parts.training.image_shape), mesh))


def steps_of(path):
    """Return the steps of whole checkpoints: one that is being written has another name."""
    return sorted(int(folder.name) for folder in path.iterdir() if folder.name.isdigit())


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


def folder(path, *parts):
    path.mkdir()
    for number, part in enumerate(parts):
        np.savez(path / f"part-{number}.npz", images=part.images, labels=part.labels)
    return path
