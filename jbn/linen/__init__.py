"""``BatchNorm`` for Flax Linen, and for any model the contexts ``replace`` and ``freeze`` and the tools."""

from jbn.version import install

try:
    import flax as flax
except ModuleNotFoundError as error:
    if error.name != "flax":  # one that is there and lacks something else says so itself
        raise
    raise ModuleNotFoundError(
        f"jbn.linen needs Flax, which is not installed: {install('flax')}", name="flax"
    ) from error

from jbn.folding.links import Folds as Folds
from jbn.linen.folding import fold as fold
from jbn.linen.folding import foldable as foldable
from jbn.linen.freezing import freeze as freeze
from jbn.linen.module import BatchNorm as BatchNorm
from jbn.linen.observing import diagnose as diagnose
from jbn.linen.observing import recalibrate as recalibrate
from jbn.linen.recording import record as record
from jbn.linen.replacing import replace as replace
from jbn.replacing import Found as Found

__all__ = ["BatchNorm", "Folds", "Found", "diagnose", "fold", "foldable", "freeze", "recalibrate", "record", "replace"]
