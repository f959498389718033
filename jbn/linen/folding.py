"""``fold``: a Linen model whose normalizations are inside the layers beside them; ``foldable`` says which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.errors import ModifyScopeVariableError
from flax.typing import VariableDict

from jbn.arguments import check_model
from jbn.folding.layers import TRAINS, call_marked, check_folded_call, do_the_rest, fold_layer
from jbn.folding.links import Folds, Links, Pair, find_links
from jbn.linen.module import BatchNorm
from jbn.linen.norms import Norms
from jbn.linen.replacing import StandIn
from jbn.linen.statistics import holds_statistics
from jbn.linen.variables import check_variables
from jbn.norms import Classes, find_class
from jbn.paths import join

_LAYERS = (nn.Dense, nn.Conv, nn.ConvTranspose)
_MEAN, _KERNEL = ("batch_stats", "mean"), ("params", "kernel")
_EXPORTER = (
    "expected a call of the class itself. Exporters that put code of their own in the place of Flax's layers do this: "
    "trace first, and give them the program, "
    "jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(lambda x: apply(variables, x))(x))."
)
_BYPASSED = "{} ran past Flax's interceptors, so that the bias of the norm folded into it is missing; " + _EXPORTER
_GIVEN_TWICE = (
    "{} has use_running_average from its constructor and is given it at the call too, which it was not when the model "
    "was folded; " + _EXPORTER
)
_NOT_REPLACED = (
    "{} is not folded, and was jbn's inside of jbn.linen.replace() when the model was; expected a call of apply inside "
    "of that context too, or a fold outside of it."
)


@dataclass(frozen=True)
class _Called:
    """The layers and norms of a traced call by path, norms as those of jbn that compute what they do.

    Attributes:
        layers: the layers.
        norms: the norms.
        ours: paths of norms that were jbn's, by themselves or inside of ``replace``.
        replaced: paths of those that were so inside of ``replace``.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, BatchNorm] = field(default_factory=dict)
    ours: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)


def foldable(model: nn.Module, variables: VariableDict, *args: Any, also: Classes = (), **kwargs: Any) -> Folds:
    """Propose what ``fold`` can fold in a model, from a traced call; nothing is computed.

    Args:
        model: a Linen module.
        variables: its ``params`` and ``batch_stats``, arrays or shapes.
        args: what follows in ``model.apply(variables, ...)`` in evaluation, arrays or ``jax.ShapeDtypeStruct``.
        also: see ``fold``.
        kwargs: likewise, such as ``train=False``.

    Returns:
        ``Folds(pairs, kept)``: the pairs of paths that ``fold`` takes, and the norms in none of them: whatever else
        holds a ``mean`` and a ``var`` in ``batch_stats``.

    Raises:
        ValueError: for a norm that normalizes by the batch, and as ``fold`` for ``also``.
        TypeError: likewise.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(True), nn.relu, nn.BatchNorm(True)]), jnp.ones((8, 3))
    >>> jbn.linen.foldable(model, model.init(jax.random.key(0), x), x)
    Folds(pairs=(('layers_0', 'layers_1'),), kept=('layers_3',))
    """
    return _trace(Norms.read(also), model, variables, args, kwargs)[0].choose(None)


