"""Are the names that propose themselves right? ``python -m benchmarks.names [MODEL ...]``.

Models of torchvision, keras.applications and Haiku (`benchmarks.sources`) and their twins in Flax (`benchmarks.twins`),
each layer of which knows its name there: how many pairs are right, ambiguous, and wrong without a word.
"""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import jbn
from benchmarks.sources import READERS
from benchmarks.twins import TWINS, Truth, shapes


def measure(name: str) -> dict[str, Any]:
    """Propose the names of a model, and hold them against those that its twin knows."""
    library, theirs, make = TWINS[name]
    tree = READERS[library](theirs).tree
    truth = Truth(library)
    model = make(truth)
    like, x = shapes(model)
    proposal = jbn.propose_names(tree, library, "linen", x, like=like, call=model.apply)
    known = {match.source: match for match in proposal.matches}
    right = {old: known[old].target == new for old, new in truth.names.items()}
    jbn.convert(  # which raises if the twin is none
        tree, library, "linen", like=like, names=lambda path: truth.names.get(path), kinds=proposal.kinds or None
    )
    others = [old for old in known if old not in truth.names]
    return {
        "model": name,
        "layers": len(truth.names),
        "certain": sum(known[old].certain and fits for old, fits in right.items()),
        "wrong": [old for old, fits in right.items() if not fits and known[old].certain],
        "ambiguous": sum(not known[old].certain for old in right),
        "guessed": sum(not known[old].certain and fits for old, fits in right.items()),
        "left out": others,
        "wrongly taken": [old for old in others if known[old].target is not None],
    }


def main(models: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(TWINS)}.")] = None) -> None:
    """Print how many of the names that are proposed for public models are right."""
    table = Table(
        "model", "layers", "certain and right", "certain and wrong", "ambiguous", "of them guessed right", "left out"
    )
    for name in models or TWINS:
        row = measure(name)
        wrong = ", ".join(row["wrong"] + row["wrongly taken"]) or "0"
        figures = row["layers"], row["certain"], wrong, row["ambiguous"], row["guessed"], ", ".join(row["left out"])
        table.add_row(name, *map(str, figures))
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
