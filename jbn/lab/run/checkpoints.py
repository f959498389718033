"""Checkpoints that a run goes on from on any number of devices: written aside, complete or absent, and checked."""

import contextlib
import functools
import gc
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jbn.lab.errors import FileError, OptionError, file_errors
from jbn.lab.step import State

STATE, CONTENTS = "state", "contents"
# In the names of folders that are no checkpoint: Orbax's own mark of one that is being written.
UNFINISHED = ".orbax-checkpoint-tmp"


def is_step(name: str) -> bool:
    """Return whether a checkpoint has this name: it is a number as Python writes it."""
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The last ``keep`` checkpoints of a run in a folder, named by their steps, written while training goes on.

    With ``keep`` 0 they are only read, whoever writes meanwhile.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder.absolute(), keep
        # Orbax's manager would hide that one process cannot write until the others have waited ten minutes for it.
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        if keep and jax.process_index() == 0:
            for path in self.folder.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)  # a write that has failed may still end here, in its own thread

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, and after these errors they may not come.
        if kind is None or not issubclass(kind, FileError | RuntimeError):
            self._checkpointer.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # it may be this write that has failed
                self._checkpointer.wait_until_finished()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order.

        ``FileError`` where the folder is there and cannot be read: a run that took it for empty would begin anew.
        """
        try:
            return sorted(int(name) for name in os.listdir(self.folder) if is_step(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileError(f"cannot read '{self.folder}' ({error.strerror})") from None

    def save(self, state: State) -> None:
        """Begin to write a state; ``FileError`` where this cannot begin, or where the write before it has failed."""
        step = int(state.step)
        with file_errors(self.folder / str(step)):
            self.finish()
            if step not in self.steps():  # where a run goes on after its last step, it is there
                parts = {STATE: ocp.args.StandardSave(state._asdict()), CONTENTS: ocp.args.JsonSave(_contents(state))}
                self._checkpointer.save(self.folder / str(step), args=ocp.args.Composite(**parts))

    def check(self) -> None:
        """Raise ``FileError`` where what was begun has failed."""
        with file_errors(self.folder):
            self._checkpointer.check_for_errors()

    def finish(self) -> None:
        """Wait until what was begun is written, and delete all but the last; ``FileError`` where it cannot be."""
        with file_errors(self.folder):
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                # Renamed first: a process killed meanwhile leaves no part of a checkpoint under its name.
                for path in [self.folder / str(step) for step in self.steps()[: -self._keep]]:
                    shutil.rmtree(path.rename(path.with_name(path.name + UNFINISHED)))

    def restore(self, like: State, mesh: Mesh, at: int | None = None) -> State:
        """Return the state of step ``at``, the last one for None, on the devices of ``mesh``.

        Args:
            like: a state of the same network, or its shapes and dtypes.
            mesh: the devices, as many as there are now.
            at: the step.

        Raises:
            OptionError: there is no checkpoint of that step, or it cannot be read, is damaged or is of something else:
                the message has its path and offers the one before it.
        """
        steps = self.steps()
        if at is not None and at not in steps:
            saved = f"one of {', '.join(map(str, steps))}, saved" if steps else "no --at, for nothing is saved"
            raise OptionError("--at", f"got '{at}'; expected {saved} in '{self.folder}'")
        chosen = steps[-1] if at is None else at
        before = [step for step in steps if step < chosen]
        offer = f"go on from the one before it with --resume --at {before[-1]}" if before else "no other is before it"
        try:
            return self.read(chosen, like, mesh)
        except FileError as error:
            raise OptionError("--resume", f"{error}; {offer}") from None

    def read(self, step: int, like: State, mesh: Mesh) -> State:
        """Return the state of a step as ``restore`` does, ``FileError`` where it cannot be used."""
        whole = NamedSharding(mesh, PartitionSpec())
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), like)
        with _quiet():
            try:
                return self._read(step, abstract)
            except Exception as error:
                reason = " ".join(str(error).partition("See full TensorStore")[0].split())[:300]
        # Not in the handler: the error of Orbax would stay alive, and what it holds would complain later.
        raise FileError(f"the checkpoint '{self.folder / str(step)}' cannot be used ({reason})")

    def set_aside(self, after: int) -> list[Path]:
        """Move later checkpoints into a folder of their own, out of the way of a run that goes on; the last one first.

        A process killed meanwhile leaves none that is later than those that have moved.
        """
        aside, moved = self.folder.with_name(f"{self.folder.name}-set-aside"), []
        for step in [step for step in reversed(self.steps()) if step > after]:
            aside.mkdir(exist_ok=True)
            places = (aside / f"{step}{suffix}" for suffix in ("", *(f".{again}" for again in range(1, 1000))))
            moved.append((self.folder / str(step)).rename(next(place for place in places if not place.exists())))
        return moved

    def _read(self, step: int, like: State) -> State:
        def part(name: str, arguments: Any) -> Any:
            return self._checkpointer.restore(self.folder / str(step), ocp.args.Composite(**{name: arguments}))[name]

        # Orbax casts what differs in dtype and does not see a flipped bit: both are told apart here.
        stored, expected = part(CONTENTS, ocp.args.JsonRestore()), _kinds(like)
        for name in sorted(stored.keys() | expected.keys()):
            there, here = stored.get(name, ["nothing"])[0], expected.get(name, "nothing")
            if there != here:
                raise ValueError(f"{name} is {there}; this run expects {here}")
        state = State(**part(STATE, ocp.args.StandardRestore(like._asdict())))
        for name, (_, checksum) in _contents(state).items():
            if checksum != stored[name][1]:
                raise ValueError(f"the values of {name} are not those that were saved")
        return state


def _kinds(state: State) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state._asdict())
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}


def _contents(state: State) -> dict[str, list[Any]]:
    """Return the kind and a checksum of every array."""
    values = (np.ascontiguousarray(leaf) for leaf in jax.device_get(jax.tree.leaves(state._asdict())))
    sums = [zlib.crc32(value.tobytes()) for value in values]
    return {name: [kind, total] for (name, kind), total in zip(_kinds(state).items(), sums, strict=True)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let Orbax say nothing about a checkpoint that cannot be read: it logs, and its unfinished reads complain."""
    hook, logger = getattr(sys.unraisablehook, "__wrapped__", sys.unraisablehook), logging.getLogger("absl")
    level = logger.level

    @functools.wraps(hook)
    def of_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # a read that ends after this, in a thread of its own
            hook(unraisable)

    sys.unraisablehook = lambda _: None
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = of_others
        logger.setLevel(level)
