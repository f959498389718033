"""``diagnose`` and ``recalibrate`` for a Linen model and its variables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.core import FrozenDict, unfreeze
from flax.core.scope import CollectionFilter
from flax.core.scope import DenyList as DenyList  # for typing.get_type_hints: CollectionFilter names it as text
from flax.typing import RNGSequences, VariableDict
from jax import Array

from jbn.arguments import check_model
from jbn.core.state import Upstream
from jbn.linen.norms import Norms
from jbn.linen.replacing import replace
from jbn.linen.variables import check_mutable, check_variables
from jbn.norms import Classes
from jbn.observing.calls import NumberedBatches, arguments
from jbn.observing.diagnose import Diagnosis, examine
from jbn.observing.recalibrate import check_batches
from jbn.observing.recalibrate import recalibrate as recalibrate_function
from jbn.observing.survey import Batch

VariablesT = TypeVar("VariablesT", bound=VariableDict)


def diagnose(
    model: nn.Module,
    variables: VariableDict,
    batch: Batch,
    *,
    epsilon: float = 1e-5,
    momentum: float | None = None,
    updates: int | None = None,
    also: Classes = (),
    mutable: CollectionFilter | None = None,
    **call: Any,
) -> Diagnosis:
    """Run one batch through a Linen model as in training and say what is wrong with its normalization.

    It is ``jbn.diagnose`` of ``model.apply(variables, batch, mutable=mutable, **call)`` inside
    ``jbn.linen.replace(also=also)``, so that Flax's norms can be observed. To set more, enter that context around it: a
    model whose norms name an axis of ``pmap`` needs ``replace(axis_name=None)``. It compiles at each call.

    Args:
        model: the model.
        variables: its variables, with ``batch_stats``.
        batch: what it is called with. A tuple is several positional arguments, such as ``(x, mask)``: of a batch of
            images and labels, give the images.
        epsilon: see ``jbn.diagnose``, like the two that follow.
        momentum: likewise.
        updates: likewise.
        also: classes of norms that compute what Flax's does, see ``jbn.linen.replace``.
        mutable: the collections that the call may change, as in ``model.apply``; unless given all in ``variables`` but
            ``params``.
        call: keyword arguments of ``model.apply`` in training: those of the model, such as ``train=True``, and
            ``rngs`` and ``method``.

    Returns:
        ``Diagnosis(layers, findings)``, see ``jbn.diagnose``.

    Raises:
        ValueError: see ``jbn.diagnose``; and for variables without ``batch_stats``, also among the ``mutable``; and for
            layers of ``also`` whose variables are not those of Flax's.
        TypeError: for arguments of other kinds, and classes of ``also`` whose fields or call are not Flax's.

    >>> import flax.linen as nn, jax
    >>> import jbn.linen
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 5
    >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(1), x)
    >>> [finding.kind for finding in jbn.linen.diagnose(model, variables, x).findings]
    ['prior']
    """
    params, stats = _read_variables(model, variables)
    apply = _training_call(model, variables, also, mutable, call)
    return examine(apply, params, stats, batch, epsilon=epsilon, momentum=momentum, updates=updates, door="jbn.linen")


def recalibrate(
    model: nn.Module,
    variables: VariablesT,
    batches: Iterable[Batch],
    *,
    upstream: Upstream = "batch",
    unbiased: bool = False,
    progress: Callable[[int, int], object] | None = None,
    also: Classes = (),
    mutable: CollectionFilter | None = None,
    rngs: RNGSequences | Array | None = None,
    **call: Any,
) -> VariablesT:
    """Return the variables of a Linen model with the statistics of all rows of all batches.

    It is ``jbn.recalibrate`` with the call written by it, as in ``jbn.linen.diagnose``.

    Args:
        model: the model.
        variables: its variables, with ``batch_stats``.
        batches: what it is called with, one after the other; a tuple is several positional arguments.
        upstream: see ``jbn.recalibrate``, like the two that follow.
        unbiased: likewise.
        progress: likewise.
        also: see ``jbn.linen.diagnose``, like the one that follows.
        mutable: likewise.
        rngs: keys as in ``model.apply``; the number of the batch is folded into them.
        call: keyword arguments of ``model.apply`` in training, such as ``train=True``.

    Returns:
        Variables of the type of those given, with other ``batch_stats``; all other collections are those given.

    Raises:
        ValueError: see ``jbn.recalibrate``; and as ``jbn.linen.diagnose``.
        TypeError: likewise.

    Warns:
        UserWarning: where layers evaluate or are not reached, and keep their statistics.

    >>> import flax.linen as nn, jax
    >>> import jbn.linen
    >>> model, x = nn.BatchNorm(use_running_average=False), jax.random.normal(jax.random.key(0), (64, 3)) + 5
    >>> variables = jbn.linen.recalibrate(model, model.init(jax.random.key(1), x), [x[:40], x[40:]])
    >>> bool(abs(variables["batch_stats"]["mean"] - x.mean(0)).max() < 1e-5)
    True
    """
    check_batches(batches, upstream)
    params, stats = _read_variables(model, variables)
    run = _training_call(model, variables, also, mutable, call)

    def apply(params: Any, stats: Any, numbered: Any) -> Any:
        number, batch = numbered
        keys = {} if rngs is None else {"rngs": jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs)}
        return run(params, stats, batch, **keys)

    options: dict[str, Any] = {"upstream": upstream, "unbiased": unbiased, "progress": progress}
    found = recalibrate_function(apply, params, stats, NumberedBatches(batches), **options)
    # An immutable tree comes back as one, in whatever Flax returns.
    new = {"batch_stats": jax.tree.unflatten(jax.tree.structure(variables["batch_stats"]), jax.tree.leaves(found))}
    return variables.copy(new) if isinstance(variables, FrozenDict) else {**variables, **new}  # type: ignore[return-value]


def _read_variables(model: nn.Module, variables: Any) -> tuple[Any, Any]:
    """Return the parameters and the statistics."""
    check_model(model, nn.Module, "flax.linen")
    check_variables(variables)
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables holds {', '.join(map(str, variables)) or 'nothing'}; expected batch_stats beside params, as "
            "model.init returns them: {'params': params, 'batch_stats': batch_stats}."
        )
    return variables.get("params", {}), unfreeze(variables["batch_stats"])  # type: ignore[no-untyped-call]


def _training_call(
    model: nn.Module, variables: Mapping[str, Any], also: Classes, mutable: Any, call: dict[str, Any]
) -> Any:
    """Return the call of a model as a function of parameters, statistics and batch that returns new statistics."""
    kinds = Norms.read(also).also
    mutable = [name for name in variables if name != "params"] if mutable is None else mutable
    check_mutable(mutable)
    others = {name: value for name, value in variables.items() if name not in ("params", "batch_stats")}

    def apply(params: Any, stats: Any, batch: Any, **keys: Any) -> Any:
        given = {**others, "params": params, "batch_stats": stats}
        with warnings.catch_warnings():
            # A model without any norm of Flax is named as one by what observes it.
            warnings.filterwarnings("ignore", r"replace\(\) met no")
            with replace(also=kinds):
                _, new = model.apply(given, *arguments(batch), mutable=mutable, **call, **keys)
        return unfreeze(new["batch_stats"])  # type: ignore[no-untyped-call]

    return apply
