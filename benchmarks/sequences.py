"""What are statistics per time step worth in an LSTM? ``python -m benchmarks.sequences``.

LSTMs without a norm, with batch normalization of γ = 0.1 and of γ = 1 at first (Cooijmans et al. 2017), and with layer
normalization read digits row by row, of which 5 to 8 are there; or, with ``--data vowels``, JapaneseVowels, whose files
come with ``pip install --no-deps aeon``. Each is trained at every rate of one grid, with the same splits and batches,
and is told at the rate that is best on its validation rows. It writes ``benchmarks/results/sequences.json``, what it
found on one data set beside what it found on the other.
"""

import json
import os
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.crossq import interval
from jbn.studies.sequences import (
    Effort,
    Norms,
    Reader,
    Sequences,
    Trained,
    begin,
    loss,
    no_push,
    norms_of,
    split,
    steps_to,
    train,
)

RESULTS = Path(__file__).parent / "results" / "sequences.json"
PACKAGES = ("jax", "flax", "optax", "scikit-learn")
# The norms, and the scale that they begin with.
ARMS = {
    "plain": (Norms("none"), 1.0),
    "batch, γ = 0.1": (Norms("batch"), 0.1),
    "batch, γ = 1": (Norms("batch"), 1.0),
    "layer": (Norms("layer"), 1.0),
}
OURS = "batch, γ = 0.1"
LEVELS = {"digits": 0.85, "vowels": 0.9}  # the accuracy on validation rows to which steps are counted


def digits() -> Sequences:
    """Return the digits of scikit-learn row by row, of which each keeps the first 5, 6, 7 or all 8."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    lengths = np.random.default_rng(0).integers(5, 9, len(labels))
    x = images.reshape(-1, 8, 8).astype(np.float32) / 16
    return Sequences(np.where(np.arange(8)[:, None] < lengths[:, None, None], x, 0), lengths, labels)


def vowels() -> Sequences:
    """Return the 640 utterances of JapaneseVowels: nine speakers, 7 to 29 steps of 12 coefficients.

    The files are read where they are, because what ``import aeon`` needs is not installed.
    """
    package = find_spec("aeon")
    if package is None or not package.submodule_search_locations:
        raise typer.BadParameter("--data vowels needs the files of aeon: pip install --no-deps aeon")
    folder = Path(package.submodule_search_locations[0]) / "datasets/data/JapaneseVowels"
    lines = [
        line
        for part in ("TRAIN", "TEST")
        for line in (folder / f"JapaneseVowels_{part}.ts").read_text(encoding="utf-8").splitlines()
        if line and line[0] not in "#@"
    ]
    rows = [[np.array(channel.split(","), np.float32) for channel in line.split(":")] for line in lines]
    lengths = np.array([len(channels[0]) for channels in rows])
    x = np.zeros((len(rows), lengths.max(), 12), np.float32)
    for row, channels in zip(x, rows, strict=True):
        row[: len(channels[0])] = np.stack(channels[:12], 1)
    return Sequences(x, lengths, np.array([int(channels[12][0]) - 1 for channels in rows]))


def gradient_inputs(data: Sequences, name: str, batch: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return batches without an end inside: of the data, of noise that is as long as makes a difference, of pixels.

    The first pixels of digits are constant, or nearly so.
    """
    steps = min(data.x.shape[1], 16)
    rows = data[np.flatnonzero(data.lengths >= steps)[:batch]]
    noise = np.random.default_rng(0).standard_normal((len(rows.x), 64, data.x.shape[2])).astype(np.float32)
    inputs = {f"{steps} steps of the data": rows.x[:, :steps], "64 steps of noise": noise}
    if name == "digits":
        inputs["64 steps of a pixel"] = rows.x.reshape(len(rows.x), 64, 1)
    return {title: (x, rows.labels) for title, x in inputs.items()}


def gradients(arm: str, features: int, x: np.ndarray, labels: np.ndarray, seeds: int) -> list[float]:
    """Return ‖∂loss/∂hₜ‖ of the first step to that of the last, at initialization, the geometric mean over seeds."""
    rows, (norms, scale) = Sequences(x, jnp.full(len(x), x.shape[1]), labels), ARMS[arm]
    model = Reader(norms, features, int(labels.max()) + 1, train=True)

    def of_seed(seed: Array) -> Array:
        params, stats = begin(model, seed, jnp.float32(scale), rows)
        grads, _ = jax.grad(partial(loss, model), 1, has_aux=True)(params, no_push(rows, features), stats, rows)
        return norms_of(grads)

    found = np.asarray(jax.jit(jax.vmap(of_seed))(jnp.arange(seeds)), np.float64).mean(0)
    return [float(value) for value in 10 ** (found - found[-1])]


