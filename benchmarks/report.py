"""Tables and a picture of the speed, for README.md, docs/how/speed.md, PERFORMANCE.md: ``python -m benchmarks.report``.

Reads what ``python -m benchmarks --write`` and ``python -m benchmarks.passes`` wrote into results/; measures nothing.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import readme
from benchmarks.speed import FLOORS
from jbn.lab.figures import COLOURS

RESULTS = Path(__file__).parent / "results"
MACHINE = "cpu-x86_64-2-cores"
PEERS = ("Flax Linen", "Flax NNX", "Haiku", "Equinox", "Keras", "PyTorch", "PyTorch NHWC")
MARKERS = dict(zip(PEERS, "sDv^Px+", strict=True))
# Of Okabe and Ito, which people who do not see red or green tell apart; in grey the markers do.
PEER_COLOURS = dict(
    zip(PEERS, ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#808080"), strict=True)
)
SUITES = ("gpu-h200", "gpu-h100", "gpu-a100", "tpu-v5e", "tpu-v6e")

Found = dict[str, Any]


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


def spread(quartiles: list[float]) -> str:
    """Write a median with its quartiles."""
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles)


def of_resnet(rows: list[Found], dtype: str, program: str) -> list[Found]:
    """Return the rows of the shapes of a ResNet-50."""
    chosen = {"dtype": dtype, "program": program}
    return [row for row in rows if row["spec"].startswith("ResNet") and chosen.items() <= row.items()]


def ratios(found: Found) -> list[list[str]]:
    """Return heading and rows of the table of ratios: geometric means over the shapes of a ResNet-50, and extremes."""
    rows = found["layers"]
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    versions = found["versions"]
    lines = [["time of jbn / that of", *(f"{n} {versions.get(n, '')}".strip() for n in names), "floor / jbn"]]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for program in FLOORS:
            some = of_resnet(rows, dtype, program)
            cells = [f"{dtype}, {program}"]
            for name in names:
                medians = [row["ratio"][name][1] for row in some if name in row["ratio"]]
                cells.append(f"{mean(medians):.2f} ({min(medians):.2f} to {max(medians):.2f})" if medians else "—")
            lines.append([*cells, f"{mean(row['of_floor']['jbn'] for row in some):.2f}"])
    return lines


def speed(found: Found) -> str:
    """Return the table of docs/how/speed.md."""
    head, *rows = ratios(found)
    return readme.markdown(head, rows)


def speed_short(found: Found) -> str:
    """Return the table of README.md: means alone, of fewer libraries."""
    head, *rows = ratios(found)
    places = [0, *(i for i, name in enumerate(head) if name.rpartition(" ")[0] in readme.SHORT)]
    return readme.markdown(
        [head[place] for place in places], [[row[place].partition(" (")[0] for place in places] for row in rows]
    )


def layers(found: Found) -> str:
    """Return the table of every shape: milliseconds of jbn, and ratios to Flax Linen."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in found["layers"]):
        rows = [row for row in found["layers"] if row["dtype"] == dtype]
        for spec in dict.fromkeys(row["spec"] for row in rows):
            of = {row["program"]: row for row in rows if row["spec"] == spec}
            cells = [f"{spec}, {dtype}", f"{of['forward']['bytes_of_x'] / 1e6:.1f}"]
            for program in FLOORS:
                row = of[program]
                cells += [f"{row['seconds']['jbn'][1] * 1e3:.2f}", spread(row["ratio"]["Flax Linen"])]
            lines.append(cells)
    head = ["", "MB", *(cell for program in FLOORS for cell in (f"{program}, ms", "/ Flax"))]
    return readme.markdown(head, lines)


def networks(found: Found) -> str:
    """Return the table of networks."""
    lines = []
    for row in (*found["chains"], *found["resnet50"]):
        for name, seconds in row["seconds"].items():
            ratio = spread(row["ratio"][name]) if name in row["ratio"] else ""
            temporaries = row["costs"][name]["temporaries"] / 1e6
            lines.append([row["study"], name, f"{seconds[1] * 1e3:.0f}", ratio, f"{temporaries:.0f}"])
    return readme.markdown(["", "", "ms", "jbn, ReLU inside / this", "temporaries, MB"], lines)


def beginnings(found: Found) -> str:
    """Return the table of what comes before the first step, and of eager calls."""
    (start,), (imported,) = found["startup"], found["imports"]
    lines = [[name, *(f"{start[part][name][1]:.1f}" for part in ("trace_s", "compile_s"))] for name in start["trace_s"]]
    table = readme.markdown(["53 norms", "trace, s", "compile, s"], lines)
    said = f"jbn / Flax, both together: {spread(start['ratio']['Flax Linen'])}. In ms: "
    said += ", ".join(
        "`{}` {:.0f} ({:.0f} to {:.0f})".format(
            name.replace(" after ", "` after `"), *(1e3 * times[i] for i in (1, 0, 2))
        )
        for name, times in imported["seconds"].items()
    )
    said += ". Eager calls, jbn / Flax: "
    said += ", ".join(f"{row['call']} {spread(row['ratio']['Flax Linen'])}" for row in found["eager"])
    return f"{table}\n{said}.\n"


def sums(found: Found) -> str:
    """Return the table of sums: passes of a copy, in each way of stepping."""
    rows = found["sums"]
    lines = [
        [what, *(" / ".join(f"{value:.1f}" for value in row["passes"][what].values()) for row in rows)]
        for what in rows[0]["passes"]
    ]
    return readme.markdown(["", *(f"{row['spec'].removeprefix('ResNet-50 ')}, {row['dtype']}" for row in rows)], lines)