def fold(
    model: nn.Module,
    variables: VariableDict,
    *args: Any,
    pairs: Sequence[Pair] | None = None,
    also: Classes = (),
    **kwargs: Any,
) -> tuple[Callable[..., Any], dict[str, Any], Folds]:
    r"""Fold the norms of a model in evaluation into the convolutions and dense layers beside them.

    .. math:: W'_o = a_o W_o,\quad b'_o = a_o (b_o - \mu_o) + \beta_o,\quad a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}

    Flax's norms and jbn's, and the layers ``nn.Dense``, ``nn.Conv`` and ``nn.ConvTranspose``. A layer must be called
    once, its norm alone must take what it returns, and its kernel must go into one product as it is, not masked, not
    normalized by ``nn.WeightNorm``, not shared; a product that the layer was given, such as ``dot_general``, is none.
    A norm that follows no such layer goes into the layer after it, if there is no activation between them and no zeros
    are padded. Residual, activation and mask of jbn's norms stay.

    Args:
        model: a Linen module.
        variables: its ``params`` and ``batch_stats``; other collections come back as they are.
        args: what follows in ``model.apply(variables, ...)`` in evaluation, arrays or ``jax.ShapeDtypeStruct``: a call
            is traced to see what follows what.
        pairs: which to fold, (layer, norm) or (norm, layer), paths joined by ``/``; what ``foldable`` proposes unless
            given.
        also: classes of norms that compute what Flax's does, such as a copy of its code: fields of Flax's names, a call
            like Flax's, the same variables.
        kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
        ``apply``, to be called with these variables as ``model.apply`` is; the new variables, without those of folded
        norms; and ``Folds(pairs, kept)``. They hold for calls that go the way that was traced: for another ``method``
        or a flag that changes what follows what, fold with that. Inside of ``jbn.linen.replace`` norms are folded as
        they compute there, and stay so after the block.

    Raises:
        ValueError: for pairs that the call does not show, with what it does show of their paths; for a norm that
            normalizes by the batch, here or in ``apply``; in ``apply`` for a norm that is kept and has left the
            ``replace`` in which the model was folded; for layers of ``also`` whose variables are not those of
            Flax's.
        TypeError: for classes of ``also`` whose fields or call are not Flax's.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), jbn.linen.BatchNorm(True), nn.relu]), jnp.ones((8, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> apply, folded, folds = jbn.linen.fold(model, variables, x)
    >>> bool(jnp.allclose(apply(folded, x), model.apply(variables, x), atol=1e-6)), folds.kept, sorted(folded["params"])
    (True, (), ['layers_0'])

    Source: see ``jbn.fold``, which does one layer.
    """
    known = Norms.read(also)
    links, called = _trace(known, model, variables, args, kwargs)
    folds = links.choose(pairs)
    new = {name: unfreeze(collection) for name, collection in variables.items()}  # type: ignore[arg-type]
    for pair in folds.pairs:
        _fold_pair(new, called, pair)
    paths = {path for pair in folds.pairs for path in pair}
    norms, layers = paths & called.norms.keys(), paths & called.layers.keys()
    without_bias = {path for path in layers if not called.layers[path].use_bias}

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        met = set[str]()  # of this call alone: others may be under way, in other threads

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer, path = context.module, join(context.module.path)
            called_itself = context.method_name == "__call__"
            met.update([path] if called_itself else [])
            if called_itself and path in norms and known.find_class(layer):
                evaluate, ours = getattr(layer, "use_running_average", None), path in called.ours
                return _call_rest(called.norms[path], path, *args, ours=ours, evaluate=evaluate, **kwargs)
            if called_itself and path in called.replaced and not isinstance(layer, StandIn):
                raise ValueError(_NOT_REPLACED.format(path or "The norm"))
            y = call(*args, **kwargs)
            if called_itself and path in without_bias and find_class(layer, _LAYERS):
                bias = meta.unbox(layer.get_variable("params", "bias")).astype(y.dtype)
                y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
            return y

        with nn.intercept_methods(intercept):
            y = model.apply(variables, *args, **kwargs)
        for pair in folds.pairs:
            if lost := [path for path in pair if path in without_bias and path not in met and met & set(pair)]:
                raise ValueError(_BYPASSED.format(lost[0]))
        return y

    return apply, new, folds


