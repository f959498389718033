"""The data that a run asks for: the digits, or folders that fit each other."""

from pathlib import Path
from typing import NamedTuple

from jbn.lab.data.folder import open_folder
from jbn.lab.data.images import Held, Source, digits, enlarge
from jbn.lab.errors import OptionError
from jbn.lab.options import TrainOptions


class Parts(NamedTuple):
    """Data to fit, to watch and to report on, as far as there are some."""

    training: Source
    validation: Source | None = None
    test: Source | None = None


def parts_of(options: TrainOptions) -> Parts:
    """Return the data of a run; ``OptionError`` where there are none, or where they do not fit each other."""
    if options.data is None:
        if options.validation is not None:
            raise OptionError(
                "--validation", "is given without --data; expected both: the digits have a part of their own"
            )
        sized = map(enlarge if options.model == "conv64" else lambda part: part, digits(options.seed))
        return Parts(*map(Held, ("digits, training", "digits, validation", "digits, test"), sized))
    training = open_folder(Path(options.data))
    if options.validation is None:
        return Parts(training)
    validation = open_folder(Path(options.validation), option="--validation")
    here = f"'{options.validation}'"
    if validation.image_shape != training.image_shape:
        shapes = [" x ".join(map(str, part.image_shape)) for part in (validation, training)]
        raise OptionError("--validation", f"{here} holds images of {shapes[0]}; expected {shapes[1]}, as in --data")
    if validation.classes > training.classes:
        largest = f"expected at most {training.classes - 1}, the largest in --data"
        raise OptionError("--validation", f"{here} has the label {validation.classes - 1}; {largest}")
    return Parts(training, validation)
