"""``BatchNorm`` for Flax Linen, and contexts: ``replace`` puts it into any model, ``freeze`` keeps some of them."""

from ._freeze import Found as Found
from ._freeze import freeze as freeze
from ._module import BatchNorm as BatchNorm
from ._replace import replace as replace
