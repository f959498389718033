"""``diagnose`` and ``recalibrate`` for an NNX model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from jbn.arguments import check_model, refuse
from jbn.core.state import Upstream
from jbn.nnx.editing import replace
from jbn.norms import Classes
from jbn.observing.calls import Method, NumberedBatches, arguments
from jbn.observing.diagnose import Diagnosis, examine
from jbn.observing.recalibrate import check_batches
from jbn.observing.recalibrate import recalibrate as recalibrate_function
from jbn.observing.survey import Batch

ModelT = TypeVar("ModelT", bound=nnx.Module)


def diagnose(
    model: nnx.Module,
    batch: Batch,
    *,
    epsilon: float = 1e-5,
    momentum: float | None = None,
    updates: int | None = None,
    also: Classes = (),
    method: Method = "__call__",
    **call: Any,
) -> Diagnosis:
    """Run one batch through an NNX model as in training and say what is wrong with its normalization.

    It is ``jbn.diagnose`` for a copy of the model, in which ``jbn.nnx.replace(also=also)`` has put jbn's norms in the
    place of Flax's. A model in which every norm evaluates, as after ``model.eval()``, is run as after
    ``model.train()``; any other as it is, so that a norm which was left in evaluation is found. The model itself stays
    what it is: its variables, its mode, its random state. It compiles at each call.

    Args:
        model: the model.
        batch: what it is called with. A tuple is several positional arguments, such as ``(x, mask)``: of a batch of
            images and labels, give the images.
        epsilon: see ``jbn.diagnose``, like the two that follow.
        momentum: likewise.
        updates: likewise.
        also: classes of norms that compute what Flax's does, see ``jbn.nnx.replace``.
        method: what is called, a method by its name or a function of the model and the batch.
        call: keyword arguments of the call in training.

    Returns:
        ``Diagnosis(layers, findings)``, see ``jbn.diagnose``.

    Raises:
        ValueError: see ``jbn.diagnose``; and for modules of ``also`` whose variables are not those of Flax's.
        TypeError: for arguments of other kinds, and classes of ``also`` whose attributes or call are not Flax's.

    >>> from flax import nnx
    >>> import jax, jbn.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.relu)
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 5
    >>> [finding.kind for finding in jbn.nnx.diagnose(model, x).findings]
    ['prior']
    """
    params, stats, run = _take_apart(model, also, method, call)

    def apply(params: Any, stats: Any, batch: Any) -> Any:
        return run(params, stats, (np.uint32(0), batch))

    return examine(apply, params, stats, batch, epsilon=epsilon, momentum=momentum, updates=updates, door="jbn.nnx")


def recalibrate(
    model: ModelT,
    batches: Iterable[Batch],
    *,
    upstream: Upstream = "batch",
    unbiased: bool = False,
    progress: Callable[[int, int], object] | None = None,
    also: Classes = (),
    method: Method = "__call__",
    **call: Any,
) -> ModelT:
    """Give an NNX model the statistics of all rows of all batches, in place.

    It is ``jbn.recalibrate`` for a copy of the model, run as in ``jbn.nnx.diagnose``.

    Args:
        model: the model; its statistics change, and nothing else: not its mode, nor its random state.
        batches: what it is called with, one after the other; a tuple is several positional arguments.
        upstream: see ``jbn.recalibrate``, like the two that follow.
        unbiased: likewise.
        progress: likewise.
        also: see ``jbn.nnx.diagnose``.
        method: what is called, a method by its name or a function of the model and the batch.
        call: keyword arguments of the call in training.

    Returns:
        The model that was given.

    Raises:
        ValueError: see ``jbn.recalibrate``; and as ``jbn.nnx.diagnose``; the model is as it was.
        TypeError: likewise.

    Warns:
        UserWarning: where layers evaluate or are not reached, and keep their statistics.

    >>> from flax import nnx
    >>> import jax, jbn.nnx
    >>> model, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (64, 3)) + 5
    >>> model = jbn.nnx.recalibrate(model, [x[:40], x[40:]])
    >>> bool(abs(model.mean[...] - x.mean(0)).max() < 1e-5)
    True
    """
    check_batches(batches, upstream)
    params, stats, apply = _take_apart(model, also, method, call)
    options: dict[str, Any] = {"upstream": upstream, "unbiased": unbiased, "progress": progress}
    nnx.update(model, recalibrate_function(apply, params, stats, NumberedBatches(batches), **options))
    return model


def _take_apart(model: Any, also: Classes, method: Method, call: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the parameters and statistics of a model, and its call as a function of them and a numbered batch."""
    check_model(model, nnx.Module, "flax.nnx")
    known = callable(getattr(type(model), method, None)) if isinstance(method, str) else callable(method)
    if not known:
        raise refuse("method", method, f"the name of a method of {type(model).__name__}, or a function of the model")
    copy = nnx.clone(model)
    with warnings.catch_warnings():
        # A model without any norm of Flax is named as one by what observes it.
        warnings.filterwarnings("ignore", r"The model is of type \w+ and holds no")
        replace(copy, also=also)
    if all(getattr(module, "use_running_average", True) for _, module in nnx.iter_graph(copy)):
        copy.train()
    graph, *parts = nnx.split(copy, nnx.Param, nnx.BatchStat, nnx.RngCount, ...)
    params, stats, counts, rest = parts

    def apply(params: Any, stats: Any, numbered: Any) -> Any:
        number, batch = numbered
        # A key is made of a count, which goes on from there: no two batches have the same random numbers.
        moved = jax.tree.map(lambda count: count + (number << 16), counts)
        held, known = (jax.tree.map(lambda leaf: leaf, tree) for tree in (rest, stats))  # variables of this trace
        new = nnx.merge(graph, params, known, moved, held)
        function = getattr(type(new), method) if isinstance(method, str) else method
        function(new, *arguments(batch), **call)
        return nnx.state(new, nnx.BatchStat)

    return params, stats, apply
