"""How far the last cell of a notebook is from failing, over seeds: ``python -m notebooks.margins 1 --seeds 10``.

Processors round differently, and training lets that grow until runs differ as if they had other seeds. So an assertion
about what a run ends with must hold for many seeds, with a margin, before it can be trusted on a machine not yet seen.
"""

import argparse
import ast
import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat

from notebooks.execute import NOTEBOOKS, executed

SEED = re.compile(r"^SEED = \d+", re.MULTILINE)


def assertions(source: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every assertion of a cell, and what it compares, but for constants."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assert):
            test = node.test
            parts = [test.left, *test.comparators] if isinstance(test, ast.Compare) else [test]
            yield ast.unparse(test), [ast.unparse(part) for part in parts if not isinstance(part, ast.Constant)]


def asking(source: str) -> str:
    """Return a cell that prints whether the assertions of `source` hold and what they compare, and asserts nothing."""
    lines = ["import json", *(ast.unparse(node) for node in ast.parse(source).body if not isinstance(node, ast.Assert))]
    for test, parts in assertions(source):
        lines.append(f"print(json.dumps([bool({test}), {', '.join(f'str({part})' for part in parts)}]))")
    return "\n".join(lines)


def seeded(notebook: nbformat.NotebookNode, seed: int) -> nbformat.NotebookNode:
    """Return the notebook with another seed of its training."""
    for cell in notebook.cells:
        cell.source = SEED.sub(f"SEED = {seed}", cell.source)
    return notebook


def measured(path: Path, seed: int) -> list[list[bool | str]]:
    """Return of each assertion whether it holds in a run with this seed, and what it compares."""
    notebook = seeded(nbformat.read(path, as_version=4), seed)
    notebook.cells[-1].source = asking(notebook.cells[-1].source)
    with tempfile.TemporaryDirectory() as folder:  # without the files beside the notebook: what they hold is made anew
        copy = Path(folder) / path.name
        nbformat.write(notebook, copy)
        output = executed(copy, copy.parent, JAX_PLATFORMS="cpu").cells[-1].outputs[0]
    return [json.loads(line) for line in output.text.splitlines()]


def span(values: list[str]) -> str:
    """Return the least and the greatest of numbers, NaN being the greatest; of other values nothing."""
    try:
        numbers = sorted(map(float, values), key=lambda value: (math.isnan(value), value))
    except ValueError:
        return ""
    return f"{numbers[0]:.3g} to {numbers[-1]:.3g}"


def main() -> None:
    """Run a notebook with several seeds and print of each assertion how often it held, and what it compared."""
    numbered = {int(path.name.partition("_")[0]): path for path in NOTEBOOKS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, choices=numbered, help="of the notebook")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    given = parser.parse_args()
    path = numbered[given.number]
    runs = [measured(path, seed) for seed in range(given.seeds)]
    source = nbformat.read(path, as_version=4).cells[-1].source
    for (test, parts), found in zip(assertions(source), zip(*runs, strict=True), strict=True):
        held, *values = zip(*found, strict=True)
        print(f"{sum(held)} of {len(runs)}: {test}")
        for part, of_part in zip(parts, values, strict=True):
            if between := span(list(of_part)):
                print(f"    {part}: {between}")


if __name__ == "__main__":
    main()
