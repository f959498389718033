"""``BatchNorm`` for Flax NNX; ``replace`` and ``freeze`` for a model in place, ``fold`` for a copy of it."""

from ._edit import Replaced as Replaced
from ._edit import freeze as freeze
from ._edit import replace as replace
from ._fold import Folded as Folded
from ._fold import fold as fold
from ._fold import foldable as foldable
from ._module import BatchNorm as BatchNorm
