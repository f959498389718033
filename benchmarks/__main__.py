"""Speed, beside the batch norms of the field: ``python -m benchmarks [STUDY ...]``, or ``jbn bench`` in a checkout.

Studies: ``layers``, one norm on the shapes of real models (`benchmarks.speed`); ``chains`` and ``resnet50``, norms in
networks, and ``startup``, tracing and compiling them (`benchmarks.networks`); ``eager``, calls that nobody compiled
(`benchmarks.eager`); ``ensembles``, norms under ``vmap`` (`benchmarks.ensembles`); ``imports``; ``sums``, ways of
taking the sums inside (`benchmarks.sums`); ``forward``, ways through a whole forward pass, and ``near``, in how many
layers of a trained network one of them would do (`benchmarks.forward`).
With ``--write`` the figures go into results/, in a file for this kind of machine, and `benchmarks.report` makes the
tables and the picture of the pages of them.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import eager, ensembles, forward, networks, speed, sums
from benchmarks.peers import installed
from benchmarks.specs import BATCH, OTHERS, RESNET50
from benchmarks.timing import quartiles

RESULTS = Path(__file__).parent / "results"
STUDIES = ("layers", "chains", "resnet50", "startup", "eager", "ensembles", "imports", "sums", "forward", "near")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Rows = list[dict[str, Any]]


def machine() -> str:
    """Name the kind of machine, without its name."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu-{platform.machine()}-{len(os.sched_getaffinity(0))}-cores"
    return "-".join((device.platform, *device.device_kind.lower().split()))


def imports(repeats: int) -> Rows:
    """Time what an import adds to that which it needs, in fresh processes, in turns, after one that does not count."""
    code = "import time; {}; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    # Each asks for a name: jbn imports nothing before that.
    statements = {
        "import jbn after import jax": ("import jax", "import jbn; jbn.bn_init"),
        "import jbn.linen after import flax.linen": ("import flax.linen", "import jbn.linen; jbn.linen.BatchNorm"),
        "import jbn.nnx after import flax.nnx": ("import flax.nnx", "import jbn.nnx; jbn.nnx.BatchNorm"),
    }
    # What pip installs is compiled to bytecode: a checkout must be able to keep its own, or each import compiles it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(1 + repeats):
        for name, times in seconds.items():
            command = [sys.executable, "-c", code.format(*statements[name])]
            times.append(float(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout))
    return [{"seconds": {name: quartiles(np.array(times[1:])) for name, times in seconds.items()}}]


@app.command()
def bench(
    studies: Annotated[
        list[str] | None, typer.Argument(metavar="STUDY", help=f"Some of {', '.join(STUDIES)}. Default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds in which each library has its turn.")] = 20,
    batch: Annotated[int, typer.Option(min=2, metavar="N", help="Examples in a batch, in layers.")] = BATCH,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="float32|bfloat16", help="Dtype of x in layers; may be repeated. Default: both."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="In layers, this model only, such as ResNet-50; may be repeated."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="In layers, this library only, such as 'Flax Linen'; may be repeated."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the figures into results/.")] = False,
) -> None:
    """Time jbn and other batch norms in turns, each after its answer was compared with float64."""
    console = Console(width=max(Console().width, 110))  # readable in a log too
    chosen, dtypes = _known("STUDY", studies, STUDIES), _known("--dtype", dtype, tuple(speed.BOUNDS))
    specs = [*RESNET50, *OTHERS]
    models = _known("--model", model, tuple(dict.fromkeys(spec.model for spec in specs)))
    there = installed(console.print)
    peers = _known("--peer", peer, tuple(p.name for p in there if p.name != "jbn"))

    def layers() -> Rows:
        rows: Rows = []
        for spec in (spec for spec in specs if spec.model in models):
            for kind in dtypes:
                used = [p for p in there if p.name == "jbn" or p.name in peers]
                new = speed.measure(spec, kind, used, batch=batch, repeats=repeats, report=console.print)
                _show(console, new)
                rows += new
        return rows

    made: dict[str, Callable[[], Rows]] = {
        "layers": layers,
        "chains": lambda: networks.chains(repeats, console.print),
        "resnet50": lambda: networks.resnet50(repeats, console.print),
        "startup": lambda: networks.startup(max(1, repeats // 4)),  # a round takes a minute
        "eager": lambda: eager.measure(repeats),
        "ensembles": lambda: ensembles.measure(repeats),
        "imports": lambda: imports(repeats),
        "sums": lambda: sums.measure(repeats),
        "forward": lambda: forward.measure(repeats),
        "near": forward.near_zero,
    }
    path = RESULTS / f"{machine()}.json"
    for study in chosen:
        rows = made[study]()
        if study != "layers":
            _show(console, rows)
        if write:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            versions = {"jax": jax.__version__} | {p.name: p.version for p in there}
            if study == "layers":  # those that were not measured now stay
                measured = {_which(row) for row in rows}
                rows = [row for row in found.get(study, []) if _which(row) not in measured] + rows
            found |= {"device": jax.devices()[0].device_kind, "versions": versions, study: rows}
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            console.print(f"Wrote {study} to {path.name}")


def _which(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("spec", "batch", "dtype", "program"))


def _known(what: str, given: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"got {name!r}, expected {', '.join(known)}", param_hint=f"'{what}'")
    return tuple(given or known)


def _show(console: Console, rows: Rows) -> None:
    """Print times, and the ratio of jbn's to each other's, with quartiles; rows without times as they are."""
    for row in rows:
        if not {"seconds", "ratio"} & row.keys():
            console.print(", ".join(f"{key}: {value}" for key, value in row.items()))
            continue
        title = " ".join(str(row[key]) for key in ("spec", "batch", "dtype", "study", "call", "program") if key in row)
        table = Table("", "ms", "jbn / this", "of the floor", title=title, title_justify="left")
        seconds, ratio, share = row.get("seconds", {}), row.get("ratio", {}), row.get("of_floor", {})
        for name in dict.fromkeys((*seconds, *ratio)):
            time = f"{seconds[name][1] * 1e3:.2f}" if name in seconds else ""
            beside = "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio[name]) if name in ratio else ""
            table.add_row(name, time, beside, f"{share[name]:.2f}" if name in share else "")
        console.print(table)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
