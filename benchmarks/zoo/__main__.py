"""What jbn's tools make of public models: ``python -m benchmarks.zoo [CASE ...] [--write]``.

It makes an environment of fixed versions for their packages, with pip, and measures in it; ``--here`` measures with the
Python that runs it, and what is not installed there is said. One process a model. `benchmarks.zoo.measure` says what is
measured and what it has to be: the exit status is 1 where something is not. With ``--write`` the figures go into
results/zoo.json and, as a table, into docs/guides/models.md; those of models that are not named now stay, if their
version is the same.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import readme
from benchmarks.zoo import environment
from benchmarks.zoo.cases import ABSENT

RESULTS = Path(__file__).parents[1] / "results" / "zoo.json"
HEAD = (
    "model",
    "norms",
    "convert",
    "replace",
    "gradient",
    "fold",
    "export",
    "diagnose",
    "recalibrate",
    "freeze",
)

Row = dict[str, Any]


def cache() -> Path:
    """Return where the environment is unless somebody says so."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jbn-zoo"


def measure_apart(name: str, minutes: float) -> Row:
    """Measure a case in a process of its own: one that dies takes no other along, and leaves what it had."""
    from benchmarks.zoo.catalogue import CASES

    case, end = CASES[name], ""
    command = [sys.executable, "-m", "benchmarks.zoo.catalogue", name]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as told:
        try:
            status = subprocess.run(
                command, cwd=environment.ROOT, stdout=out, stderr=told, timeout=60 * minutes
            ).returncode
        except subprocess.TimeoutExpired:
            end = f"not done after {minutes:g} minutes for the model"
        said, lines = _lines(told), _lines(out)
    if not end and status:
        end = f"its process ended with status {status}: {(said or ['it said nothing'])[-1][:300]}"
    row: Row = {"package": case.package, "version": case.version, "model": case.model, "figures": {}, "reasons": {}}
    row |= json.loads(next((line for line in reversed(lines) if line.startswith("{")), "{}"))
    lacking = [figure for figure in HEAD[3:] if figure not in row["figures"] | row["reasons"]]
    row["reasons"] |= dict.fromkeys(lacking if end else (), end)
    return row


def _lines(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().strip().splitlines()


def cells(row: Row) -> list[str]:
    """Return the row of a table."""
    figures, norms = row["figures"], row.get("norms", "—")

    def cell(name: str, write: Any) -> str:
        return write(figures[name]) if name in figures else ("none" if name in row["reasons"] else "—")

    def of(found: Row) -> str:
        return f"{found['norms']}, {_error(found['error'])}"

    return [
        f"{row['package']} {row['version']}, {row['model']}",
        str(norms),
        cell("convert", _error),
        cell("replace", of),
        cell("gradient", lambda f: f"{f['jbn']:.1e} / {f['theirs']:.1e} = {f['ratio']:.2f}"),
        cell("fold", lambda f: of(f) + _exact(f) + (f", {f['kept']} kept" if f["kept"] else "")),
        cell("export", lambda f: " / ".join(map(_error, f.values()))),
        cell("diagnose", lambda f: ", ".join(f"{n} {kind}" for kind, n in f["findings"].items()) or "nothing"),
        cell("recalibrate", lambda f: str(f["norms"])),
        cell("freeze", of),
    ]


def notes(row: Row) -> list[str]:
    """Return what a table does not hold: why a figure is not there, and what the tools said."""
    name = _name(row)
    said = [text for figure in ("diagnose", "recalibrate") for text in row["figures"].get(figure, {}).get("said", ())]
    return [f"{name}, {figure}: {reason}" for figure, reason in row["reasons"].items()] + [f"{name}: {s}" for s in said]


def _exact(fold: Row) -> str:
    """Return how far logits are from float64, and the model's own."""
    return f" ({_error(fold['exact'])} / {_error(fold['own'])})" if "exact" in fold else ""


def _error(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _name(row: Row) -> str:
    return f"{row['package']}/{row['model']}"


def markdown(found: Row) -> str:
    """Return the table of docs/guides/models.md."""
    return readme.markdown(HEAD, map(cells, found["rows"]))


def main(
    cases: Annotated[list[str] | None, typer.Argument(metavar="CASE", help="Names, or patterns: 'flax*'.")] = None,
    env: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the environment is.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Measure with this Python.")] = False,
    minutes: Annotated[float, typer.Option(min=0, metavar="N", help="The most that a model may take.")] = 60,
    write: Annotated[bool, typer.Option("--write", help="Put the figures into results/.")] = False,
) -> None:
    """Measure what jbn's tools make of public models."""
    console = Console(width=max(Console().width, 160))
    if not here:
        try:
            python = environment.make((env or cache()).absolute(), console.print)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="'--env'") from None
        again = [str(python), "-m", "benchmarks.zoo", "--here", *(cases or ()), *(["--write"] if write else [])]
        again += ["--minutes", str(minutes)]
        raise typer.Exit(subprocess.run(again, cwd=environment.ROOT).returncode)
    from benchmarks.zoo.catalogue import CASES
    from benchmarks.zoo.measure import misses

    wanted = [name for name in CASES if not cases or any(fnmatchcase(name, pattern) for pattern in cases)]
    if unknown := [pattern for pattern in cases or () if not any(fnmatchcase(name, pattern) for name in CASES)]:
        raise typer.BadParameter(f"got {unknown[0]!r}, expected {', '.join(CASES)}", param_hint="'CASE'")
    rows = []
    for name in wanted:
        with console.status(name):
            rows.append(measure_apart(name, minutes))
        for note in notes(rows[-1]):
            console.print(note, style="dim", markup=False)
        if write:  # now, so that who stops it loses one model at most
            _write(rows[-1])
    table = Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    failed = {_name(row): wrong for row in rows if (wrong := misses(row))}
    for name, wrong in failed.items():
        console.print(f"{name} misses: {', '.join(wrong)}")
    raise typer.Exit(1 if failed else 0)


def _write(row: Row) -> None:
    """Put a row into the results and the table, beside those of other cases, but for those of other versions.

    What is not installed here says nothing: such a row is not written, and those in the results stay.
    """
    from benchmarks.zoo.catalogue import CASES

    if row["version"] == ABSENT:
        return
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    rows = {_name(old): old for old in found["rows"]} | {_name(row): row}
    there = {name: case.version for name, case in CASES.items()}
    kept = [rows[name] for name in CASES if name in rows and there[name] in (rows[name]["version"], ABSENT)]
    found = {name: importlib.metadata.version(name) for name in ("jax", "flax")} | {"rows": kept}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme.replace("zoo", markdown(found))


if __name__ == "__main__":
    typer.run(main)
