"""The processes of a run: JAX's own runtime joins them, and each ends in bounded time where another is lost."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import typer
from jax.experimental import multihost_utils

from jbn.lab import signals
from jbn.lab.errors import FileError, OptionError, Stopped
from jbn.lab.options import Options, Place, TrainPlace, flag
from jbn.lab.run.directory import OPTIONS, go_on

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, start it again.
LOST = 75
MESSAGE_BYTES = 2**14
# A folder and an address may be called otherwise elsewhere.
MAY_DIFFER = ("typed", "out", "coordinator", "process_id")

T = TypeVar("T")
_kept: dict[str, Any] = {}


def join(place: TrainPlace) -> None:
    """Join the other processes of the run: at an address, or those that the cluster names; else be the only one.

    JAX gives up ``place.timeout`` seconds after the last sign of life of another process, at the start and later.
    """
    names, within = ("coordinator", "num_processes", "process_id"), f"within --timeout {place.timeout} seconds"
    given = {flag(name): getattr(place, name) for name in names}
    missing = [option for option, value in given.items() if value is None]
    if not place.cluster and len(missing) == len(given):
        return
    if not place.cluster and missing:
        expected = f"expected {', '.join(given)} together, or --cluster where the cluster tells them"
        raise OptionError(missing[0], f"is missing; {expected}")
    number, count = place.process_id, place.num_processes
    if number is not None and count is not None and number >= count:
        raise OptionError("--process-id", f"got '{number}'; expected less than --num-processes {count}: the first is 0")
    here = "this process" if place.process_id is None else f"process {place.process_id}"
    set_last_words(lambda: f"{here} did not find the others; expected all of them {within}")
    _watch_aborts()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            coordinator_bind_address=bind_address(place.coordinator),
            initialization_timeout=place.timeout,
            heartbeat_timeout_seconds=place.timeout,
            shutdown_timeout_seconds=place.timeout,
        )
    except (ValueError, RuntimeError) as error:
        option, expected = "--cluster", "SLURM, Open MPI or a TPU slice, or --coordinator and its two"
        if not place.cluster:
            at = "with the same --coordinator, an address of process 0 that all of them reach, and a --process-id"
            option, expected = "--coordinator", f"--num-processes {count} of them {at} of their own, {within}"
        reason = str(error).splitlines()[0]
        raise OptionError(option, f"cannot join the other processes ({reason}); expected {expected}") from None


def bind_address(coordinator: str | None) -> str | None:
    """Return where process 0 listens, None for every address of its machine.

    That is where it is reached, if that is an address of this machine. What a name stands for differs between machines,
    and behind a gateway the address is not here at all.
    """
    host, _, port = (coordinator or "").rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            socket.inet_pton(family, host)
            probe.bind((host, 0))
            return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
    return None


def set_last_words(words: Callable[[], str]) -> None:
    """Let this process say ``words()``, and end with exit status 75, where another one is lost."""
    _kept["words"] = words


def _watch_aborts() -> None:
    """Have the last word where JAX's runtime ends this process.

    It learns of a lost process in a thread of its own and calls abort(), which no Python handler outlives:
    ``signal.signal`` would wait for the main thread, and that one waits for the lost process.
    """

    def last_words(_: int) -> None:
        sys.stdout.flush()
        os.write(2, f"jbn: {_kept['words']()}\n".encode())  # nothing of JAX here: it would wait for the others
        os._exit(LOST)

    _kept["handler"] = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)  # it must outlive this call
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _kept["handler"])


def agree(check: Callable[[], T]) -> T:
    """Return what ``check`` returns; where it raises ``OptionError`` in one process, raise that in all of them."""
    failure, result = None, None
    try:
        result = check()
    except OptionError as error:
        failure = error
    for process, said in enumerate(_gather([failure.option, str(failure)] if failure else [])):
        if said:
            failure = failure or OptionError(said[0], f"{said[1]} (says process {process})")
    if failure:
        raise failure
    return result  # type: ignore[return-value]


def compare(options: Options | Place) -> None:
    """Raise ``OptionError`` unless the options are the same in all processes, but for those that may differ.

    Those of how a run is carried out must be too: they say when all processes do something together, and one that does
    it alone waits for ever.
    """
    values = {flag(name): repr(value) for name, value in asdict(options).items() if name not in MAY_DIFFER}
    for process, said in enumerate(_gather(values)):
        for option, value in values.items():
            if said[option] != value:
                here = f"stands for {value} in process {jax.process_index()} and for {said[option]} in process"
                expected = "expected the same command and the same files everywhere, but for --process-id"
                raise OptionError(option, f"{here} {process}; {expected}")


def _gather(said: Any) -> list[Any]:
    """Return what each process says, as JSON values."""
    if jax.process_count() == 1:
        return [said]
    line = np.zeros(MESSAGE_BYTES, np.uint8)
    content = json.dumps(said).encode("ascii")
    line[: len(content)] = np.frombuffer(content, np.uint8)
    return [json.loads(bytes(row).rstrip(b"\0")) for row in np.asarray(multihost_utils.process_allgather(line))]


@contextlib.contextmanager
def exit_status(out: Path) -> Iterator[None]:
    """Say why the run in ``out`` ends before its time, and end with the exit status of that."""

    def words() -> str:
        begun = (out / OPTIONS).exists()
        return f"stopped at once. {go_on()}" if begun else "stopped before training began."

    before = signals.end_at_once(words)
    try:
        yield
        _leave()
    except Stopped as stop:
        typer.echo(f"jbn: {stop}", err=True)
        _leave()
        raise typer.Exit(stop.status) from None
    except FileError as error:
        _desert(f"{error}; the checkpoints before that are whole. {go_on()}", 1)
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        _desert(f"{error}\njbn: {_kept['words']()}", LOST)  # a collective failed: its other end has gone
    finally:
        signals.restore(before)


def _leave() -> None:
    """Wait until all processes are here, and part: afterwards none takes the end of another for a loss."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def _desert(message: str, status: int) -> NoReturn:
    """End this process with an error that the others do not know: they will find it lost."""
    sys.stdout.flush()
    print(f"jbn: {message}", file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        os._exit(status)  # an orderly exit would wait for the others, which wait for this one
    sys.exit(status)
