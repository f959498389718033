"""``fold``: a copy of an NNX model whose normalizations are inside the layers beside them; ``foldable`` says which."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jbn.arguments import check_model
from jbn.core.activation import Activation
from jbn.folding.layers import TRAINS, call_marked, check_folded_call, do_the_rest, fold_layer
from jbn.folding.links import Folds, Links, Pair, find_links
from jbn.nnx.module import BatchNorm
from jbn.nnx.norms import Norms, become_ours, holds_statistics
from jbn.nnx.variables import become, read
from jbn.norms import Classes, find_class
from jbn.paths import join

ModelT = TypeVar("ModelT", bound=nnx.Module)

_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)


class Folded(nnx.Module):
    """What is left of a norm that ``fold`` has folded: its residual, its activation and its mask; called as it was.

    Attributes:
        use_running_average: whether it evaluates, which is all that it can: a call in training raises.
        activation: f, a function of one array, applied last; or None.
        dtype: dtype of y; for None that of x, and for a norm of Flax float32 at least.
        ours: whether it was jbn's, so that y is 0 where ``mask`` is False.
    """

    use_running_average: bool
    activation: Activation | None
    dtype: DTypeLike | None
    ours: bool

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: Array | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Do what is left."""
        if not (self.use_running_average if use_running_average is None else use_running_average):
            raise ValueError(
                "This norm is folded into the layer beside it and cannot train; use the model before that."
            )
        check_folded_call("This norm", scale, bias)
        x = jnp.asarray(x)
        given = x.dtype if self.ours else jnp.promote_types(x.dtype, jnp.float32)
        mask = mask if self.ours else None
        return do_the_rest(x, activation=self.activation, residual=residual, mask=mask, dtype=self.dtype or given)


def foldable(model: nnx.Module, *args: Any, also: Classes = (), **kwargs: Any) -> Folds:
    """Propose what ``fold`` can fold in a model, from a traced call; nothing is computed.

    Args:
        model: an NNX module; it is called in evaluation mode.
        args: what it is called with, arrays or ``jax.ShapeDtypeStruct``.
        also: see ``fold``.
        kwargs: likewise.

    Returns:
        ``Folds(pairs, kept)``: the pairs of paths that ``fold`` takes, and the norms in none of them: whatever else
        holds ``nnx.BatchStat`` variables ``mean`` and ``var``.

    Raises:
        ValueError: for a norm that normalizes by the batch, and as ``fold`` for ``also``.
        TypeError: likewise.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, jbn.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    >>> jbn.nnx.foldable(model, jnp.ones((2, 4)))
    Folds(pairs=(('layers/0', 'layers/1'),), kept=())
    """
    return _trace(Norms.read(also), model, args, kwargs).choose(None)


def fold(
    model: ModelT, *args: Any, pairs: Sequence[Pair] | None = None, also: Classes = (), **kwargs: Any
) -> tuple[ModelT, Folds]:
    r"""Fold the norms of a model in evaluation into the convolutions and dense layers beside them, in a copy.

    .. math:: W'_o = a_o W_o,\quad b'_o = a_o (b_o - \mu_o) + \beta_o,\quad a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}

    Flax's norms and jbn's, and the layers ``nnx.Linear``, ``nnx.Conv`` and ``nnx.ConvTranspose``. A layer must be
    called once, its norm alone must take what it returns, and its kernel must go into one product as it is, not masked,
    not normalized, not shared; a product that the layer was given, such as ``dot_general``, is none. A norm that
    follows no such layer goes into the layer after it, if there is no activation between them and no zeros are padded.
    Residual, activation and mask of jbn's norms stay.

    Args:
        model: an NNX module, which stays as it is.
        args: what it is called with, arrays or ``jax.ShapeDtypeStruct``: a call is traced to see what follows what.
        pairs: which to fold, (layer, norm) or (norm, layer), paths joined by ``/``; what ``foldable`` proposes unless
            given.
        also: classes of norms that compute what Flax's does, such as a copy of its code: attributes of Flax's names, a
            call like Flax's, the same variables.
        kwargs: keyword arguments of the call.

    Returns:
        A copy of the model in evaluation mode, without the variables of folded norms, and ``Folds(pairs, kept)``. It
        holds for calls that go the way that was traced: for a flag that changes what follows what, fold with that.

    Raises:
        ValueError: for pairs that the call does not show, with what it does show of their paths; for a norm that
            normalizes by the batch, here or when the copy is called; for modules of ``also`` whose variables are not
            those of Flax's.
        TypeError: for classes of ``also`` whose attributes or call are not Flax's.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, jbn.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), jbn.nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    >>> folded, folds = jbn.nnx.fold(model, jnp.ones((2, 4)))
    >>> folds.pairs, len(nnx.to_flat_state(nnx.state(folded)))  # a kernel and a bias
    ((('layers/0', 'layers/1'),), 2)

    Source: see ``jbn.fold``, which does one layer.
    """
    folds = _trace(Norms.read(also), model, args, kwargs).choose(pairs)
    new = nnx.clone(model)
    new.eval()
    modules = {join(path): module for path, module in nnx.iter_graph(new)}
    for pair in folds.pairs:
        _fold_pair(modules, pair)
    return new, folds


