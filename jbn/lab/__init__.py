"""What the command line runs: data, models, training, figures. Nothing in the library imports it.

What is of use in a notebook too, each to be imported by its name: ``jbn.lab.data`` (data sets that need no download),
``jbn.lab.models`` (the networks), ``jbn.lab.diagnosis`` (a diagnosis as a table and as a figure), ``jbn.lab.errors``
(what these and ``jbn.studies`` raise). The rest are the rooms of the commands. It needs the extra ``lab``.
"""

_MODULES = {"data", "diagnosis", "errors", "models"}

__all__: list[str] = []


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES & globals().keys()})