def _trace(known: Norms, model: nn.Module, variables: Any, args: Any, kwargs: Any) -> tuple[Links, _Called]:
    """Trace a call of a model in evaluation."""
    check_model(model, nn.Module, "flax.linen")
    check_variables(variables)
    called, norms = _Called(), list[str]()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, path = context.module, join(context.module.path)
        called_itself = context.method_name == "__call__"
        try:
            if called_itself and known.find_class(layer):
                y = call_norm(call, layer, path, args, kwargs)
            elif called_itself and find_class(layer, _LAYERS):
                called.layers[path] = layer
                whole = _shape(layer.variables, "", _KERNEL) == _shape(variables, path, _KERNEL)
                y = call_marked(call, layer, path, args, kwargs, is_norm=False, is_whole=whole)
            else:
                y = call(*args, **kwargs)
        except ModifyScopeVariableError as error:
            if holds_statistics(layer) and 'collection "batch_stats"' in str(error):
                raise ValueError(TRAINS.format(path or "The norm")) from error
            raise
        if holds_statistics(layer) and path not in norms:
            norms.append(path)
        return y

    def call_norm(call: Any, layer: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        called.ours.update([path] if known.find_class(layer) is BatchNorm else [])
        called.replaced.update([path] if isinstance(layer, StandIn) else [])
        called.norms[path] = norm = BatchNorm(**known.read_fields(layer) | {"parent": None})
        if _trains(getattr(layer, "use_running_average", None), *args, **kwargs):
            raise ValueError(TRAINS.format(path or "The norm"))
        whole = _shape(layer.variables, "", _MEAN) == _shape(variables, path, _MEAN)
        return call_marked(call, norm, path, args, kwargs, is_norm=True, is_whole=whole)

    def run(params: Any, others: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            # Nothing is mutable that the caller does not make so: there are models that train where it is.
            return model.apply({**others, "params": params}, *args, **kwargs)

    others = {name: collection for name, collection in variables.items() if name != "params"}
    return find_links(run, args, kwargs, variables.get("params", {}), others, norms=norms), called


def _trains(field: bool | None, x: Any, use_running_average: bool | None = None, **_: Any) -> bool:
    """Say whether a norm is called as in training, where ``freeze`` may keep its statistics all the same."""
    return not nn.merge_param("use_running_average", field, use_running_average)


def _shape(variables: Any, path: str, place: tuple[str, str]) -> tuple[int, ...] | None:
    """Return the shape of what a layer has: under ``nn.vmap`` it sees one of a stack, which cannot be folded."""
    collection, name = place
    held = meta.unbox(_at(variables.get(collection, {}), f"{path}/{name}"))
    return None if held is None else jnp.shape(held)


def _fold_pair(variables: dict[str, Any], called: _Called, pair: Pair) -> None:
    first, second = pair
    path, norm = (second, first) if first in called.norms else (first, second)
    weights = _at(variables["params"], path)
    folded = fold_layer(
        called.layers[path],
        meta.unbox(weights["kernel"]),
        meta.unbox(weights.get("bias")),
        meta.unbox(_at(variables["params"], norm, {})),
        meta.unbox(_at(variables["batch_stats"], norm)),
        into="next" if path == second else "previous",
        epsilon=called.norms[norm].epsilon,
    )
    for name, value in zip(("kernel", "bias"), folded, strict=True):
        old = weights.get(name)
        weights[name] = old.replace_boxed(value) if isinstance(old, meta.AxisMetadata) else value
    for collection in ("params", "batch_stats"):
        _drop(variables[collection], norm)


def _at(tree: dict[str, Any], path: str, absent: Any = None) -> Any:
    for key in filter(None, path.split("/")):
        if key not in tree:
            return absent
        tree = tree[key]
    return tree


def _drop(tree: dict[str, Any], path: str) -> None:
    """Delete a node, and those above it that are empty then."""
    key, _, rest = path.partition("/")
    if rest and key in tree:
        _drop(tree[key], rest)
    if not rest or not tree.get(key, True):
        tree.pop(key, None)


def _call_rest(
    norm: BatchNorm,
    path: str,
    x: Any,
    use_running_average: bool | None = None,
    *,
    ours: bool,
    evaluate: bool | None,
    mask: Any = None,
    residual: Any = None,
    scale: Any = None,
    bias: Any = None,
) -> Any:
    """Call what is left of a folded norm, jbn's or another."""
    if evaluate is not None and use_running_average is not None:
        raise ValueError(_GIVEN_TWICE.format(path))
    if _trains(evaluate, x, use_running_average):
        raise ValueError(f"{path} is folded into the layer beside it and cannot train; use the model that was folded.")
    check_folded_call(path, scale, bias)
    promoted = not ours and (norm.use_scale or norm.use_bias)
    given = jnp.promote_types(x.dtype, norm.param_dtype) if promoted else x.dtype
    activation, hidden = (norm.activation, mask) if ours else (None, None)
    return do_the_rest(x, activation=activation, residual=residual, mask=hidden, dtype=norm.dtype or given)