def ensembles(found: Found) -> str:
    """Return the table of ensembles: ratios to Flax Linen."""
    rows = found["ensembles"]
    calls = list(dict.fromkeys(row["call"] for row in rows))
    lines = [
        [spec, *(spread(row["ratio"]["Flax Linen"]) for call in calls for row in rows
                 if (row["spec"], row["call"]) == (spec, call))]
        for spec in dict.fromkeys(row["spec"] for row in rows)
    ]  # fmt: skip
    return readme.markdown(["members × x, state", *(f"{call}, / Flax" for call in calls)], lines)


def forward(found: Found) -> str:
    """Return the table of ways through a forward pass: ratios to Flax Linen, and their geometric mean."""
    rows = found["forward"]
    lines = []
    for way in rows[0]["to Flax"]:
        medians = [row["to Flax"][way][1] for row in rows]
        lines.append([way, *(f"{value:.2f}" for value in (*medians, mean(medians)))])
    return readme.markdown(["/ Flax", *(row["spec"].removeprefix("ResNet-50 ") for row in rows), "mean"], lines)


def near(found: Found) -> str:
    """Return in a sentence in how many norms of a trained network plain sums would do."""
    rows = found["near"]
    whole, widest = [row["near 0"] == row["channels"] for row in rows], max(row["channels"] for row in rows)
    wide = [every for every, row in zip(whole, rows, strict=True) if row["channels"] == widest]
    return (
        f"Every k is near 0 in {sum(whole)} of the {len(rows)} norms of a network ({rows[0]['network']}), and in "
        f"{sum(wide)} of its {len(wide)} of {widest} channels (`python -m benchmarks near`).\n"
    )


def passes(found: Found) -> str:
    """Return the table of passes by the compilers, forward and backward, jbn / Flax, and of peak memory."""
    cells: dict[tuple[str, int, int], dict[str, str]] = {}
    for row in found["specs"]:
        here = cells.setdefault((row["spec"], row["batch"], row["MB"]), {})
        jbn, flax = ([row[f"{kind}, {what}"] for what in ("both", "peak / x")] for kind in ("jbn", "flax"))
        more = f" †{jbn[1]:.1f} / {flax[1]:.1f}" if round(jbn[1], 1) > round(flax[1], 1) else ""
        here[row["target"]] = f"{jbn[0]:.1f} / {flax[0]:.1f}{more}"
    there = [on for on in SUITES if any(on in here for here in cells.values())]
    lines = [
        [f"{spec}, batch {batch}", str(size), *(here.get(on, "—") for on in there)]
        for (spec, batch, size), here in cells.items()
    ]
    return readme.markdown(["", "MB", *(on.partition("-")[2].upper() for on in there)], lines)


def picture(found: Found) -> Figure:
    """Draw how often the floor each library takes, forward and backward, on the shapes of a ResNet-50."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        some = of_resnet(found["layers"], dtype, "forward and backward")
        names = ("jbn", *(name for name in PEERS if any(name in row["of_floor"] for row in some)))
        for place, name in zip(np.linspace(-0.3, 0.3, len(names)), names, strict=True):  # beside, not upon, each other
            there = [(i + place, 1 / row["of_floor"][name]) for i, row in enumerate(some) if name in row["of_floor"]]
            look = {"color": PEER_COLOURS.get(name, COLOURS[True]), "marker": MARKERS.get(name, "o")}
            size = 8 if name == "jbn" else 5
            axis.plot(*zip(*there, strict=True), linestyle="", markersize=size, label=name, **look)
        axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":", label="8 sweeps as fast as a copy")
        axis.set(title=dtype, yscale="log", xticks=range(len(some)))
        axis.set_xticklabels([row["spec"].removeprefix("ResNet-50 ") for row in some], rotation=40, ha="right")
        axis.set_yticks((0.5, 1, 2, 4), ("0.5", "1", "2", "4"))
        axis.set_xlim(-0.5, len(some) - 0.5)
        for i in range(1, len(some)):
            axis.axvline(i - 0.5, color="0.4", alpha=0.2, linewidth=0.8)
        axis.grid(axis="y", color="0.4", alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("time, forward and backward,\nin times of the floor (less is faster)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def read(name: str) -> Found:
    """Read a file of results."""
    found: Found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def tables(machine: str = MACHINE) -> dict[str, str]:
    """Return the tables by the names of their markers, those whose studies were measured."""
    found, counted = map(read, (machine, "passes"))
    made = {"speed": speed, "speed-short": speed_short, "layers": layers, "networks": networks}
    made |= {"beginnings": beginnings, "sums": sums, "ensembles": ensembles, "forward": forward, "near": near}
    needed = {"networks": {"chains", "resnet50"}, "beginnings": {"startup", "imports", "eager"}}
    needed |= {name: {"layers"} for name in ("speed", "speed-short")}
    there = {name: table for name, table in made.items() if needed.get(name, {name}) <= found.keys()}
    return {name: table(found) for name, table in there.items()} | {"specs": passes(counted)}


def main() -> None:
    """Write the tables into the pages and the picture into results/."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    known = sorted(
        path.stem for path in RESULTS.glob("*.json") if "layers" in read(path.stem) and path.stem != "passes"
    )
    parser.add_argument("machine", nargs="?", default=MACHINE, choices=known, help="a file of results, without .json")
    machine = parser.parse_args().machine
    for name, table in tables(machine).items():
        readme.replace(name, table)
    picture(read(machine)).savefig(RESULTS / "speed.png", dpi=130)


if __name__ == "__main__":
    main()
