"""Which modules of NNX are norms: by the statistics that they hold, and by the class whose computation they are."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jbn.arguments import refuse
from jbn.nnx.module import NEW, BatchNorm
from jbn.nnx.variables import become, read
from jbn.norms import STATISTICS, Classes, NormClasses, check_fields, check_variables, read_also
from jbn.paths import join

# What a copy of Flax's norm may lack, and what it has then.
_LACKING = {
    "use_running_average": None, "axis": -1, "dtype": None, "axis_name": None, "axis_index_groups": None,
    "scale": None, "bias": None,
}  # fmt: skip
# Attributes that NNX keeps for itself.
_INTERNAL = ("_pytree__", "_object__")


class Norms(NormClasses):
    """The classes of NNX that compute what Flax's norm does."""

    own = (BatchNorm, nnx.BatchNorm)

    @classmethod
    def read(cls, also: Classes) -> "Norms":
        """Read the argument ``also``."""
        return cls(read_also(also, nnx.Module))

    def find(self, model: Any) -> list[tuple[str, Any]]:
        """Return the norms of a model with their paths: all that hold statistics, of whatever class they are.

        Those of the classes of ``also`` are checked.
        """
        modules = [(join(path), module) for path, module in nnx.iter_graph(model) if isinstance(module, nnx.Module)]
        if not modules and not isinstance(model, list | tuple | Mapping):
            raise refuse("model", model, "a flax.nnx.Module, or a list, tuple or dictionary of them")
        found = [(path, module) for path, module in modules if holds_statistics(module)]
        for path, module in found:
            kind = self.find_class(module)
            if kind in self.also:
                held = {name: value for name, value in vars(module).items() if not name.startswith(_INTERNAL)}
                variables = {name: value for name, value in held.items() if isinstance(value, nnx.Variable)}
                params = [name for name in variables if name not in STATISTICS]
                check_variables(kind, path, params, STATISTICS)
                check_fields(kind, held)
        return found


def holds_statistics(module: Any) -> bool:
    """Say whether a module is Flax's norm, or has a mean and a var that are ``nnx.BatchStat``."""
    own = vars(module)
    return isinstance(module, nnx.BatchNorm) or all(isinstance(own.get(name), nnx.BatchStat) for name in STATISTICS)


def become_ours(norm: Any) -> None:
    """Let a norm that computes what Flax's does be jbn's from now on."""
    lacking = _LACKING | {"num_features": read(norm.mean).shape[-1]} | NEW
    for name, value in lacking.items():
        if not hasattr(norm, name):
            set_attribute(norm, name, value)
    become(norm, BatchNorm)


def set_attribute(norm: Any, name: str, value: Any) -> None:
    """Set an attribute, as data or as static: NNX lets none change from one into the other silently."""
    setattr(norm, name, nnx.data(value) if nnx.is_data(value) else nnx.static(value))
