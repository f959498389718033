"""``fold``: a Linen model whose normalizations are inside the layers beside them; ``foldable`` says which."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta, unfreeze

from jbn.core.layout import broadcast_mask
from jbn.folding.kernel import fold as fold_one
from jbn.folding.kernel import left_over, without_zeros
from jbn.folding.links import Folds, Links, Pair, by_position, linked, mark
from jbn.linen.module import BatchNorm

_NORMS = (BatchNorm, nn.BatchNorm)
_LAYERS = (nn.Dense, nn.Conv, nn.ConvTranspose)


class _Met(NamedTuple):
    """The layers and norms of a traced call, by path."""

    layers: dict[str, Any]
    norms: dict[str, Any]


def foldable(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Folds:
    """Propose what ``fold`` can fold in a model, from a traced call; nothing is computed.

    Args:
        model: a Linen module.
        variables: its ``params`` and ``batch_stats``, arrays or shapes.
        args: what follows in ``model.apply(variables, ...)`` in evaluation, arrays or ``jax.ShapeDtypeStruct``.
        kwargs: likewise, such as ``train=False``.

    Returns:
        ``Folds(pairs, kept)``: the pairs of paths that ``fold`` takes, and the norms in none of them.

    Raises:
        ValueError: for a norm that normalizes by the batch.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(True), nn.relu, nn.BatchNorm(True)]), jnp.ones((8, 3))
    >>> jbn.linen.foldable(model, model.init(jax.random.key(0), x), x)
    Folds(pairs=(('layers_0', 'layers_1'),), kept=('layers_3',))
    """
    return _links(model, variables, args, kwargs)[0].chosen(None)


def fold(
    model: nn.Module, variables: Any, *args: Any, pairs: Sequence[Pair] | None = None, **kwargs: Any
) -> tuple[Callable[..., Any], dict[str, Any], Folds]:
    r"""Fold the norms of a model in evaluation into the convolutions and dense layers beside them.

    .. math:: W'_o = a_o W_o,\quad b'_o = a_o (b_o - \mu_o) + \beta_o,\quad a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}

    Flax's norms and jbn's, and the layers ``nn.Dense``, ``nn.Conv`` and ``nn.ConvTranspose``. A layer must be called
    once, its norm alone must take what it returns, and its kernel must go into one product as it is, not masked, not
    normalized by ``nn.WeightNorm``, not shared. A norm that follows no such layer goes into the layer after it, if
    there is no activation between them and no zeros are padded. Residual, activation and mask of jbn's norms stay.

    Args:
        model: a Linen module.
        variables: its ``params`` and ``batch_stats``; other collections come back as they are.
        args: what follows in ``model.apply(variables, ...)`` in evaluation, arrays or ``jax.ShapeDtypeStruct``: a call
            is traced to see what follows what.
        pairs: which to fold, (layer, norm) or (norm, layer), paths joined by ``/``; what ``foldable`` proposes unless
            given.
        kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
        ``apply``, to be called with these variables as ``model.apply`` is; the new variables, without those of folded
        norms; and ``Folds(pairs, kept)``. They hold for calls that go the way that was traced: for another ``method``
        or a flag that changes what follows what, fold with that.

    Raises:
        ValueError: for pairs that the call does not show, with what it does show of their paths; for a norm that
            normalizes by the batch, here or in ``apply``.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), jbn.linen.BatchNorm(True), nn.relu]), jnp.ones((8, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> apply, folded, folds = jbn.linen.fold(model, variables, x)
    >>> bool(jnp.allclose(apply(folded, x), model.apply(variables, x), atol=1e-6)), folds.kept, sorted(folded["params"])
    (True, (), ['layers_0'])

    Source: see ``jbn.fold``, which does one layer.
    """
    links, met = _links(model, variables, args, kwargs)
    folds = links.chosen(pairs)
    new = {name: unfreeze(collection) for name, collection in variables.items()}
    for pair in folds.pairs:
        _fold_pair(new, met, pair)
    norms = {path: met.norms[path] for pair in folds.pairs for path in pair if path in met.norms}
    unbiased = {path for pair in folds.pairs for path in pair if path in met.layers and not met.layers[path].use_bias}

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        path = "/".join(layer.path)
        if context.method_name == "__call__" and path in norms and _is_known(layer, _NORMS):
            return _folded(layer, path, *args, **kwargs)
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and path in unbiased and _is_known(layer, _LAYERS):
            bias = meta.unbox(layer.get_variable("params", "bias")).astype(y.dtype)
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
        return y

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return model.apply(variables, *args, **kwargs)

    return apply, new, folds


def _links(model: nn.Module, variables: Any, args: Any, kwargs: Any) -> tuple[Links, _Met]:
    """Trace a call of a model in evaluation."""
    met, norms = _Met({}, {}), list[str]()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, path = context.module, "/".join(context.module.path)
        is_norm, is_layer = _is_known(layer, _NORMS), _is_known(layer, _LAYERS)
        called = context.method_name == "__call__"
        if called and isinstance(layer, _NORMS) and path not in norms:
            norms.append(path)
        if not called or not (is_norm or is_layer):
            return call(*args, **kwargs)
        (met.norms if is_norm else met.layers)[path] = layer
        args, kwargs = by_position(args, kwargs)
        before = layer.get_variable("batch_stats", "mean")
        whole = _shape(layer.variables, "", is_norm) == _shape(variables, path, is_norm)
        last = is_norm and layer.axis in (-1, jnp.ndim(args[0]) - 1)
        takes = whole and (last or (is_layer and _takes(layer)))
        y = call(mark(args[0], "in", path) if takes else args[0], *args[1:], **kwargs)
        if layer.get_variable("batch_stats", "mean") is not before:
            raise ValueError(_TRAINS.format(path or "The norm"))
        plain = last and getattr(layer, "activation", None) is None and not kwargs.keys() & {"residual", "mask"}
        return mark(y, "out", path) if whole and (plain or is_layer) else y

    def run(params: Any, others: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return model.apply({**others, "params": params}, *args, mutable=["batch_stats"], **kwargs)

    others = {name: collection for name, collection in variables.items() if name != "params"}
    return linked(run, args, kwargs, variables.get("params", {}), others, norms=norms), met


def _shape(variables: Any, path: str, is_norm: bool) -> tuple[int, ...] | None:
    """Return the shape of what a layer has: under ``nn.vmap`` it sees one of a stack, which cannot be folded."""
    collection, name = ("batch_stats", "mean") if is_norm else ("params", "kernel")
    held = meta.unbox(_at(variables.get(collection, {}), f"{path}/{name}"))
    return None if held is None else jnp.shape(held)


_TRAINS = (
    "{} normalizes by the batch, whose statistics cannot be folded; expected a call in evaluation, "
    "use_running_average=True or what the model calls it, such as train=False."
)


def _is_known(layer: nn.Module, classes: tuple[type, ...]) -> bool:
    """Say whether a layer computes what one of these classes does; subclasses may have code of their own."""
    return any(isinstance(layer, known) and type(layer).__call__ is known.__call__ for known in classes)  # type: ignore[attr-defined]


def _takes(layer: Any) -> bool:
    """Say whether a norm can be folded into the layer after it."""
    if isinstance(layer, nn.ConvTranspose):
        return False
    return isinstance(layer, nn.Dense) or without_zeros(layer.padding, layer.kernel_size, layer.input_dilation)


def _fold_pair(variables: dict[str, Any], met: _Met, pair: Pair) -> None:
    first, second = pair
    path, norm = (second, first) if first in met.norms else (first, second)
    layer, weights = met.layers[path], _at(variables["params"], path)
    kernel = meta.unbox(weights["kernel"])
    last = "OI" if getattr(layer, "transpose_kernel", False) else "IO"
    folded = fold_one(
        meta.unbox(_at(variables["params"], norm, {})),
        meta.unbox(_at(variables["batch_stats"], norm)),
        kernel,
        meta.unbox(weights.get("bias")),
        layout="." * (kernel.ndim - 2) + last,
        into="next" if path == second else "previous",
        groups=getattr(layer, "feature_group_count", 1),
        padding=getattr(layer, "padding", None),
        epsilon=met.norms[norm].epsilon,
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


def _folded(
    layer: Any, path: str, x: Any, use_running_average: bool | None = None, *, mask: Any = None, residual: Any = None
) -> Any:
    """Return what a folded norm still does."""
    if not nn.merge_param("use_running_average", layer.use_running_average, use_running_average):
        raise ValueError(f"{path} is folded into the layer beside it and cannot train; use the model that was folded.")
    ours = isinstance(layer, BatchNorm)
    promoted = not ours and (layer.use_scale or layer.use_bias)
    given = jnp.promote_types(x.dtype, layer.param_dtype) if promoted else x.dtype
    return left_over(
        x,
        activation=layer.activation if ours else None,
        residual=residual,
        mask=broadcast_mask(mask, x) if ours else None,
        dtype=layer.dtype or given,
    )
