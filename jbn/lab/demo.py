"""``jbn demo``: train the two textbook networks with and without batch normalization, and show what it did."""

import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from jbn.atomic import replace_file
from jbn.lab.data.images import PART, TRAINING
from jbn.lab.devices import mesh_of, name_devices
from jbn.lab.errors import OptionError, Stopped, file_errors
from jbn.lab.figures import draw_demo
from jbn.lab.options import DemoOptions, DemoPlace, TrainOptions, TrainPlace
from jbn.lab.report import finding, say, show, table_of
from jbn.lab.run import directory
from jbn.lab.run.metrics import curve, gaps, history
from jbn.lab.step import PERCENTILES
from jbn.lab.train import train
from jbn.paths import count_of

NUMBERS = ("parameters", "test_accuracy", "test_loss", "median_step_ms")  # of a network's results
TITLES = {"digits": "Handwritten digits", "mnist": "5000 images of MNIST"}
SAVE_EVERY = 50  # A checkpoint takes about 50 ms, and a step from 1 ms (dense) to 300 ms (conv64).


def run(options: DemoOptions, place: DemoPlace, console: Console) -> None:
    """Train what ``options`` ask for, or go on with the run in ``place.out``; write results.json and figure.png there.

    Raises:
        OptionError: an option, or what is in ``place.out``, does not fit.
        Stopped, FileError: as ``train`` does.
    """
    mesh, most = mesh_of(place.devices), TRAINING[options.data]
    if options.batch_size > most:
        found = f"got '{options.batch_size}', but {options.data} has {most} training images"
        raise OptionError("--batch-size", f"{found}; expected a whole number from 2 to {most}")
    if place.resume:
        options = directory.resume(place, options)
        former = place.out / directory.CHECKPOINTS
        if former.exists():
            raise OptionError(
                "--resume",
                f"'{former}' is of an earlier jbn demo, whose checkpoints this one cannot read; expected a folder for "
                "each network: start a new run in another --out, or finish that one with the jbn that began it",
            )
    with directory.claim(place.out, None if place.resume else options):
        _train_all(options, place, console, mesh)


def _train_all(options: DemoOptions, place: DemoPlace, console: Console, mesh: Mesh) -> None:
    """Train what is not trained yet, write results and figure, and print what they say."""
    plans = [plan_of(options, model, batch_norm) for model in options.model for batch_norm in (False, True)]
    networks = [_train(plan, place, console, mesh) for plan in plans]
    images = {"training": TRAINING[options.data]} | dict.fromkeys(("validation", "test"), PART[options.data])
    directory.write_results(place.out, options, mesh, {"images": images, "networks": networks})
    how = f"stochastic gradient descent, batches of {options.batch_size}, seed {options.seed}"
    figure = place.out / directory.FIGURE
    with file_errors(figure):
        replace_file(figure, lambda file: draw_demo(networks, f"{TITLES[options.data]}, {how}", file))
    show(console, table_of(networks, name_devices(mesh)))
    for plain, normalized in zip(networks[::2], networks[1::2], strict=True):
        say(console, finding(plain, normalized))
    for name in (directory.FIGURE, directory.RESULTS):
        console.print(f"Wrote {place.out / name}", soft_wrap=True)


def plan_of(options: DemoOptions, model: str, batch_norm: bool) -> TrainOptions:
    """Return what determines a network: plain gradient descent, recorded to its end whatever comes of it."""
    return TrainOptions(
        model=model,
        data=options.data,
        batch_norm=batch_norm,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.rate(model),
        seed=options.seed,
        schedule="constant",
        warmup_epochs=0.0,
        weight_decay=0.0,
        momentum=0.0,
        record=True,
    )


def _train(plan: TrainOptions, place: DemoPlace, console: Console, mesh: Mesh) -> dict[str, Any]:
    """Return the entry of a network in the results, after the steps that are left; one with results is not touched."""
    out = place.out / plan.title.replace(" ", "-")
    resume = (out / directory.OPTIONS).exists()
    of_network = TrainPlace(out=out, devices=place.devices, save_every=SAVE_EVERY, keep=1, resume=resume)
    try:
        if not (out / directory.RESULTS).exists():
            train(plan, of_network, console)
        found = _kept(out, plan)
    except Stopped as stop:
        raise Stopped(f"{plan.title}: {stop}", stop.status) from None
    except OptionError as error:
        if error.option != "--resume":
            raise
        fix = f"remove '{out}' to train this network anew"
        raise OptionError("--resume", f"{str(error).rpartition('; ')[0]}; {fix}") from None
    entry = {"model": plan.model, "batch_norm": plan.batch_norm, "learning_rate": plan.learning_rate}
    entry |= {name: found[name] for name in NUMBERS}
    if (found["device"], found["devices"]) != (mesh.devices.flat[0].device_kind, mesh.size):
        entry["median_step_ms"] = None  # of other devices than those that the table names
    entry |= _history(out)
    say(console, f"{plan.title}: {found['test_accuracy']:.1%} on test after {count_of(plan.steps or 0, 'step')}")
    first = entry["first_step_with_loss_not_finite"]
    if first is not None:
        say(console, f"{plan.title}: the loss is not finite at step {first}; the record went on.")
    return entry


def _kept(out: Path, plan: TrainOptions) -> dict[str, Any]:
    """Return the results of a network; ``OptionError`` where they, or a part of its record, are not there any more."""
    path, lost = out / directory.RESULTS, gaps(history(out), plan.steps or 0)
    if lost:
        raise OptionError("--resume", f"'{out / directory.METRICS}' does not hold {lost} any more; the figure needs it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in (*NUMBERS, "device", "devices")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError("--resume", f"cannot read '{path}' ({error!r}); expected results") from None


def _history(out: Path) -> dict[str, Any]:
    """Return what figure and table show of a network while it learned, from its metrics."""
    lines = history(out)
    steps, losses = curve(lines, "loss")
    looks, accuracies = curve(lines, "validation_accuracy")

    def reach(accuracy: float) -> int | None:
        return next((step for step, value in zip(looks, accuracies, strict=True) if (value or 0) >= accuracy), None)

    return {
        "steps_to_90_percent": reach(0.90),
        "steps_to_95_percent": reach(0.95),
        "first_step_with_loss_not_finite": next(
            (step for step, loss in zip(steps, losses, strict=True) if loss is None), None
        ),
        "history": {
            "training_loss": losses,
            "evaluation_steps": looks,
            "validation_accuracy": accuracies,
            "validation_loss": curve(lines, "validation_loss")[1],
            "preactivation_percentiles": {str(part): curve(lines, f"preactivation_{part}")[1] for part in PERCENTILES},
        },
    }
