"""What arguments may be: the names that signatures show, for annotations of your own.

A layer: ``ParamsLike`` (``jbn.Params``, or a mapping with ``scale`` and ``bias``), ``StateLike`` (``jbn.State``,
``jbn.CountedState``, or a mapping with ``mean`` and ``var``), both of them tuples with ``NamedFields`` or mappings;
``Momentum`` (a number, or a function of the number of updates), ``Activation`` (a function of one array),
``NormalizeBy`` (a function of moments), ``Axis`` (of the features), ``AxisName`` and ``Groups`` (of named axes).

A model: ``ArrayTree`` (arrays at any depth), ``Batch`` (what it is called with once), ``Apply`` (it, as a function of
parameters, state and batch), ``Method`` (what of it is called), ``Upstream`` (what its layers normalize by while they
are observed), ``Patterns`` (of paths in it), ``Classes`` (of norms in it), ``Pair`` (a layer and the norm beside it),
``Padding`` (of a convolution in it), ``Record`` (its calls), ``ForeignModel`` (one that is not of Flax).

Another library: ``Library`` (its name), ``LibraryTree`` (arrays as it holds them), ``AnyArray`` (one of them),
``LayerOptions`` (what a norm is made with there), ``Names`` (paths there to paths here).

>>> import jax, jbn
>>> from jbn.typing import ParamsLike
>>> def normalize(params: ParamsLike, x: jax.Array) -> jax.Array:
...     return jbn.bn_forward(params, jbn.bn_init(x.shape[-1])[1], x, False)[0]
>>> normalize({"bias": jax.numpy.ones(3)}, jax.numpy.zeros((2, 3))).shape
(2, 3)
"""

from jbn.comparing.record import ForeignModel, Record
from jbn.converting.convert import Library
from jbn.converting.names import Names
from jbn.converting.options import LayerOptions
from jbn.converting.trees import AnyArray, LibraryTree
from jbn.core.activation import Activation
from jbn.core.choice import NormalizeBy
from jbn.core.numbers import Momentum
from jbn.core.prepare import Axis, AxisName, Groups, NamedFields, ParamsLike, StateLike
from jbn.core.state import Upstream
from jbn.folding.kernel import Padding
from jbn.folding.links import Pair
from jbn.norms import Classes
from jbn.observing.calls import Method
from jbn.observing.survey import Apply, Batch
from jbn.paths import ArrayTree, Patterns

__all__ = [
    "Activation", "AnyArray", "Apply", "ArrayTree", "Axis", "AxisName", "Batch", "Classes", "ForeignModel", "Groups",
    "LayerOptions", "Library", "LibraryTree", "Method", "Momentum", "NamedFields", "Names", "NormalizeBy", "Padding",
    "Pair", "ParamsLike", "Patterns", "Record", "StateLike", "Upstream",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