def _trace(known: Norms, model: nnx.Module, args: Any, kwargs: Any) -> Links:
    """Trace a call of a copy of the model whose layers and norms mark what they take and return."""
    check_model(model, nnx.Module, "flax.nnx")
    copy = nnx.clone(model)
    copy.eval()
    norms = known.find(copy)
    for _, norm in norms:
        if known.find_class(norm) in known.also:
            become_ours(norm)
    for path, module in list(nnx.iter_graph(copy)):
        if known.find_class(module) or find_class(module, _LAYERS):
            module.marked, module.marked_rank = join(path), _rank(module)
            become(module, _marking_class(type(module)))  # type: ignore[arg-type]
    graph, state = nnx.split(copy)

    def run(state: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graph, state)
        y = model(*args, **kwargs)
        # What the call stores, such as intermediate values, is a result too.
        return y, nnx.state(model, nnx.Not(nnx.Param))

    return find_links(run, args, kwargs, state, norms=[path for path, _ in norms])


def _rank(module: Any) -> int:
    """Return the rank of what a layer has: under ``nnx.vmap`` it sees one of a stack, which cannot be folded."""
    return jnp.ndim(read(module.mean if isinstance(module, nnx.BatchNorm) else module.kernel))


@cache
def _marking_class(kind: Any) -> type:
    """Return a class of modules that mark what they take and return."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_norm, whole = isinstance(self, nnx.BatchNorm), _rank(self) == self.marked_rank
        before = read(self.mean) if is_norm else None
        theirs = partial(kind.__call__, self)  # type: ignore[operator]
        y = call_marked(theirs, self, self.marked, args, kwargs, is_norm=is_norm, is_whole=whole)
        if is_norm and read(self.mean) is not before:
            raise ValueError(TRAINS.format(self.marked or "The norm"))
        return y

    return type(kind.__name__, (kind,), {"__call__": call})


def _fold_pair(modules: dict[str, Any], pair: Pair) -> None:
    before = holds_statistics(modules[pair[1]])
    layer, norm = (modules[path] for path in (pair if before else pair[::-1]))
    norm.ours = isinstance(norm, BatchNorm)
    if not norm.ours:
        become_ours(norm)
    held = {name: getattr(norm, name) for name in ("scale", "bias", "mean", "var")}
    arrays = {name: None if variable is None else read(variable) for name, variable in held.items()}
    kernel, bias = fold_layer(
        layer,
        read(layer.kernel),
        None if layer.bias is None else read(layer.bias),
        {name: arrays[name] for name in ("scale", "bias")},
        {name: arrays[name] for name in ("mean", "var")},
        into="previous" if before else "next",
        epsilon=norm.epsilon,
    )
    if layer.bias is None and layer.dtype is None:  # y has the widest dtype of what the layer holds
        bias = bias.astype(kernel.dtype)
    # Variables of their own, for others may share the old ones.
    layer.kernel = layer.kernel.replace(kernel)
    layer.bias = nnx.Param(bias) if layer.bias is None else layer.bias.replace(bias)
    layer.use_bias = True
    for name in (*held, *({"count"} & vars(norm).keys())):
        delattr(norm, name)
    become(norm, Folded)
