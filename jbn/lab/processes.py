"""The processes of a run: JAX's own runtime joins them, and each ends in bounded time where another is lost."""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jbn.lab.run_directory import OptionError

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, start it again.
LOST = 75
MESSAGE_BYTES = 2**14

T = TypeVar("T")
_kept: dict[str, Any] = {}


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, cluster: bool, timeout: int
) -> None:
    """Join the other processes of the run: at an address, or those that the cluster names; else be the only one.

    JAX gives up `timeout` seconds after the last sign of life of another process, at the start and later.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [option for option, value in given.items() if value is None]
    if not cluster and len(missing) == len(given):
        return
    if not cluster and missing:
        raise OptionError(
            missing[0], f"is missing; expected {', '.join(given)} together, or --cluster where the cluster tells them"
        )
    here = "this process" if process_id is None else f"process {process_id}"
    at_loss(lambda: f"{here} did not find the others; expected all of them within --timeout {timeout} seconds")
    _watch_aborts()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        option = "--cluster" if cluster else "--coordinator"
        expected = (
            "expected SLURM, Open MPI or a TPU slice, or --coordinator and its two"
            if cluster
            else (
                f"expected {num_processes} processes with the same --coordinator, an address of process 0 that all of "
                f"them reach, and a --process-id of their own, within --timeout {timeout} seconds"
            )
        )
        raise OptionError(option, f"cannot join the other processes ({reason}); {expected}") from None


def leave() -> None:
    """Wait until all processes are here, and part: afterwards none takes the end of another for a loss."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def desert(message: str, status: int = 1) -> NoReturn:
    """End this process with an error that the others do not know: they will find it lost."""
    sys.stdout.flush()
    print(f"jbn: {message}", file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        os._exit(status)  # an orderly exit would wait for the others, which wait for this one
    sys.exit(status)


def at_loss(words: Callable[[], str]) -> None:
    """Let this process say `words()`, and end with exit status 75, where another one is lost."""
    _kept["words"] = words


def lost(error: Exception) -> NoReturn:
    """End because a collective failed: its other end has gone."""
    desert(f"{error}\njbn: {_kept['words']()}", LOST)


def _watch_aborts() -> None:
    """Have the last word where JAX's runtime ends this process.

    It learns of a lost process in a thread of its own and calls abort(), which no Python handler outlives:
    `signal.signal` would wait for the main thread, and that one waits for the lost process.
    """

    def last_words(_: int) -> None:
        sys.stdout.flush()
        os.write(2, f"jbn: {_kept['words']()}\n".encode())  # nothing of JAX here: it would wait for the others
        os._exit(LOST)

    _kept["handler"] = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)  # it must outlive this call
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _kept["handler"])


def together(check: Callable[[], T]) -> T:
    """Return what `check` returns; where it raises `OptionError` in one process, raise that in all of them."""
    failure, result = None, None
    try:
        result = check()
    except OptionError as error:
        failure = error
    if jax.process_count() > 1:
        said = json.dumps([failure.option, str(failure)]) if failure else ""
        for process, other in enumerate(_gathered(said)):
            if other:
                option, message = json.loads(other)
                failure = failure or OptionError(option, f"{message} (says process {process})")
    if failure:
        raise failure
    return result  # type: ignore[return-value]


def same(values: Mapping[str, str]) -> None:
    """Raise `OptionError` unless what stands for each option is the same in all processes."""
    if jax.process_count() == 1:
        return
    for process, said in enumerate(map(json.loads, _gathered(json.dumps(values)))):
        for option, value in values.items():
            if said[option] != value:
                raise OptionError(
                    option,
                    f"stands for {value} in process {jax.process_index()} and for {said[option]} in process {process}; "
                    "expected the same command and the same files everywhere, but for --process-id",
                )


def _gathered(text: str) -> list[str]:
    line = np.zeros(MESSAGE_BYTES, np.uint8)
    content = text.encode("ascii", "replace")[:MESSAGE_BYTES]
    line[: len(content)] = np.frombuffer(content, np.uint8)
    return [bytes(row).rstrip(b"\0").decode("ascii") for row in np.asarray(multihost_utils.process_allgather(line))]
