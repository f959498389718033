"""The studies by name, and ``run``, which carries one out."""

from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from jbn.lab.errors import OptionError
from jbn.lab.kinds import meant
from jbn.studies.batch_size import BATCH_SIZE
from jbn.studies.convergence import CONVERGENCE
from jbn.studies.cost import COST
from jbn.studies.inference import INFERENCE
from jbn.studies.initialization import INITIALIZATION
from jbn.studies.learning_rate import LEARNING_RATE
from jbn.studies.perform import perform
from jbn.studies.placement import PLACEMENT
from jbn.studies.recurrent import RECURRENT
from jbn.studies.regularization import REGULARIZATION
from jbn.studies.shift import SHIFT
from jbn.studies.study import Size, Study

ALL = "all"
STUDIES = {
    study.name: study
    for study in (
        CONVERGENCE,
        LEARNING_RATE,
        INITIALIZATION,
        PLACEMENT,
        REGULARIZATION,
        SHIFT,
        INFERENCE,
        BATCH_SIZE,
        COST,
        RECURRENT,
    )
}


def run(
    name: str, *, size: Size = "default", out: Path | str = "jbn-study", console: Console | None = None
) -> dict[str, Any]:
    """Carry out a study, or go on with it where it was stopped.

    Args:
        name: of one in ``STUDIES``.
        size: "quick", "default" or "full".
        out: the folder of results; the study has one of its own in it.
        console: where it says how far it is and what came out; nowhere for None.

    Returns:
        What came out: "question", "claims" with the verdict of each, and "summary", as in results.json.

    Raises:
        OptionError: for an unknown name or size, and for a folder that holds something else.
        FileError: where a file cannot be written; what was measured before is kept.

    >>> from jbn.studies import STUDIES
    >>> STUDIES["batch-size"].question
    'What do small batches cost batch normalization, and what helps?'
    """
    study, console = find(name), console or Console(quiet=True)
    if size not in get_args(Size):
        raise OptionError("--size", f"got {size!r}; expected {', '.join(get_args(Size))}")
    return perform(study, size, Path(out) / study.name, console)


def find(name: str) -> Study:
    """Return a study; ``OptionError`` with the names near to it where there is none."""
    if name in STUDIES:
        return STUDIES[name]
    near = meant(name, [*STUDIES, ALL]) or f"; expected {', '.join([*STUDIES, ALL])}"
    raise OptionError("NAME", f"there is no study {name!r}{near}")
