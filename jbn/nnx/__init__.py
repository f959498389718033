"""Batch normalization in Flax NNX: the layer, and tools for whole models.

``BatchNorm`` goes in the place of ``flax.nnx.BatchNorm``. In place: ``replace`` turns the norms of a model into jbn's,
``freeze`` keeps them as they are while the model trains, ``recalibrate`` gives them exact statistics after training.
What ``replace`` has met is ``Found``, which was once ``Replaced``.

For a copy of a model: ``diagnose`` (what is wrong with it), ``fold`` (norms inside the layers beside them, each of
which leaves a ``Folded`` behind) and ``foldable`` (which they would be), which say so in ``Folds``, and ``record``
(what each layer takes and returns, for ``jbn.compare``).
"""

from jbn.version import install

try:
    import flax as flax
except ModuleNotFoundError as error:
    if error.name != "flax":  # one that is there and lacks something else says so itself
        raise
    raise ModuleNotFoundError(f"jbn.nnx needs Flax, which is not installed: {install('flax')}", name="flax") from error

from jbn.folding.links import Folds as Folds
from jbn.nnx.editing import freeze as freeze
from jbn.nnx.editing import replace as replace
from jbn.nnx.folding import Folded as Folded
from jbn.nnx.folding import fold as fold
from jbn.nnx.folding import foldable as foldable
from jbn.nnx.module import BatchNorm as BatchNorm
from jbn.nnx.observing import diagnose as diagnose
from jbn.nnx.observing import recalibrate as recalibrate
from jbn.nnx.recording import record as record
from jbn.replacing import Found as Found

Replaced = Found  # the name of before

__all__ = [
    "BatchNorm", "Folded", "Folds", "Found", "Replaced", "diagnose", "fold", "foldable", "freeze", "recalibrate",
    "record", "replace",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
