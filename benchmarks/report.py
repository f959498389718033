"""Tables and a picture of the measured speed, for README.md and PERFORMANCE.md: ``python -m benchmarks.report [NAME]``.

Reads results/NAME.json, which ``python -m benchmarks --write`` wrote, by default that of the CPU; measures nothing.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import readme
from benchmarks.speed import FLOORS
from jbn.lab.figures import COLOURS

RESULTS = Path(__file__).parent / "results"
PEERS = ("Flax Linen", "Flax NNX", "Haiku", "Equinox", "Keras", "PyTorch", "PyTorch NHWC")
MARKERS = dict(zip(PEERS, "sDv^Px+", strict=True))


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


def of_resnet(rows: list[dict[str, Any]], dtype: str, program: str) -> list[dict[str, Any]]:
    """Return the rows of the shapes of a ResNet-50."""
    chosen = {"dtype": dtype, "program": program}
    return [row for row in rows if row["spec"].startswith("ResNet") and chosen.items() <= row.items()]


def speed(found: dict[str, Any]) -> str:
    """Return the table of ratios: geometric means over the shapes of a ResNet-50."""
    rows = found["layers"]
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for program in FLOORS:
            some = of_resnet(rows, dtype, program)
            cells = [f"{dtype}, {program}"]
            for name in names:
                ratios = [row["ratio"][name][1] for row in some if name in row["ratio"]]
                cells.append(f"{mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "—")
            cells.append(f"{mean(row['of_floor']['jbn'] for row in some):.2f}")
            lines.append(cells)
    versions = found["versions"]
    return readme.markdown(
        ["time of jbn / that of", *(f"{n} {versions.get(n, '')}".strip() for n in names), "of the floor"], lines
    )


def networks(found: dict[str, Any]) -> str:
    """Return the table of networks."""
    lines = []
    for row in (*found["chains"], *found["resnet50"]):
        for name, seconds in row["seconds"].items():
            ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"][name]) if name in row["ratio"] else ""
            lines.append(
                [row["study"], name, f"{seconds[1] * 1e3:.0f}", ratio, f"{row['costs'][name]['temporaries'] / 1e6:.0f}"]
            )
    return readme.markdown(["", "", "ms", "jbn, ReLU inside / this", "temporaries, MB"], lines)


def picture(found: dict[str, Any]) -> Figure:
    """Draw how often the floor each library takes, forward and backward, on the shapes of a ResNet-50."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        some = of_resnet(found["layers"], dtype, "forward and backward")
        for name in dict.fromkeys(name for row in some for name in row["seconds"] if name != "copy"):
            there = [(i, 1 / row["of_floor"][name]) for i, row in enumerate(some) if name in row["of_floor"]]
            ours = name == "jbn"
            axis.plot(*zip(*there, strict=True), MARKERS.get(name, "o"), color=COLOURS[True] if ours else "0.45",
                      markersize=8 if ours else 5, label=name, zorder=3 if ours else 2)  # fmt: skip
        axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":", label="the floor: 8 sweeps as fast as a copy")
        axis.set(title=dtype, yscale="log", xticks=range(len(some)))
        axis.set_xticklabels([row["spec"].removeprefix("ResNet-50 ") for row in some], rotation=40, ha="right")
        axis.grid(axis="y", color="0.4", alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time, forward and backward,\nin times of the floor")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def main() -> None:
    """Write the tables into README.md and the picture into results/."""
    parser = argparse.ArgumentParser(description="Tables and a picture of the measured speed.")
    known = sorted(path.stem for path in RESULTS.glob("*-*.json"))
    parser.add_argument("name", nargs="?", default=next((n for n in known if n.startswith("cpu")), None), choices=known)
    name = parser.parse_args().name
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    readme.replace("speed", speed(found))
    readme.replace("networks", networks(found))
    picture(found).savefig(RESULTS / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
