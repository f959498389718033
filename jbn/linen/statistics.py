"""Whether a module of Linen that has been called holds running statistics."""

from collections.abc import Mapping

import flax.linen as nn

from jbn.norms import STATISTICS


def holds_statistics(layer: nn.Module) -> bool:
    """Say whether a module has a mean and a var in ``batch_stats``, of whatever class it is."""
    scope = layer.scope
    if scope is None:
        return False
    held = [scope.get_variable("batch_stats", name) for name in STATISTICS]
    # Under these names there might be modules, which hold variables of their own.
    return all(value is not None and not isinstance(value, Mapping) for value in held)
