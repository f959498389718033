"""``record``: what the layers of a Linen model take and return in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.typing import VariableDict

from jbn.arguments import check_model
from jbn.comparing.record import Record, Recorder
from jbn.linen.variables import check_variables
from jbn.paths import join


def record(model: nn.Module | Callable[..., Any], variables: VariableDict, *args: Any, **kwargs: Any) -> Record:
    """Call ``model.apply(variables, ...)`` and return what each of its layers took and returned, for ``jbn.compare``.

    Args:
        model: a Linen module, or a function that is called as its ``apply`` is, such as that of ``jbn.linen.fold``.
        variables: its variables.
        args: what follows in ``model.apply(variables, ...)``.
        kwargs: likewise: ``train=True, mutable=["batch_stats"]`` records a call in training.

    Returns:
        ``Call(kind, inputs, outputs)`` of NumPy arrays by path, in the order in which the layers returned; the path of
        the model itself is empty. Layers within ``nn.scan``, ``nn.vmap``, ``nn.jit`` or ``nn.remat`` are left out: JAX
        traces them.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(True), nn.relu]), jnp.ones((8, 3))
    >>> calls = jbn.linen.record(model, model.init(jax.random.key(0), x), x)
    >>> [(path, call.kind, call.outputs[0].shape) for path, call in calls.items()]
    [('layers_0', 'Dense', (8, 4)), ('layers_1', 'BatchNorm', (8, 4)), ('', 'Sequential', (8, 4))]
    """
    if isinstance(model, type) or not callable(getattr(model, "apply", model)):
        check_model(model, nn.Module, "flax.linen")
    check_variables(variables)
    recorder = Recorder()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" and layer.path:
            return call(*args, **kwargs)
        return recorder.run(call, join(layer.path), type(layer).__name__, args, kwargs)

    with nn.intercept_methods(intercept):
        (model.apply if isinstance(model, nn.Module) else model)(variables, *args, **kwargs)
    return recorder.calls
