"""`jbn train`: train a network data-parallel on the devices of one or many processes, and survive their end."""

import contextlib
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from rich.console import Console

from jbn.lab import processes, run_directory
from jbn.lab.batches import Batches
from jbn.lab.blame import blame
from jbn.lab.checkpoints import Checkpoints
from jbn.lab.data import Held, Source, digits
from jbn.lab.devices import in_words, mesh_of, replicated
from jbn.lab.folder import open_folder
from jbn.lab.metrics import METRICS, Metrics
from jbn.lab.models import ConvNetwork, DenseNetwork, ResNet
from jbn.lab.recipe import Batch, Measures, Recipe, State, evaluated, initial, update
from jbn.lab.report import add_bar, progress_bars
from jbn.lab.results import versions
from jbn.lab.run_directory import FileError, OptionError

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "dense": lambda **fields: DenseNetwork(batch_norm=True, **fields),
    "conv": lambda **fields: ConvNetwork(batch_norm=True, **fields),
    "resnet": ResNet,
}
LEARNING_RATES = {"sgd": 0.05, "adamw": 1e-3}


@dataclass(frozen=True)
class Options:
    """What determines the result of a run."""

    model: str
    data: str | None
    validation: str | None
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float | None
    schedule: str
    warmup_epochs: float
    weight_decay: float
    augment: tuple[str, ...]
    ema: float
    dtype: str
    seed: int
    fingerprint: str = ""  # of the training data

    def rate(self) -> float:
        """Return the learning rate, that of the optimizer unless given."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]

    def in_words(self) -> dict[str, str]:
        """Return the learning rate as it takes effect."""
        return {"learning_rate": f"{self.rate():g}"}


class Place(NamedTuple):
    """How a run is carried out; its result is the same for any of these."""

    out: Path
    devices: int | None
    resume: bool
    at: int | None
    save_every: int
    keep: int


class Stopped(Exception):
    """A run that all processes end before its last step, and the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Work(NamedTuple):
    """All that the steps of a run need."""

    recipe: Recipe
    training: Batches
    validation: Batches | None
    mesh: Mesh
    console: Console


def run(options: Options, place: Place, *, chosen: Collection[str], console: Console) -> None:
    """Train as `options` say, or go on with the run in `place.out`, and write checkpoints, metrics and results there.

    With `place.resume` the options that the user chose must be those of the run.

    Raises:
        OptionError: an option, a file or a checkpoint does not fit; in all processes alike.
        Stopped: a signal, or a loss that is not finite; in all processes alike.
        FileError: this process cannot write a file of the run, or read one of the data.
    """
    mesh = mesh_of(place.devices)
    first = jax.process_index() == 0
    console.quiet = not first
    if place.resume:
        options = processes.together(lambda: run_directory.resume(place.out, options, chosen))
    training, validation = processes.together(lambda: data_of(options))
    began, options = options.fingerprint, replace(options, fingerprint=training.fingerprint)
    processes.same({run_directory.option(name): repr(value) for name, value in asdict(options).items()})
    if place.resume and began != training.fingerprint:
        raise OptionError("--data", f"is not what it was when the run in '{place.out}' began; expected the same files")
    work = _work(options, training, validation, mesh, console)
    if not place.resume:  # last, so that what is refused leaves no folder behind
        processes.together(lambda: run_directory.start(place.out, options) if first else None)
        processes.together(lambda: _seen(place.out))
    folder = place.out / run_directory.CHECKPOINTS
    with Checkpoints(folder, place.keep) as checkpoints, signals() as sent:
        state = processes.together(lambda: _begin(work, checkpoints, place))
        later = processes.together(lambda: checkpoints.set_aside(int(state.step)) if first else [])
        for path in later:
            console.print(f"Moved a later checkpoint to {path}", soft_wrap=True)
        with Metrics(place.out if first else None, int(state.step)) as metrics:
            state, seconds = _steps(work, state, checkpoints, metrics, sent, place)
        checkpoints.finish()
    found = _validated(work, state)
    if first:
        _conclude(options, work, state, seconds, found, place.out)


def _seen(out: Path) -> None:
    if not (out / run_directory.OPTIONS).exists():
        raise OptionError("--out", f"'{out}' of process 0 is not seen here; expected a folder that all machines share")