def summary(found: dict[str, Trained], effort: Effort, level: float) -> dict[str, Any]:
    """Return what each arm reached at its best rate, and how far the others are from batch normalization by seeds."""
    arms: dict[str, Any] = {}
    for arm, curves in found.items():
        by_rate = curves.validation[-1].mean(-1)
        best = int(by_rate.argmax())
        arms[arm] = {
            "rate": effort.rates[best],
            "validation by rate": [float(value) for value in by_rate],
            "test": curves.test[-1, best].astype(float).tolist(),
            "interval": interval(curves.test[-1, best]),
            "validation by look": [float(value) for value in curves.validation[:, best].mean(-1)],
            "steps": steps_to(level, curves.validation[:, best], effort.look),
        }
    ours = np.array(arms[OURS]["test"])
    return {"arms": arms, f"{OURS} less": {arm: interval(ours - arms[arm]["test"]) for arm in arms if arm != OURS}}


def verdict(other: str, difference: list[float]) -> str:
    """Say what the interval of a difference shows."""
    low, mean, high = difference
    if low <= 0 <= high:
        return f"{OURS} and {other}: not told apart ({low:+.3f} to {high:+.3f})"
    return f"{OURS} is {'more' if mean > 0 else 'less'} accurate than {other}, by {low:+.3f} to {high:+.3f}"


def show(console: Console, found: dict[str, Any]) -> None:
    """Print the tables and what they show."""
    settings, level = found["settings"], LEVELS[found["settings"]["data"]]
    title = f"{settings['data']}, {settings['seeds']} seeds, {settings['steps']} steps, 95 % intervals"
    steps_column = f"steps to {level:.0%}: median"
    table = Table("norm", "rate", "validation", "test accuracy", steps_column, "least and most", title=title)
    for arm, row in found["arms"].items():
        steps = [np.inf if value is None else value for value in row["steps"]]
        low, mean, high = row["interval"]
        ends = f"{min(steps):.0f}, {max(steps):.0f}"
        accuracies = f"{max(row['validation by rate']):.3f}", f"{mean:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(arm, f"{row['rate']:g}", *accuracies, f"{np.median(steps):.0f}", ends)
    console.print(table)
    for other, difference in found[f"{OURS} less"].items():
        console.print(f"{verdict(other, difference)}.")
    for title, rows in found["gradient"].items():
        table = Table("norm", "first step", "middle", "last", title=f"‖∂loss/∂hₜ‖, {title}")
        for arm, norms in rows.items():
            table.add_row(arm, *(f"{norms[at]:.2g}" for at in (0, len(norms) // 2, -1)))
        console.print(table)


def main(
    data: Annotated[Literal["digits", "vowels"], typer.Option(help="What is read.")] = "digits",
    seeds: Annotated[int, typer.Option(min=2, help="Networks of each norm and rate.")] = 10,
    steps: Annotated[int, typer.Option(min=20, help="Training steps of each.")] = 400,
    features: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 32,
) -> None:
    """Train LSTMs without and with norms, and print how accurate they become and how soon."""
    began, loads = time.perf_counter(), [os.getloadavg()[0]]
    effort = Effort(seeds, steps, features, 64, 10, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
    whole = {"digits": digits, "vowels": vowels}[data]()
    parts, classes = split(whole, effort), int(whole.labels.max()) + 1
    found = {}
    with Progress() as progress:
        for arm in ARMS:
            task = progress.add_task(arm, total=-(-steps // effort.look))
            norms, scale = ARMS[arm]
            reader = Reader(norms, features, classes)
            found[arm] = train(reader, effort, parts, scale, partial(progress.advance, task))
            loads.append(os.getloadavg()[0])
    result = {
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {"data": data} | asdict(effort),
        **summary(found, effort, LEVELS[data]),
        "gradient": {
            title: {arm: gradients(arm, features, x, labels, seeds) for arm in ARMS}
            for title, (x, labels) in gradient_inputs(whole, data, effort.batch).items()
        },
        "seconds": round(time.perf_counter() - began),
        "load": [round(load, 1) for load in loads],
    }
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept | {data: result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(Console(width=130), result)


if __name__ == "__main__":
    typer.run(main)
