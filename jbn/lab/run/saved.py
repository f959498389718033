"""A network that a run has saved, and its data: what ``jbn diagnose``, ``evaluate`` and ``export`` begin with."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jbn.lab.data.images import Form
from jbn.lab.data.parts import Parts, parts_of
from jbn.lab.errors import FileError, OptionError
from jbn.lab.options import TrainOptions
from jbn.lab.run.checkpoints import Checkpoints, is_step
from jbn.lab.run.directory import CHECKPOINTS, OPTIONS, read_options
from jbn.lab.step import Recipe, State, initial_state, network_of


class Saved(NamedTuple):
    """A run, and which of its checkpoints is meant.

    Attributes:
        out: the folder of the run.
        step: that of the checkpoint, None for the last.
        options: those of the run.
    """

    out: Path
    step: int | None
    options: TrainOptions

    def data(self, *, validation: bool) -> Parts:
        """Return the data of the run, with those to watch where they are asked for."""
        options = self.options if validation else replace(self.options, validation=None)
        with blame_checkpoint(f"cannot use the data of the run in '{self.out}': "):
            parts = parts_of(options)
            began, now = self.options.fingerprint, parts.fingerprint
            if began != now and (validation or began.partition("-")[0] != parts.training.fingerprint):
                raise FileError("they are not what they were when it began")
        return parts

    @property
    def form(self) -> Form:
        """That of the training data, which need not be there any more but for a run of an earlier version."""
        options = self.options
        if len(options.image_shape) != 3:
            return self.data(validation=False).training.form
        height, width, channels = options.image_shape
        return Form((height, width, channels), options.classes, options.kind)

    def read(self, mesh: Mesh) -> tuple[Recipe, State]:
        """Return the recipe of the run and the state that it has saved, on the devices of ``mesh``.

        The length of an epoch is not that of the run: it decides learning rates, and no step is made.
        """
        form = self.form
        recipe = Recipe(self.options, network_of(self.options, form.classes), per_epoch=1)
        like = jax.eval_shape(lambda: initial_state(recipe, form.image_shape))
        with Checkpoints(self.out / CHECKPOINTS, keep=0) as checkpoints, blame_checkpoint():
            steps = checkpoints.steps()
            chosen = max(steps, default=0) if self.step is None else self.step
            if chosen not in steps:
                saved = f"saved are those of steps {', '.join(map(str, steps))}" if steps else "none is saved"
                which = f"no checkpoint of step {chosen}" if chosen else "no checkpoint"
                raise FileError(f"{which} in '{checkpoints.folder}'; {saved}")
            before = [self.out / CHECKPOINTS / str(step) for step in steps if step < chosen]
            with blame_checkpoint(fix=f"; take the one before it, '{before[-1]}'" if before else ""):
                return recipe, checkpoints.read(chosen, like, mesh)


def find_saved(path: Path) -> Saved:
    """Return what is meant by the folder of a run, or by that of one of its checkpoints.

    Raises:
        OptionError: it is none, or its options cannot be read.
    """
    whole = Path(os.path.realpath(path))  # it raises nothing, whatever is wrong with the name
    inside = whole.parent.name == CHECKPOINTS and is_step(whole.name)
    out, step = (whole.parent.parent, int(whole.name)) if inside else (_network_of(path), None)
    if not os.path.exists(out / OPTIONS):
        raise OptionError(
            "CHECKPOINT",
            f"no run of jbn train in '{out}'; expected its --out, or a checkpoint such as "
            f"'{Path('jbn-train', CHECKPOINTS, '100')}'",
        )
    with blame_checkpoint():
        return Saved(out, step, read_options(out, TrainOptions))


def _network_of(path: Path) -> Path:
    """Return the network that has batch normalization in a run of the demo; any other folder as it is."""
    inside = sorted(options.parent for options in path.glob(f"*/{OPTIONS}")) if os.path.isdir(path) else []
    if not inside:
        return path
    with blame_checkpoint():
        found = [network for network in inside if read_options(network, TrainOptions).batch_norm]
    if len(found) != 1:
        those = " or ".join(f"'{network}'" for network in found) or "another one: none of its networks has any"
        raise OptionError("CHECKPOINT", f"'{path}' is a run of jbn demo; expected a network with batch norm, {those}")
    return found[0]


@contextlib.contextmanager
def blame_checkpoint(what: str = "", option: str = "CHECKPOINT", fix: str = "") -> Iterator[None]:
    """Turn what is wrong with a file into an error of the argument of the command, or of the option that named it."""
    try:
        yield
    except (OptionError, FileError) as error:
        raise OptionError(option, f"{what}{error}{fix}") from None