def data_of(options: Options) -> tuple[Source, Source | None]:
    """Return the training data and, where there are some, the validation data."""
    if options.data is None:
        if options.validation is not None:
            raise OptionError(
                "--validation", "is given without --data; expected both: the digits have a part of their own"
            )
        parts = digits(options.seed)
        return Held("digits, training", parts.training), Held("digits, validation", parts.validation)
    training: Source = open_folder(Path(options.data))
    if options.validation is None:
        return training, None
    validation: Source = open_folder(Path(options.validation), option="--validation")
    if validation.image_shape != training.image_shape:
        shapes = [" x ".join(map(str, part.image_shape)) for part in (validation, training)]
        raise OptionError(
            "--validation", f"'{options.validation}' holds images of {shapes[0]}; expected {shapes[1]}, as in --data"
        )
    if validation.classes > training.classes:
        raise OptionError(
            "--validation",
            f"'{options.validation}' has the label {validation.classes - 1}; expected at most {training.classes - 1}, "
            "the largest in --data",
        )
    return training, validation


def recipe_of(options: Options, batches: Batches) -> Recipe:
    """Return the recipe of a run whose training data are cut into these batches."""
    return Recipe(
        network=NETWORKS[options.model](
            classes=batches.source.classes, dtype=jnp.bfloat16 if options.dtype == "bfloat16" else None
        ),
        optimizer=options.optimizer,
        learning_rate=options.rate(),
        schedule=options.schedule,
        warmup_steps=round(options.warmup_epochs * batches.per_epoch),
        steps=options.epochs * batches.per_epoch,
        weight_decay=options.weight_decay,
        augment=tuple(sorted(options.augment)),
        ema=options.ema,
        seed=options.seed,
    )


def _work(options: Options, training: Source, validation: Source | None, mesh: Mesh, console: Console) -> Work:
    batches = Batches(training, options.batch_size, mesh)
    watched = None if validation is None else Batches(validation, options.batch_size, mesh)
    return Work(recipe_of(options, batches), batches, watched, mesh, console)


def _begin(work: Work, checkpoints: Checkpoints, place: Place) -> State:
    """Return the state that the run begins with, or goes on from."""
    shape = work.training.source.image_shape
    if not checkpoints.steps() and place.at is None:
        return State(*replicated(initial(work.recipe, shape), work.mesh))
    state = checkpoints.restore(jax.eval_shape(lambda: initial(work.recipe, shape)), work.mesh, place.at)
    work.console.print(f"Going on with '{place.out}' after step {state.step} of {work.recipe.steps}", soft_wrap=True)
    return state


def _steps(
    work: Work, state: State, checkpoints: Checkpoints, metrics: Metrics, sent: "Sent", place: Place
) -> tuple[State, list[float]]:
    """Make the steps that are left; return the last state and the seconds of each step but the first two."""
    recipe, batches = work.recipe, work.training
    step, seconds = int(state.step), []
    batch = batches.read(batches.rows(step, recipe.seed), sent.number)
    here = f"process {jax.process_index()}"

    def loss() -> str:
        saved = [f"step {last} is saved" for last in checkpoints.steps()[-1:]] or ["nothing is saved yet"]
        return f"{here} lost another process after step {step}; {saved[0]}. {go_on()}"

    processes.at_loss(loss)
    with progress_bars(work.console) as progress:
        bar = add_bar(progress, type(recipe.network).__name__, recipe.steps)
        while step < recipe.steps:
            began = time.perf_counter()
            state, measures = update(recipe, state, batch)
            looked_at, rows = batch, batches.rows(step, recipe.seed)
            if step + 1 < recipe.steps:  # read while the devices work
                batch = batches.read(batches.rows(step + 1, recipe.seed), sent.number)
            measured = Measures(*(value.item() for value in jax.device_get(measures)))
            if not math.isfinite(measured.loss) or not math.isfinite(measured.gradient_norm):
                checkpoints.finish()
                raise Stopped(_not_finite(work, state, looked_at, rows, step + 1, measured, checkpoints.steps()), 1)
            checkpoints.check()
            step += 1
            seconds.append(time.perf_counter() - began)
            metrics.write(step, **{name: value for name, value in measured._asdict().items() if name != "signal"})
            progress.update(bar, completed=step, loss=f"loss {measured.loss:.3g}")
            if step % batches.per_epoch == 0:
                found = _validated(work, state)
                metrics.write(step, **found)
                said = f"epoch {step // batches.per_epoch}, step {step}: loss {measured.loss:.3g}"
                progress.console.print(", ".join([said, *_in_words(found)]), soft_wrap=True)
            if step % place.save_every == 0 or step == recipe.steps or measured.signal:
                checkpoints.save(state)
            if measured.signal:
                checkpoints.finish()
                number = int(measured.signal)
                where = f"after step {step} of {recipe.steps}, which is saved"
                raise Stopped(f"stopped by {signal.Signals(number).name} {where}. {go_on()}", 128 + number)
    return state, seconds[2:]


