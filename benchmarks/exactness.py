"""How exact each batch norm is in float32, against float64: ``python -m benchmarks.exactness [--write]``.

x is N(0, 1) + m(1 + u/10), u uniform in [-1, 1] for every channel, so that the means are not round. All libraries
see the same x, from a fresh state, as `benchmarks.peers` sets them up. With ``--write`` the figures go to
results/exactness.json and, as tables, into docs/how/accuracy.md and README.md.
"""

import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from benchmarks import readme
from benchmarks.layers import EPSILON, MOMENTUM, Norm
from benchmarks.peers import Peer, installed

RESULTS = Path(__file__).parent / "results" / "exactness.json"
SHAPE = (32, 28, 28, 64)
UPDATES = 200
BATCH = (8, 14, 14, 64)
ROWS = (0, 1, 2)  # the axes that statistics are taken over

MEANS = {"y, m = 0": 0.0, "y, 10²": 1e2, "y, 10⁴": 1e4, "y, 10⁵": 1e5}
GRADIENT, EVALUATION, RUNNING = "dx, 10⁴", "y evaluated, 10⁴", "running mean, 10⁴"
FIGURES = (*MEANS, GRADIENT, EVALUATION, RUNNING)
HEAD = ("float32", *FIGURES)
FAR = 1e4
"""The m of the three last figures."""


def normal(m: float, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Draw x; the means of its channels depend on m alone."""
    means = m * (1 + np.random.default_rng(1).uniform(-0.1, 0.1, shape[-1]))
    return (np.random.default_rng(seed).standard_normal(shape) + means).astype(np.float32)


def exact(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return y and the gradient of x for the cotangent g of y, in float64."""
    wide = x.astype(np.float64)
    inverse = 1 / np.sqrt(wide.var(ROWS) + EPSILON)
    y = (wide - wide.mean(ROWS)) * inverse
    return y, (g - g.mean(ROWS, np.float64) - y * (g * y).mean(ROWS)) * inverse


def in_training(norm: Norm, m: float) -> tuple[float, float]:
    """Return the largest error of y, and the error of the gradient of x in relative L2 norm."""
    x, g = normal(m), np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    (y, dx), (want_y, want_dx) = norm.train(x, g), exact(x, g)
    return float(np.abs(y - want_y).max()), float(np.linalg.norm(dx - want_dx) / np.linalg.norm(want_dx))


def in_evaluation(norm: Norm, m: float) -> float:
    """Return the largest error of y, for the statistics of x rounded to float32."""
    x = normal(m)
    wide = x.astype(np.float64)
    mean, var = (s.astype(np.float32) for s in (wide.mean(ROWS), wide.var(ROWS)))
    want = (wide - mean) / np.sqrt(var.astype(np.float64) + EPSILON)
    return float(np.abs(norm.evaluate(x, mean, var) - want).max())


def of_running_mean(norm: Norm, m: float, debiased: bool) -> float:
    """Return the root mean square error of the running mean after many updates from a fresh state."""

    def batches() -> Iterator[np.ndarray]:
        return (normal(m, BATCH, seed) for seed in range(UPDATES))

    want = np.zeros(BATCH[-1])
    for x in batches():
        want = MOMENTUM * want + (1 - MOMENTUM) * x.mean(ROWS, np.float64)
    want = want / (1 - MOMENTUM**UPDATES) if debiased else want
    return float(np.sqrt(np.mean((norm.running_mean(batches()) - want) ** 2)))


def measure(peer: Peer) -> dict[str, float]:
    """Return the figures of one library."""
    norm = peer.norm(SHAPE[-1])
    figures = {name: in_training(norm, m)[0] for name, m in MEANS.items()}
    figures[GRADIENT] = in_training(norm, FAR)[1]
    figures[EVALUATION] = in_evaluation(norm, FAR)
    figures[RUNNING] = of_running_mean(norm, FAR, peer.debiased)
    return figures


def shown(figure: float | None) -> str:
    """Return a figure as it stands in tables; JSON has no NaN, so that is None there."""
    return "NaN" if figure is None else f"{figure:.0e}"


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table."""
    return [
        [f"{row['library']} {row['version']}", *(shown(row["figures"][name]) for name in FIGURES)]
        for row in found["rows"]
    ]


def markdown(found: dict[str, Any]) -> str:
    """Return the table of docs/how/accuracy.md."""
    return readme.markdown(HEAD, cells(found))


def short(found: dict[str, Any]) -> str:
    """Return the table of README.md."""
    return readme.shorten(HEAD, cells(found), ("y, m = 0", "y, 10²", "y, 10⁴", "dx, 10⁴"))


def main() -> None:
    """Measure and print; write if asked to."""
    write, console, absent = readme.opened("exactness", "How exact each batch norm is in float32, against float64.")
    rows = []
    for peer in installed(absent):
        with console.status(peer.name):
            figures = {name: None if math.isnan(value) else value for name, value in measure(peer).items()}
        rows.append({"library": peer.name, "version": peer.version, "figures": figures})
    found = {"jax": jax.__version__, "device": f"{jax.devices()[0].platform}, {platform.machine()}", "rows": rows}
    table = Table(*HEAD, title="Largest error of y, of dx in relative L2, of the running mean in RMS")
    for row in cells(found):
        table.add_row(*row)
    console.print(table)
    if write:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        readme.replace("exactness", markdown(found))
        readme.replace("exactness-short", short(found))


if __name__ == "__main__":
    main()
