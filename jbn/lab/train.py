"""Training of one network, from its last checkpoint to its end: ``jbn train``, and each network of the demo."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jbn.atomic import replace_file
from jbn.lab import signals
from jbn.lab.data.batches import Batch, Batches
from jbn.lab.data.images import DATA, Source
from jbn.lab.data.parts import Parts, parts_of
from jbn.lab.devices import mesh_of, name_devices, replicate
from jbn.lab.errors import OptionError, Stopped, file_errors
from jbn.lab.figures import draw_run
from jbn.lab.options import TrainOptions, TrainPlace
from jbn.lab.report import bar, say, show, table_of_run, waiting
from jbn.lab.run import directory, processes
from jbn.lab.run.blame import blame
from jbn.lab.run.checkpoints import Checkpoints
from jbn.lab.run.metrics import Metrics, Pace, history
from jbn.lab.step import (
    PERCENTILES,
    PROBE_IMAGES,
    Measures,
    State,
    evaluate,
    initial_state,
    preactivations,
    recipe_of,
    update,
)
from jbn.paths import count_of, name_few

RANGE_IMAGES, FAR_FROM_ONE = 16, 25  # images whose values are looked at; standardized ones reach 10 or so
LOOK_EVERY = 5  # steps of a run that is recorded for a figure


def run(options: TrainOptions, place: TrainPlace, console: Console) -> None:
    """Join the other processes, ``train``, and say what came out."""
    if place.at is not None and not place.resume:
        raise OptionError("--at", f"got '{place.at}'; expected --resume beside it")
    with waiting(console, "Looking for devices ..."):
        processes.join(place)
        mesh = mesh_of(place.devices)  # before JAX is asked anything: it simulates no more devices afterwards
    console.quiet = jax.process_index() > 0
    processes.compare(place)
    found = train(options, place, console)
    batch_size = min(directory.read_options(place.out, TrainOptions).batch_size, found["images"]["training"])
    pace = "" if found["median_step_ms"] is None else f", {found['median_step_ms']:g} ms a step (median)"
    how = f"{count_of(found['steps'], 'step')} of {count_of(batch_size, 'image')} on {name_devices(mesh)}{pace}"
    show(console, table_of_run(history(place.out), -(-found["images"]["training"] // batch_size), how))
    for name in (directory.FIGURE, directory.RESULTS, directory.METRICS):
        console.print(f"Wrote {place.out / name}", soft_wrap=True)


def train(options: TrainOptions, place: TrainPlace, console: Console) -> dict[str, Any]:
    """Train as ``options`` say, or go on with the run in ``place.out``; write checkpoints, metrics and results there.

    Returns what was found.

    Raises:
        OptionError: an option, a file or a checkpoint does not fit; in all processes alike.
        Stopped: a signal, or a loss that is not finite where that ends the run; in all processes alike.
        FileError: this process cannot write a file of the run, or read one of the data.
    """
    mesh, first = mesh_of(place.devices), jax.process_index() == 0
    if place.resume:
        options = processes.agree(lambda: directory.resume(place, options))
    with waiting(console, "Reading the data ..."):
        parts = processes.agree(lambda: parts_of(options))
    began, options = (
        options.fingerprint,
        replace(options, fingerprint=parts.fingerprint, **parts.training.form._asdict()),
    )
    processes.compare(options)
    changed = [before != now for before, now in zip(began.split("-"), options.fingerprint.split("-"), strict=False)]
    if place.resume and any(changed):
        option = "--data" if changed[0] else "--validation"
        raise OptionError(option, f"is not what it was when the run in '{place.out}' began; expected the same files")
    job = Job(options, parts, mesh)
    notes = processes.agree(lambda: list(job.notes()))
    claim = directory.claim(place.out, None if place.resume else options)
    with contextlib.ExitStack() as held:  # last, so that what is refused leaves no folder behind
        processes.agree(lambda: held.enter_context(claim) if first else None)
        processes.agree(lambda: directory.find(place.out))
        for note in notes:
            say(console, f"Note: {note}.")
        return _finish(job, place, console)


def _finish(job: "Job", place: TrainPlace, console: Console) -> dict[str, Any]:
    """Make the steps that are left, write the results and return them."""
    state, pace = _fit(job, place, console)
    found, parts = job.look(state), job.parts
    if job.options.record and parts.test is not None:
        found |= job.evaluate("test", parts.test, state.variables)
    content = {
        "processes": jax.process_count(),
        "images": {"training": len(parts.training), "validation": len(parts.validation or ())},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": int(state.step),
        "median_step_ms": pace.milliseconds,
        **directory.json_numbers(found),
    }
    if jax.process_index() == 0:
        directory.write_results(place.out, job.options, job.mesh, content)
        if not job.options.record:  # the demo draws its networks beside each other
            _draw(job.options, place.out)
    return content


def _draw(options: TrainOptions, out: Path) -> None:
    """Draw loss and accuracy of all steps that are recorded, those before a stop too."""
    figure, how = out / directory.FIGURE, f"{options.optimizer}, learning rate {options.rate:g}"
    title = f"{options.model} on {options.data}: {how}, batches of {options.batch_size}, seed {options.seed}"
    with file_errors(figure):
        replace_file(figure, lambda file: draw_run(history(out), title, file))


class Job:
    """A network to train, its data on the devices, and what is looked at meanwhile.

    Attributes:
        mesh: the devices.
        batches: the training data.
        recipe: what makes a step.
        looks: the steps after which there is a look at the state.
    """

    def __init__(self, options: TrainOptions, parts: Parts, mesh: Mesh) -> None:
        self.options, self.parts, self.mesh = options, parts, mesh
        self.batches = Batches(parts.training, options.batch_size, mesh)
        self.recipe = recipe_of(options, self.batches)
        steps, epoch = self.recipe.steps, self.batches.per_epoch
        self.looks = {*range(0, steps, LOOK_EVERY), steps} if options.record else {*range(epoch, steps + 1, epoch)}

    def notes(self) -> Iterator[str]:
        """Yield what is allowed and seldom meant."""
        options, source, steps = self.options, self.parts.training, self.recipe.steps
        if options.data in DATA and Path(options.data).is_dir():
            yield f"--data {options.data} are the images that jbn knows by this name; the folder is ./{options.data}"
        there, classes = np.unique(source.labels), source.classes
        if len(there) < classes:
            few = f"of the labels 0 to {classes - 1} the training data have {len(there)}: {name_few(map(str, there))}"
            yield f"{few}. The network has {classes} outputs; numbered from 0 on the classes would need {len(there)}"
        if options.batch_size > len(source):
            what = f"--batch-size {options.batch_size} is more than the {len(source)} training images"
            yield f"{what}: every step takes all of them"
        if steps <= self.recipe.warmup:
            what = f"--warmup-epochs {options.warmup_epochs:g} lasts {count_of(self.recipe.warmup, 'step')}"
            reached = float(self.recipe.rate()(steps - 1))
            yield f"{what}, and the run {steps}: the learning rate grows to its end, where it is {reached:.3g}"
        for option, part in (("--data", source), ("--validation", self.parts.validation)):
            if part is not None:
                yield from _note_range(option, part)

    def look(self, state: State) -> dict[str, float]:
        """Return loss and accuracy on the validation data, of the weights and of their average.

        For a figure also the percentiles of what enters the last ReLU for some images.
        """
        source = self.parts.validation
        if source is None:
            return {}
        found = self.evaluate("validation", source, state.variables)
        if state.average is not None:
            found |= self.evaluate("average", source, state.average)
        if self.options.record:
            probe = replicate(source.rows(np.arange(PROBE_IMAGES)).images, self.mesh)
            values = jax.device_get(preactivations(self.recipe.network, state.variables, probe))
            found |= {f"preactivation_{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
        return found

    def evaluate(self, name: str, source: Source, variables: dict[str, Any]) -> dict[str, float]:
        """Return loss and accuracy on data, by the running statistics."""
        batches = Batches(source, len(source) if self.options.record else self.options.batch_size, self.mesh)
        parts = (batches.read(batches.in_order(index)) for index in range(batches.per_epoch))
        sums = [jax.device_get(evaluate(self.recipe.network, variables, part)) for part in parts]
        loss, right = (float(sum(map(float, values))) / len(source) for values in zip(*sums, strict=True))
        return {f"{name}_loss": loss, f"{name}_accuracy": right}

    def begin(self, checkpoints: Checkpoints, at: int | None) -> State:
        """Return the state that the run begins with, or goes on from."""
        shape = self.parts.training.image_shape
        if checkpoints.steps() or at is not None:
            return checkpoints.restore(jax.eval_shape(lambda: initial_state(self.recipe, shape)), self.mesh, at)
        return State(*replicate(initial_state(self.recipe, shape), self.mesh))

    def steps(self, state: State, sent: list[int]) -> Iterator[tuple[State, Measures, Batch, float]]:
        """Make the steps that are left; yield the state after each, what it measured, its batch and its seconds."""

        def read(step: int) -> Batch:
            return self.batches.read(self.batches.rows(step, self.options.seed), max(sent, default=0))

        batch = read(int(state.step))
        for step in range(int(state.step) + 1, self.recipe.steps + 1):
            began = time.perf_counter()
            state, measures = update(self.recipe, state, batch)
            used, batch = batch, read(step) if step < self.recipe.steps else batch  # while the devices work
            measured = Measures(*(value.item() for value in jax.device_get(measures)))
            yield state, measured, used, time.perf_counter() - began


def _fit(job: Job, place: TrainPlace, console: Console) -> tuple[State, Pace]:
    """Make the steps that are left; return the last state, and how long a step took."""
    here, first = f"process {jax.process_index()}", jax.process_index() == 0
    record, steps = job.options.record, job.recipe.steps
    with Checkpoints(place.out / directory.CHECKPOINTS, place.keep) as checkpoints, signals.note() as sent:
        with waiting(console, "Compiling ..."):
            state = begun = processes.agree(lambda: job.begin(checkpoints, place.at))
        step = int(begun.step)
        pace = Pace(step, job.batches.per_epoch)
        if step:
            console.print(f"Going on with '{place.out}' after step {step} of {steps}", soft_wrap=True)
        for path in processes.agree(lambda: checkpoints.set_aside(step) if first else []):
            console.print(f"Moved a later checkpoint to {path}", soft_wrap=True)

        def words_of_loss() -> str:
            saved = [f"step {last} is saved" for last in checkpoints.steps()[-1:]] or ["nothing is saved yet"]
            return f"{here} lost another process after step {step}; {saved[0]}. {directory.go_on()}"

        processes.set_last_words(words_of_loss)
        with (
            bar(console, job.options.title, steps, step) as show_step,
            Metrics(place.out if first else None, step) as metrics,
        ):
            if metrics.lost:
                say(console, f"Note: '{place.out / directory.METRICS}' does not hold {metrics.lost} any more.")
            if step == 0 and 0 in job.looks:
                metrics.write(0, **job.look(begun))
            for state, measured, batch, took in job.steps(begun, sent):
                if not (record or np.isfinite([measured.loss, measured.gradient_norm]).all()):
                    checkpoints.finish()
                    raise Stopped(_not_finite(job, state, batch, measured, checkpoints.steps()), 1)
                checkpoints.check()
                step += 1
                pace.note(step, batch.valid is not None, took)
                metrics.write(step, **{name: value for name, value in measured._asdict().items() if name != "signal"})
                show_step(step, loss=f"loss {measured.loss:.3g}")
                if step in job.looks:
                    found = job.look(state)
                    metrics.write(step, **found)
                    show_step(step, accuracy="".join(_accuracies(found)[:1]))  # a terminal has no room for more
                    if not record:
                        epoch = f"epoch {step // job.batches.per_epoch}, step {step}: loss {measured.loss:.3g}"
                        say(console, ", ".join([epoch, *_accuracies(found)]))
                if step % place.save_every == 0 or step == steps or measured.signal:
                    checkpoints.save(state)
                if measured.signal:
                    checkpoints.finish()
                    number = int(measured.signal)
                    said = f"stopped by {signal.Signals(number).name} after step {step} of {steps}, which is saved"
                    raise Stopped(f"{said}. {directory.go_on()}", 128 + number)
        checkpoints.finish()
    return state, pace


def _note_range(option: str, source: Source) -> Iterator[str]:
    """Yield a sentence where some images are far from the values, near 1, that the networks are made for."""
    rows = np.unique(np.linspace(0, len(source) - 1, RANGE_IMAGES).astype(int))
    largest = float(np.abs(source.rows(rows).images).max())
    if largest == 0:
        yield f"every value in {count_of(len(rows), 'image')} of {option} is 0: images that are alike teach nothing"
    elif np.isfinite(largest) and not 1 / FAR_FROM_ONE <= largest <= FAR_FROM_ONE:
        seen = f"the largest value in {count_of(len(rows), 'image')} of {option} is {largest:.3g}"
        yield f"{seen} (uint8 is divided by 255, floats are taken as they are): scale them to about 1"


def _accuracies(found: dict[str, Any]) -> list[str]:
    """Return in words how often the network was right in a look, and the average of its weights."""
    return [f"{name} {found[f'{name}_accuracy']:.1%}" for name in ("validation", "average") if f"{name}_loss" in found]


def _not_finite(job: Job, state: State, batch: Batch, measured: Measures, saved: list[int]) -> str:
    """Return the message of a loss or gradient that is not finite; ``state`` is that before the step."""
    step, source = int(state.step), job.parts.training
    what = f"gradient norm {measured.gradient_norm:g}" if np.isfinite(measured.loss) else f"loss {measured.loss:g}"
    why, advice = blame(job.recipe, state, batch), "Try a smaller --learning-rate or a longer --warmup-epochs"
    for row in job.batches.rows(step, job.options.seed):
        if not np.isfinite(source.rows(np.array([row])).images).all():
            why, advice = f"{source.where(int(row))} has values that are not finite", "Mend the data"
            break
    last = f"the last good checkpoint is that of step {saved[-1]}" if saved else "nothing was saved before it"
    return f"{what} at step {step + 1}: {why}; {last}. {advice}, in another --out."
