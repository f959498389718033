"""``BatchNorm`` for Flax NNX; ``replace``, ``freeze`` and ``recalibrate`` in place, the other tools for a copy."""

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