def _validated(work: Work, state: State) -> dict[str, float]:
    """Return loss and accuracy on the validation data, of the weights and of their average."""
    if work.validation is None:
        return {}
    batches, found = work.validation, dict[str, float]()
    candidates = {"validation": {"params": state.params, "batch_stats": state.batch_stats}, "average": state.average}
    for name, variables in candidates.items():
        if variables is not None:
            parts = (batches.read(batches.in_order(index)) for index in range(batches.per_epoch))
            sums = [jax.device_get(evaluated(work.recipe.network, **variables, batch=part)) for part in parts]
            found |= {
                f"{name}_{what}": float(sum(map(float, values))) / len(batches.source)
                for what, values in zip(("loss", "accuracy"), zip(*sums, strict=True), strict=True)
            }
    return found


def _in_words(found: dict[str, float]) -> list[str]:
    return [f"{name} {found[f'{name}_accuracy']:.1%}" for name in ("validation", "average") if f"{name}_loss" in found]


def _not_finite(
    work: Work, state: State, batch: Batch, rows: np.ndarray, step: int, measured: Measures, saved: list[int]
) -> str:
    """Return the message of a loss or gradient that is not finite; `state` is that before the step."""
    what = (
        f"loss {measured.loss:g}" if not math.isfinite(measured.loss) else f"gradient norm {measured.gradient_norm:g}"
    )
    why = blame(work.recipe, state, batch)
    finite = (np.isfinite(work.training.source.rows(rows[i : i + 1]).images).all() for i in range(len(rows)))
    bad = next((row for row, fine in zip(rows, finite, strict=True) if not fine), None)
    if bad is not None:
        why = f"{work.training.source.where(int(bad))} has values that are not finite"
    last = f"the last good checkpoint is that of step {saved[-1]}" if saved else "nothing was saved before it"
    advice = "Mend the data" if bad is not None else "Try a smaller --learning-rate or a longer --warmup-epochs"
    return f"{what} at step {step}: {why}; {last}. {advice}, in another --out."


def _conclude(
    options: Options, work: Work, state: State, seconds: list[float], found: dict[str, float], out: Path
) -> None:
    """Write and say what came out."""
    path = out / run_directory.RESULTS
    content = {
        "options": asdict(options),
        "versions": versions(),
        "device": work.mesh.devices.flat[0].device_kind,
        "devices": work.mesh.size,
        "processes": jax.process_count(),
        "images": {
            "training": len(work.training.source),
            "validation": len(work.validation.source) if work.validation else 0,
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": int(state.step),
        "median_step_ms": round(float(np.median(seconds)) * 1e3, 4) if seconds else None,
    } | {name: value if math.isfinite(value) else None for name, value in found.items()}
    try:
        run_directory.write_json(path, content)
    except OSError as error:
        raise FileError(f"cannot write '{path}' ({error.strerror})") from error
    said = ", ".join(_in_words(found)) or "no validation data"
    pace = f", {content['median_step_ms']:g} ms a step" if seconds else ""
    work.console.print(
        f"{said} after {state.step} steps of {options.batch_size} images on {in_words(work.mesh)}{pace}", soft_wrap=True
    )
    for name in (METRICS, run_directory.RESULTS):
        work.console.print(f"Wrote {out / name}", soft_wrap=True)


class Sent:
    """The signal that this process was sent, 0 for none."""

    number = 0


@contextlib.contextmanager
def signals() -> Iterator[Sent]:
    """Note SIGTERM and Ctrl-C instead of ending; a second Ctrl-C ends at once."""
    sent = Sent()

    def note(number: int, _: FrameType | None) -> None:
        sent.number = number
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def go_on() -> str:
    """Return in words the command that goes on with this run."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--at":
            next(arguments, None)
        elif argument != "--resume" and not argument.startswith("--at="):
            kept.append(argument)
    return f"Go on with:\n  {shlex.join([*run_directory.program(), *kept, '--resume'])}"
