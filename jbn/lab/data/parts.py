"""The data that a run asks for: digits that come with packages, or folders that fit each other."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jbn.lab.data.folder import ONE_KIND, Folder, open_folder
from jbn.lab.data.images import DATA, Form, Held, Source, enlarge
from jbn.lab.errors import OptionError
from jbn.lab.kinds import meant
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
    if near := "" if os.path.exists(options.data) else meant(options.data, DATA):
        raise OptionError("--data", f"got '{options.data}', and there is no such folder{near}")
    training = open_folder(Path(options.data))
    labels = np.unique(training.labels)
    if len(labels) == 1:
        found = f"all labels in '{options.data}' are {labels[0]}"
        raise OptionError("--data", f"{found}; expected two classes or more: of one there is nothing to learn")
    if options.validation is None:
        return Parts(training)
    return Parts(training, open_beside(training.form, Path(options.validation), "--validation", "--data"))


def open_beside(form: Form, path: Path, option: str, among: str) -> Folder:
    """Return a folder that ``option`` names; ``OptionError`` where it does not fit the training data, ``among``."""
    found = open_folder(path, option=option)
    fit(found, form, f"'{path}'", option, among)
    if form.kind and found.kind != form.kind:
        raise OptionError(option, f"'{path}' holds {found.kind} images, {among} {form.kind}; {ONE_KIND}")
    return found


def fit(found: Source, form: Form, here: str, option: str, among: str) -> None:
    """Raise ``OptionError`` where data, ``here``, are none that a network of those ``among`` can be asked about."""
    if found.image_shape != form.image_shape:
        shapes = [" x ".join(map(str, shape)) for shape in (found.image_shape, form.image_shape)]
        raise OptionError(option, f"{here} holds images of {shapes[0]}; expected {shapes[1]}, as in {among}")
    if found.classes > form.classes:
        largest = f"expected at most {form.classes - 1}, the largest in {among}"
        raise OptionError(option, f"{here} has the label {found.classes - 1}; {largest}")
