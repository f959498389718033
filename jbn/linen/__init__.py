"""``BatchNorm`` for Flax Linen, ``replace`` and ``freeze`` for any model in contexts, ``fold`` for a trained one."""

from jbn.folding.links import Folds as Folds
from jbn.linen.folding import fold as fold
from jbn.linen.folding import foldable as foldable
from jbn.linen.freezing import freeze as freeze
from jbn.linen.module import BatchNorm as BatchNorm
from jbn.linen.replacing import replace as replace
from jbn.replacing import Found as Found

__all__ = ["BatchNorm", "Folds", "Found", "fold", "foldable", "freeze", "replace"]
