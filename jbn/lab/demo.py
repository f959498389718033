"""`jbn demo`: train the two textbook networks with and without batch normalization, and show what it did."""

import shlex
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from rich.console import Console

from jbn.lab import run_directory
from jbn.lab.data import TEST_SIZE, TRAINING_SIZE, VALIDATION_SIZE, Digits, digits, enlarged
from jbn.lab.devices import in_words, mesh_of, sharded
from jbn.lab.figures import draw_demo
from jbn.lab.models import MODELS
from jbn.lab.report import add_bar, finding, progress_bars, show_step, table_of
from jbn.lab.results import network_results, versions
from jbn.lab.run_directory import OptionError
from jbn.lab.training import Interrupted, train


@dataclass(frozen=True)
class Options:
    """What determines a run; `learning_rate` None stands for each model's own."""

    model: tuple[str, ...]
    learning_rate: float | None
    steps: int
    batch_size: int
    seed: int

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each model."""
        return {name: self.learning_rate or MODELS[name].learning_rate for name in self.model}

    def in_words(self) -> dict[str, str]:
        """Return the learning rates as they take effect."""
        return {"learning_rate": ", ".join(f"{rate:g} for {model}" for model, rate in self.rates().items())}


class Variant(NamedTuple):
    """One network of a run: a model with or without batch norm."""

    model: str
    batch_norm: bool

    @property
    def title(self) -> str:
        """The name that people read."""
        return f"{self.model} {'with' if self.batch_norm else 'without'} batch norm"

    @property
    def directory(self) -> str:
        """The name of its folder of checkpoints."""
        return f"{self.model}-{'with' if self.batch_norm else 'without'}-batch-norm"


def run(options: Options, out: Path, *, devices: int, resume: bool, chosen: Collection[str], console: Console) -> None:
    """Train what `options` ask for on so many devices and write checkpoints, results.json and figure.png to `out`.

    With `resume`, go on with the run in `out`; the options that the user chose must be the same as there.
    """
    options = _checked(options)
    mesh = mesh_of(devices)
    if resume:
        options = run_directory.resume(out, options, chosen)
    else:
        run_directory.start(out, options)
    try:
        networks = _train_all(options, out / run_directory.CHECKPOINTS, mesh, console)
        _write(options, networks, mesh, out)
    except KeyboardInterrupt:
        console.print(f"Go on with:\n  {resume_command(out, devices)}", soft_wrap=True)
        raise
    console.print(table_of(networks, in_words(mesh)))
    for model in options.model:
        sentence = finding(*(network for network in networks if network["model"] == model))
        console.print(sentence, soft_wrap=True)
    for name in (run_directory.FIGURE, run_directory.RESULTS):
        console.print(f"Wrote {out / name}", soft_wrap=True)


def resume_command(out: Path, devices: int) -> str:
    """Return the command that goes on with the run in `out` on as many devices."""
    same = [] if devices == 1 else ["--devices", str(devices)]
    return shlex.join([*run_directory.program(), "demo", "--out", str(out), "--resume", *same])


def _write(options: Options, networks: list[dict[str, Any]], mesh: Mesh, out: Path) -> None:
    content = {
        "options": asdict(options),
        "versions": versions(),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "images": {"training": TRAINING_SIZE, "validation": VALIDATION_SIZE, "test": TEST_SIZE},
        "networks": networks,
    }
    run_directory.write_json(out / run_directory.RESULTS, content)
    how = f"stochastic gradient descent, batches of {options.batch_size}, seed {options.seed}"
    title = f"Handwritten digits, {how}"
    run_directory.write_atomically(out / run_directory.FIGURE, lambda path: draw_demo(networks, title, path))


def _checked(options: Options) -> Options:
    for name in options.model:
        if name not in (*MODELS, "all"):
            raise OptionError("--model", f"got {name!r}, expected {', '.join(MODELS)} or all")
    chosen = MODELS if "all" in options.model else [name for name in MODELS if name in options.model]
    return replace(options, model=tuple(chosen))


def _train_all(options: Options, checkpoints: Path, mesh: Mesh, console: Console) -> list[dict[str, Any]]:
    variants = [Variant(model, batch_norm) for model in options.model for batch_norm in (False, True)]
    small = digits(options.seed)
    networks = []
    try:
        with progress_bars(console) as progress:
            tasks = [add_bar(progress, variant.title, options.steps) for variant in variants]
            for variant, task in zip(variants, tasks, strict=True):
                progress.update(task, loss="compiling")
                data = enlarged(small) if MODELS[variant.model].enlarged else small
                report = partial(show_step, progress, task)
                networks.append(_train_one(variant, options, data, checkpoints, mesh, report))
                if not console.is_terminal:
                    accuracy = f"{networks[-1]['test_accuracy']:.1%}"
                    console.print(f"{variant.title}: {accuracy} on test after {options.steps} steps", soft_wrap=True)
    except Interrupted as stop:
        saved = f"the last checkpoint holds step {stop.saved}" if stop.saved else "nothing of it is saved yet"
        where = f"{variants[len(networks)].title}: stopped at step {stop.step} of {options.steps}"
        console.print(f"{where}; {saved}.", soft_wrap=True)
        raise
    return networks


def _train_one(
    variant: Variant, options: Options, data: Digits, checkpoints: Path, mesh: Mesh, report: Callable[..., None]
) -> dict[str, Any]:
    model = MODELS[variant.model]
    learning_rate = options.rates()[variant.model]
    network = model.network(batch_norm=variant.batch_norm)
    trained = train(
        network,
        data,
        checkpoints / variant.directory,
        learning_rate=learning_rate,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        mesh=mesh,
        report=report,
    )
    return {
        "model": variant.model,
        "batch_norm": variant.batch_norm,
        "learning_rate": learning_rate,
    } | network_results(network, trained, sharded(data.test, mesh))
