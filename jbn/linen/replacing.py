"""``replace``: a context in which the norms of any Linen model compute with jbn."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn

from jbn.linen.freezing import TRACED
from jbn.linen.module import BatchNorm
from jbn.replacing import Found, check_overrides

OPTIONS = ("momentum", "epsilon", "dtype", "axis_name", "axis_index_groups", "activation", "group_size", "unbiased")


class _StandIn(BatchNorm):
    """A layer in the scope of the one that was called, which reports to ``capture_intermediates`` itself."""

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        return False


@contextmanager
def replace(**overrides: Any) -> Iterator[Found]:
    """Let every ``flax.linen.BatchNorm`` of any model compute with jbn inside a ``with`` block.

    The model and its variables stay what they are: names, shapes, dtypes, initial values, checkpoints. What differs in
    the figures is what differs between the layers, see the README. Tracing decides: enter it before the first call, for
    a function compiled before keeps Flax's arithmetic, and one compiled inside keeps jbn's afterwards; the same goes
    for the parts of a model that are under ``nn.jit``.

    Args:
        overrides: fields to set on each layer, jbn's own included: ``momentum``, ``epsilon``, ``dtype``, ``axis_name``,
            ``axis_index_groups``, ``activation``, ``group_size``, ``unbiased``. The others keep their values.

    Yields:
        ``Found(paths, skipped)``, which fills up as layers are called: those that compute with jbn, and those that
        keep their own code, because their class overrides ``__call__``.

    Raises:
        TypeError: for overrides of other names.

    Warns:
        UserWarning: at the end, where no layer was met.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(False), nn.relu]), jnp.ones((8, 3))
    >>> with jbn.linen.replace(momentum=0.9) as replaced:
    ...     variables = model.init(jax.random.key(0), x)
    ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
    >>> replaced
    Found(paths=('layers_1',), skipped=())
    """
    check_overrides(overrides, OPTIONS)
    found, inside = Found(), False

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal inside
        layer = context.module
        if inside or context.method_name != "__call__" or not isinstance(layer, nn.BatchNorm | BatchNorm):
            return call(*args, **kwargs)
        ours = type(layer).__call__ is BatchNorm.__call__
        known = ours or type(layer).__call__ is nn.BatchNorm.__call__
        found.meet("/".join(layer.path), known)
        if not known or (ours and not overrides):
            return call(*args, **kwargs)
        fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)} | overrides
        mine = {name: value for name, value in fields.items() if name in BatchNorm.__dataclass_fields__}
        inside = True
        try:  # a call like any other, which freeze, contexts within this one and other interceptors see
            return _StandIn(**mine | {"parent": layer.scope})(*args, **kwargs)
        finally:
            inside = False

    with nn.intercept_methods(intercept):
        yield found
    if not found.paths:
        others = f" Subclasses, which keep their own code, are {', '.join(found.skipped)}." if found.skipped else ""
        warnings.warn(f"replace() met no flax.linen.BatchNorm.{others} {TRACED}", stacklevel=3)
