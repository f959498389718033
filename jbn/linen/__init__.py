"""``BatchNorm`` for Flax Linen, ``replace`` and ``freeze`` for any model in contexts, ``fold`` for a trained one."""

from ._fold import fold as fold
from ._fold import foldable as foldable
from ._freeze import Found as Found
from ._freeze import freeze as freeze
from ._module import BatchNorm as BatchNorm
from ._replace import replace as replace
