"""Studies of what is claimed about batch normalization: ``run`` carries one of ``STUDIES`` out."""

from jbn.studies.gallery import STUDIES, run

__all__ = ["STUDIES", "run"]
