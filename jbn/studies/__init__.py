"""What is claimed about batch normalization, measured.

``STUDIES`` are the studies by name, ``run`` carries one of them out, ``report`` makes one page of all that were.

What they are made of, for experiments of your own: ``jbn.studies.networks`` (networks as plain functions),
``jbn.studies.noise`` (noise after a norm), ``jbn.studies.training`` (many runs at once), ``jbn.studies.intervals``
(intervals over seeds). They need the extra ``lab``.
"""

from jbn.studies.gallery import STUDIES, run
from jbn.studies.page import report

_MODULES = {"intervals", "networks", "noise", "training"}

__all__ = ["STUDIES", "report", "run"]


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES & globals().keys()})
