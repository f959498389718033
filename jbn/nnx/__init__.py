"""``BatchNorm`` for Flax NNX; ``replace`` puts it into a model, ``freeze`` freezes it."""

from ._edit import Replaced as Replaced
from ._edit import freeze as freeze
from ._edit import replace as replace
from ._module import BatchNorm as BatchNorm
