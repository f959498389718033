"""``record``: what the layers of an NNX model take and return in one call."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jbn.arguments import check_model
from jbn.comparing.record import Record, Recorder
from jbn.nnx.variables import become
from jbn.paths import join


def record(model: nnx.Module, *args: Any, **kwargs: Any) -> Record:
    """Call a copy of an NNX model and return what each of its layers took and returned, for ``jbn.compare``.

    Args:
        model: an NNX module, in the mode that it is to be called in (``model.train()``, ``model.eval()``); it stays as
            it is, statistics and random numbers included.
        args: what it is called with.
        kwargs: likewise.

    Returns:
        ``Call(kind, inputs, outputs)`` of NumPy arrays by path, in the order in which the layers returned; the path of
        the model itself is empty. Layers within ``nnx.scan``, ``nnx.vmap``, ``nnx.jit`` or ``nnx.remat`` are left out:
        JAX traces them.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, jbn.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    >>> [(path, call.kind) for path, call in jbn.nnx.record(model, jnp.ones((2, 4))).items()]
    [('layers/0', 'Linear'), ('layers/1', 'BatchNorm'), ('', 'Sequential')]
    """
    check_model(model, nnx.Module, "flax.nnx")
    copy, recorder = nnx.clone(model), Recorder()
    modules = [(join(path), module) for path, module in nnx.iter_graph(copy) if isinstance(module, nnx.Module)]
    paths = {id(module): path for path, module in modules}
    kinds: dict[type, type] = {}
    for _, module in modules:
        kind = type(module)
        if callable(module) and kind not in kinds:
            kinds[kind] = _recording_class(kind, recorder, paths)
        if kind in kinds:
            become(module, kinds[kind])
    copy(*args, **kwargs)
    return recorder.calls


def _recording_class(kind: Any, recorder: Recorder, paths: dict[int, str]) -> type:
    """Return a class of modules whose calls are noted."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        theirs = kind.__call__.__get__(self)
        if id(self) not in paths:  # what a transform has made of it
            return theirs(*args, **kwargs)
        return recorder.run(theirs, paths[id(self)], kind.__name__, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
