"""Batch normalization in Flax Linen: the layer, contexts for models that have others, and tools for whole models.

``BatchNorm`` goes in the place of ``flax.linen.BatchNorm``. Contexts: ``replace`` lets the norms of any model compute
with jbn, ``freeze`` keeps them as they are while the model trains; both say which layers they ``Found``.

Tools for a model and its variables: ``recalibrate`` (exact statistics after training), ``diagnose`` (what is wrong with
it), ``fold`` (norms inside the layers beside them) and ``foldable`` (which they would be), which say so in ``Folds``,
and ``record`` (what each layer takes and returns, for ``jbn.compare``).
"""

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


def __dir__() -> list[str]:
    return __all__
