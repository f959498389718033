"""What is claimed about batch normalization, measured: ``run`` carries one of ``STUDIES`` out, ``report`` shows all."""

from jbn.studies.gallery import STUDIES, run
from jbn.studies.page import report

__all__ = ["STUDIES", "report", "run"]
