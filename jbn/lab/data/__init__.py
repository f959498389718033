"""The data of a run: handwritten digits or folders of images, cut into batches.

``digits`` and ``mnist`` return data sets that need no download, as three parts: a ``Split`` of ``Images``.
"""

from jbn.lab.data.images import Images as Images
from jbn.lab.data.images import Split as Split
from jbn.lab.data.images import digits as digits
from jbn.lab.data.images import mnist as mnist

__all__ = ["Images", "Split", "digits", "mnist"]


def __dir__() -> list[str]:
    return __all__
