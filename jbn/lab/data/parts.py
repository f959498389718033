"""The data that a run asks for: digits that come with packages, or folders that fit each other."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jbn.lab.data.folder import ONE_KIND, open_folder
from jbn.lab.data.images import DATA, Held, Source, enlarge
from jbn.lab.errors import OptionError
from jbn.lab.options import TrainOptions


class Parts(NamedTuple):
    """Data to fit, to watch and to report on, as far as there are some."""

    training: Source
    validation: Source | None = None
    test: Source | None = None

    @property
    def fingerprint(self) -> str:
        """Those of data to fit and to watch: both decide what a run records."""
        return "-".join(part.fingerprint for part in self[:2] if part is not None)


def parts_of(options: TrainOptions) -> Parts:
    """Return the data of a run; ``OptionError`` where there are none, or where they do not fit each other."""
    if options.data in DATA:
        if options.validation is not None:
            found = f"is given beside --data {options.data}, which has a part of its own for it"
            raise OptionError("--validation", f"{found}; expected --data DIR, or no --validation")
        names, split = ("training", "validation", "test"), DATA[options.data](options.seed)
        sized = map(enlarge, split) if options.model == "conv64" else split
        return Parts(*map(Held, [f"{options.data}, {name}" for name in names], sized, split))
    training = open_folder(Path(options.data))
    labels = np.unique(training.labels)
    if len(labels) == 1:
        found = f"all labels in '{options.data}' are {labels[0]}"
        raise OptionError("--data", f"{found}; expected two classes or more: of one there is nothing to learn")
    if options.validation is None:
        return Parts(training)
    validation = open_folder(Path(options.validation), option="--validation")
    here = f"'{options.validation}'"
    if validation.image_shape != training.image_shape:
        shapes = [" x ".join(map(str, part.image_shape)) for part in (validation, training)]
        raise OptionError("--validation", f"{here} holds images of {shapes[0]}; expected {shapes[1]}, as in --data")
    if validation.kind != training.kind:
        raise OptionError("--validation", f"{here} holds {validation.kind} images, --data {training.kind}; {ONE_KIND}")
    if validation.classes > training.classes:
        largest = f"expected at most {training.classes - 1}, the largest in --data"
        raise OptionError("--validation", f"{here} has the label {validation.classes - 1}; {largest}")
    return Parts(training, validation)
