"""Which modules of Linen are norms: by the class whose computation they are, and by the statistics that they hold."""

import dataclasses
from typing import Any

import flax.linen as nn

from jbn.linen.module import BatchNorm
from jbn.norms import Classes, NormClasses, check_fields, check_variables, read_also


class Norms(NormClasses):
    """The classes of Linen that compute what Flax's norm does."""

    own = (BatchNorm, nn.BatchNorm)

    @classmethod
    def read(cls, also: Classes) -> "Norms":
        """Read the argument ``also``."""
        kinds = read_also(also, nn.Module)
        for kind in kinds:
            names = (field.name for field in dataclasses.fields(kind))
            check_fields(kind, (name for name in names if name not in ("parent", "name")))
        return cls(kinds)

    def read_fields(self, layer: nn.Module) -> dict[str, Any]:
        """Return the fields of jbn's norm that computes what a norm does, whose variables exist."""
        names = (field.name for field in dataclasses.fields(layer) if field.name in BatchNorm.__dataclass_fields__)
        fields = {name: getattr(layer, name) for name in names}
        kind = self.find_class(layer)
        if kind not in self.also:
            return fields
        held = layer.variables
        params, statistics = held.get("params", {}), held.get("batch_stats", {})
        check_variables(kind, "/".join(layer.path), params, {*statistics} - {"count"})  # which replace adds
        return {"use_scale": "scale" in params, "use_bias": "bias" in params} | fields
