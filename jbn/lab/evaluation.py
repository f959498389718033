"""``jbn evaluate``: how often a network that a run has saved is right, by which statistics, and in which classes."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from rich import box
from rich.console import Console
from rich.table import Column, Table

from jbn.lab.data.batches import Batch, Batches
from jbn.lab.data.images import DATA, Source
from jbn.lab.data.parts import fit, open_beside, parts_of
from jbn.lab.devices import mesh_of
from jbn.lab.errors import OptionError
from jbn.lab.options import EvaluateOptions, TrainOptions
from jbn.lab.report import show, waiting
from jbn.lab.run.saved import Saved, blame_checkpoint, find_saved
from jbn.lab.step import judge
from jbn.paths import count_of

MOST_CLASSES, MOST_MISTAKES = 20, 3  # rows of the table of classes, and for what else a class is taken in a row


class Judged(NamedTuple):
    """What a network says to all images, in their order.

    Attributes:
        by: the weights and the statistics, in words.
        losses: float32 (n,).
        answers: int (n,), the classes.
    """

    by: str
    losses: np.ndarray
    answers: np.ndarray

    @property
    def loss(self) -> float:
        """The mean of the losses."""
        return float(self.losses.mean(dtype=np.float64))


class Evaluated(NamedTuple):
    """How a network was judged, and on what.

    Attributes:
        labels: int32 (n,).
        judged: by the running statistics first, where there are any.
    """

    title: str
    labels: np.ndarray
    judged: tuple[Judged, ...]


def run(options: EvaluateOptions, console: Console) -> bool:
    """Print how a network was judged, and return whether its loss is finite.

    Raises:
        OptionError: as ``evaluate_run`` says.
    """
    with waiting(console, "Evaluating; most of the time it compiles ..."):
        found = evaluate_run(options)
    console.print(found.title, soft_wrap=True, highlight=False)
    for table in (table_of(found), table_of_classes(found)):
        console.print()
        show(console, table)
    return bool(np.isfinite(found.judged[0].loss))


def evaluate_run(options: EvaluateOptions) -> Evaluated:
    """Run all images through a checkpoint, on one device; nothing is written.

    Raises:
        OptionError: there is no such checkpoint, there are no data to evaluate on, or one of both cannot be read.
    """
    saved, mesh = find_saved(options.checkpoint), mesh_of(1)
    source, images = _data_of(saved, options.data)
    recipe, state = saved.read(mesh)
    batches = Batches(source, options.batch_size or saved.options.batch_size, mesh)
    # Shuffled, for a folder may hold one class after the other, and no batch of training does. In equal shares, for
    # the statistics of a last batch of few images would be those of few.
    order = np.concatenate([batches.rows(step, seed=0) for step in range(batches.per_epoch)])
    shares = np.array_split(order, batches.per_epoch)
    held = "running statistics" if state.batch_stats else "no statistics"  # a network without batch norm has none
    ways = [(held, state.variables, False)]
    if state.batch_stats and len(source) > 1:
        ways.append((f"statistics of batches of {len(shares[0])}", state.variables, True))
    if state.average is not None:
        ways.append((f"average of weights, {held}", state.average, False))
    with blame_checkpoint(option="CHECKPOINT" if options.data is None else "--data"):
        judged = tuple(
            Judged(by, *_judge(recipe.network, variables, train, batches, shares)) for by, variables, train in ways
        )
    title = f"{saved.options.model} in '{saved.out}' after step {state.step}, {images}"
    return Evaluated(title, source.labels, judged)


def _data_of(saved: Saved, other: str | None) -> tuple[Source, str]:
    """Return the images to evaluate on, and in words which they are."""
    options, among = saved.options, "the training data"
    if other in DATA:
        # The split of the run: of its own data, none of these was trained with.
        test = parts_of(TrainOptions(model=options.model, data=other, seed=options.seed)).test
        assert test is not None
        fit(test, saved.form, other, "--data", among)
        return test, f"{count_of(len(test), 'image')} of the test of {other}"
    if other is not None:
        found = open_beside(saved.form, Path(other), "--data", among)
        return found, f"{count_of(len(found), 'image')} in '{other}'"
    try:
        validation = saved.data(validation=True).validation
    except OptionError as error:
        raise OptionError(error.option, f"{error}; --data names others to evaluate on") from None
    if validation is None:
        lacking = f"is missing, and the run in '{saved.out}' was started without --validation"
        raise OptionError("--data", f"{lacking}; expected a folder of images to evaluate on, digits or mnist")
    return validation, f"{count_of(len(validation), 'image')} of its validation"


def _judge(
    network: nn.Module, variables: Any, train: bool, batches: Batches, shares: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return losses and answers for all images, in their order."""
    losses, answers = np.zeros(len(batches.source), np.float32), np.zeros(len(batches.source), int)
    for rows in shares:
        said = jax.device_get(_answer(network, train, variables, batches.read(rows)))
        losses[rows], answers[rows] = (values[: len(rows)] for values in said)
    return losses, answers


@partial(jax.jit, static_argnums=(0, 1))
def _answer(network: nn.Module, train: bool, variables: Any, batch: Batch) -> tuple[Array, Array]:
    """Return the loss and the answer to each image, by the statistics of the batch where it is one of training."""
    more: dict[str, Any] = {"valid": batch.valid, "mutable": ["batch_stats"]} if train else {}
    logits: Any = network.apply(variables, batch.images, train=train, **more)
    logits = logits[0] if train else logits
    return judge(logits, batch.labels)[0], logits.argmax(-1)


def table_of(found: Evaluated) -> Table:
    """Return a row for each way to judge."""
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("loss", "accuracy", "right"))
    table = Table(Column("by", overflow="fold"), *numbers, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for judged in found.judged:
        right = judged.answers == found.labels
        loss = f"{judged.loss:#.4g}" if np.isfinite(judged.loss) else "inf/NaN"
        table.add_row(judged.by, loss, f"{right.mean():.1%}", f"{right.sum()} of {right.size}")
    return table


def table_of_classes(found: Evaluated) -> Table:
    """Return a row for each class that there are images of, as judged first; of many classes the worst."""
    answers, labels = found.judged[0].answers, found.labels
    classes, images = np.unique(labels, return_counts=True)
    right = np.array([(answers[labels == each] == each).mean() for each in classes])
    shown = np.arange(len(classes))
    caption = f"by {found.judged[0].by}; taken for: which other classes its images are taken for most often"
    if len(classes) > MOST_CLASSES:
        shown = np.argsort(right, kind="stable")[:MOST_CLASSES]
        caption = f"the worst {MOST_CLASSES} of {len(classes)} classes, {caption}"
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("class", "images", "right"))
    table = Table(*numbers, "taken for", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption)
    for index in shown:
        others, times = np.unique(answers[(labels == classes[index]) & (answers != labels)], return_counts=True)
        most = np.argsort(-times, kind="stable")[:MOST_MISTAKES]
        mistakes = ", ".join(f"{others[each]} ({times[each]})" for each in most)
        table.add_row(str(classes[index]), str(images[index]), f"{right[index]:.1%}", mistakes)
    return table
