"""``record``: what the layers of a model take and return in one call, as NumPy arrays, whatever library it is of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp

from jbn.converting.trees import Array as NumPyArray
from jbn.converting.trees import as_numpy, dtype_of


@dataclass(frozen=True)
class Call:
    """What a layer took and returned in a call.

    Attributes:
        kind: the name of its class, empty where that is not known.
        inputs: the arrays among its arguments, in the order of ``jax.tree.leaves``.
        outputs: the arrays that it returned.
    """

    kind: str
    inputs: tuple[NumPyArray, ...]
    outputs: tuple[NumPyArray, ...]


Record: TypeAlias = dict[str, Call]
"""The calls of a model by path, in the order in which they returned."""

ForeignModel: TypeAlias = Annotated[Any, "a model of PyTorch, Keras or Haiku"]
"""A ``torch.nn.Module``, a ``keras.Model``, or what ``hk.transform`` or ``hk.transform_with_state`` returned."""


@dataclass
class Recorder:
    """Notes the calls of layers.

    Attributes:
        calls: those that have returned. The second call of a layer has the path ``"path (2)"``.
        active: paths of those that have not.
    """

    calls: Record = field(default_factory=dict)
    active: list[str] = field(default_factory=list)

    def run(self, call: Callable[..., Any], path: str, kind: str, args: Any, kwargs: Any) -> Any:
        """Call a layer and note it; code that a layer runs in its own name is no call of its own."""
        if path in self.active:
            return call(*args, **kwargs)
        inputs = _read(args, kwargs)  # before the call, which may write into them
        self.active.append(path)
        try:
            y = call(*args, **kwargs)
        finally:
            self.active.pop()
        outputs = _read(y)
        if inputs is not None and outputs:
            names = (path if i == 1 else f"{path} ({i})" for i in range(1, len(self.calls) + 2))
            self.calls[next(name for name in names if name not in self.calls)] = Call(kind, inputs, outputs)
        return y


def record(model: ForeignModel, *args: Any, **kwargs: Any) -> Record:
    """Call a model of PyTorch, Keras or Haiku and return what each of its layers took and returned.

    Models of Flax have ``jbn.linen.record`` and ``jbn.nnx.record``. The model is called as it is: what moves in its
    training moves here too.

    Args:
        model: a ``torch.nn.Module``; a ``keras.Model``, on the backend that is set; or what ``hk.transform`` or
            ``hk.transform_with_state`` returned, or its ``apply``.
        args: what it is called with, in Haiku what ``apply`` is.
        kwargs: likewise, such as ``training=False`` of Keras.

    Returns:
        ``Call(kind, inputs, outputs)`` of NumPy arrays by path, in the order in which the layers returned. The path of
        a PyTorch model itself is empty. Layers that are compiled, or called while JAX traces, are left out.

    Raises:
        TypeError: for a model of another kind.

    Warns:
        UserWarning: where layers of PyTorch are in training and have running statistics.

    >>> import jbn
    >>> jbn.record("a path")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: model is of type str; expected a model of PyTorch, Keras or Haiku; those of Flax have ...
    """
    recorder = Recorder()
    if str(getattr(model, "__module__", "")).startswith("haiku."):
        _run_haiku(recorder, model.apply if hasattr(model, "apply") else model, args, kwargs)
        return recorder.calls
    layers = list(_layers(model))
    if any(method == "forward" and _moves(layer) for _, layer, method in layers):
        warnings.warn(
            "The model is in training: it normalizes by the batch, and its running statistics move in this call. Call "
            "model.eval() first, or compare with a model in training.",
            stacklevel=2,
        )
    kept = [(layer, method, vars(layer)[method]) for _, layer, method in layers if method in vars(layer)]
    try:
        for path, layer, method in layers:
            _patch(recorder, path, layer, method)
        model(*args, **kwargs)
    finally:
        for _, layer, method in layers:
            vars(layer).pop(method, None)
        for layer, method, theirs in kept:
            vars(layer)[method] = theirs
    return recorder.calls


def _run_haiku(recorder: Recorder, apply: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Call what Haiku has made of a function, and note the calls of its modules."""
    import haiku  # it is there, where one of its functions is

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        return recorder.run(call, context.module.module_name, type(context.module).__name__, args, kwargs)

    with haiku.intercept_methods(intercept):
        apply(*args, **kwargs)


def _layers(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield the path of every layer, the layer, and the method that a call of it runs."""
    if hasattr(model, "named_modules"):
        for path, layer in model.named_modules():
            yield path, layer, "forward"
    elif hasattr(model, "_flatten_layers"):
        for layer in model._flatten_layers():
            if hasattr(layer, "call"):
                yield getattr(layer, "path", None) or layer.name, layer, "call"
    else:
        raise TypeError(
            f"model is of type {type(model).__name__}; expected a model of PyTorch, Keras or Haiku; those of Flax have "
            "jbn.linen.record and jbn.nnx.record. Of any other give jbn.compare its outputs by path."
        )


def _moves(layer: Any) -> bool:
    """Say whether a layer of PyTorch has running statistics that a call moves."""
    return bool(layer.training) and getattr(layer, "running_mean", None) is not None


def _patch(recorder: Recorder, path: str, layer: Any, method: str) -> None:
    """Put a method on a layer itself that notes what its class computes."""
    theirs, kind = getattr(layer, method), type(layer).__name__

    def call(*args: Any, **kwargs: Any) -> Any:
        return recorder.run(theirs, path, kind, args, kwargs)

    setattr(layer, method, call)


def _read(*trees: Any) -> tuple[NumPyArray, ...] | None:
    """Copy the arrays of a tree; None where JAX traces, for then there are no numbers yet."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    return tuple(as_numpy(leaf) for leaf in leaves if _is_number(leaf))


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.number))
