"""The table of docs/comparison.md, of results that are there: ``python -m benchmarks.comparison``. Measures nothing."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import readme
from benchmarks.report import MACHINE, RESULTS, mean, of_resnet

PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
HEAD = (
    "", "error of y, mean/std 10²", "10⁴", "error of dx, 10⁴", "kept / x", "passes on an H200, both", "on a v5e, both",
    "time of jbn / that, float32, both", "bfloat16, both",
)  # fmt: skip


def table() -> str:
    """Return a row for each library: accuracy, costs and time."""
    exactness, costs = (_rows(_read(name)["rows"]) for name in ("exactness", "costs"))
    times = _read(MACHINE)["layers"]
    lines = []
    for name, row in exactness.items():
        cells = [f"{name} {row['version']}"]
        for figure in ("y, 10²", "y, 10⁴", "dx, 10⁴"):
            error = row["figures"][figure]
            cells.append("NaN" if error is None else f"{error:.0e}")
        cost = costs.get(name, {})
        cells.append(f"{cost['kept']:.2f}" if "kept" in cost else "—")
        passes = cost.get("passes", {})
        cells += [f"{passes[target][1]:.1f}" if target in passes else "—" for target in ("gpu-h200", "tpu-v5e")]
        for dtype in ("float32", "bfloat16"):
            shapes = of_resnet(times, dtype, "forward and backward")
            ratios = [shape["ratio"][name][1] for shape in shapes if name in shape["ratio"]]
            cells.append("1" if name == "jbn" else f"{mean(ratios):.2f}" if ratios else "—")
        lines.append(cells)
    return readme.markdown(HEAD, lines)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["library"]: row for row in rows}


def write(text: str) -> str:
    """Return a page with the table between its markers."""
    return re.sub(
        r"(?<=<!-- comparison -->\n).*?(?=<!-- /comparison -->)", lambda _: table(), text, count=1, flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(write(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
