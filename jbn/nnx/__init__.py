"""``BatchNorm`` for Flax NNX; ``replace`` and ``freeze`` for a model in place, ``fold`` for a copy of it."""

from jbn.nnx.editing import Replaced as Replaced
from jbn.nnx.editing import freeze as freeze
from jbn.nnx.editing import replace as replace
from jbn.nnx.folding import Folded as Folded
from jbn.nnx.folding import fold as fold
from jbn.nnx.folding import foldable as foldable
from jbn.nnx.module import BatchNorm as BatchNorm
