"""``BatchNorm`` for Flax Linen; ``replace`` and ``freeze`` in contexts, ``fold`` and ``record`` for any model."""

try:
    import flax as flax
except ModuleNotFoundError as error:
    if error.name != "flax":  # one that is there and lacks something else says so itself
        raise
    raise ModuleNotFoundError(
        'jbn.linen needs Flax, which is not installed: pip install "jbn[flax]"', name="flax"
    ) from error

from jbn.folding.links import Folds as Folds
from jbn.linen.folding import fold as fold
from jbn.linen.folding import foldable as foldable
from jbn.linen.freezing import freeze as freeze
from jbn.linen.module import BatchNorm as BatchNorm
from jbn.linen.recording import record as record
from jbn.linen.replacing import replace as replace
from jbn.replacing import Found as Found

__all__ = ["BatchNorm", "Folds", "Found", "fold", "foldable", "freeze", "record", "replace"]
