"""``replace`` puts jbn's norm into an NNX model, ``freeze`` freezes norms there; both in place."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jbn.core.numbers import is_schedule
from jbn.freezing import Frozen
from jbn.nnx.module import BatchNorm
from jbn.nnx.norms import Norms, become_ours, set_attribute
from jbn.nnx.variables import read
from jbn.norms import Classes
from jbn.paths import Patterns, name_few, select
from jbn.replacing import Found, check_overrides

ModelT = TypeVar("ModelT")

OPTIONS = (
    "use_running_average", "axis", "momentum", "epsilon", "dtype", "axis_name", "axis_index_groups", "activation",
    "group_size", "unbiased", "normalize_by", "sow_moments",
)  # fmt: skip


def replace(model: ModelT, *, also: Classes = (), **overrides: Any) -> tuple[ModelT, Found]:
    """Turn every ``flax.nnx.BatchNorm`` of a model into jbn's, in place.

    The modules stay the same objects with the same variables: optimizers, shared references and anything else that
    holds them stay valid. A function that was compiled for the model before compiles once more.

    Args:
        model: a module, or a list, tuple or dictionary of them; found are the norms at any depth.
        also: classes of norms that compute what Flax's does, such as a copy of its code: attributes of Flax's names, a
            call like Flax's, the same variables.
        overrides: options to set on each norm, those that are jbn's already included: ``use_running_average``,
            ``axis``, ``momentum``, ``epsilon``, ``dtype``, ``axis_name``, ``axis_index_groups``, ``activation``,
            ``group_size``, ``unbiased``, ``normalize_by``, ``sow_moments``. The others keep their values. A function as
            ``momentum`` gives those norms a ``count`` that have none; it begins at 0.

    Returns:
        The model that was given, and ``Found(paths, skipped)``: the norms that are jbn's now, and those that keep
        their own code, whatever else holds ``nnx.BatchStat`` variables ``mean`` and ``var``. A module at several places
        has one path.

    Raises:
        TypeError: for overrides of other names, and for classes of ``also`` whose attributes or call are not Flax's;
            the model is as it was.
        ValueError: for modules of ``also`` whose variables are not those of Flax's; likewise.

    Warns:
        UserWarning: where no norm was found.

    >>> from flax import nnx
    >>> import jbn.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    >>> model, replaced = jbn.nnx.replace(model, momentum=0.9)
    >>> replaced
    Found(paths=('layers/1',), skipped=())
    """
    check_overrides(overrides, OPTIONS)
    norms = Norms.read(also)
    found = norms.find(model)
    ours = [(path, norm) for path, norm in found if _becomes_ours(norm, norms)]
    done = Found(tuple(path for path, _ in ours), tuple(path for path, norm in found if (path, norm) not in ours))
    if not ours:
        names = ", ".join(done.skipped)
        others = f"; norms of other classes, which keep their own code, are {names}: see also" if done.skipped else ""
        warnings.warn(
            f"The model is of type {type(model).__name__} and holds no flax.nnx.BatchNorm{others}.", stacklevel=2
        )
    for _, norm in ours:
        if not isinstance(norm, BatchNorm):
            become_ours(norm)
        for name, value in overrides.items():
            set_attribute(norm, name, value)
        if is_schedule(norm.momentum) and norm.count is None:
            stacked = read(norm.mean).shape[:-1]  # by nnx.vmap
            norm.count = nnx.BatchStat(jnp.zeros(stacked, jnp.int32))
    return model, done


def freeze(
    model: ModelT,
    patterns: Patterns = "*",
    *,
    use_running_average: bool = True,
    update: bool = False,
    affine: bool = False,
) -> tuple[ModelT, tuple[str, ...]]:
    """Freeze the norms of a model, in place: it says what they do where the model trains, whoever calls ``train()``.

    Where the model evaluates, frozen norms evaluate. ``jbn.keep_statistics`` has a table of the ways to freeze, and
    says what patterns match. The parameters of a frozen norm get gradients of zero with ``affine=True``; weight decay
    would still move them: the optimizer needs ``jbn.trainable_mask``.

    Args:
        model: a module, or a list, tuple or dictionary of them; found are the norms at any depth.
        patterns: one or several, matched with the paths of the norms, joined by ``/``: ``"backbone"``,
            ``"layers/*/bn"``; all norms unless given. Norms that do not match stay as they are.
        use_running_average: whether the running statistics normalize, instead of those of the batch.
        update: whether the running statistics move.
        affine: whether scale and bias are constants.

    Returns:
        The model that was given, and the paths of the norms that match. A module at several places has one path. To
        undo it: ``freeze(model, patterns, use_running_average=False, update=True)``.

    Raises:
        ValueError: for a pattern that matches no norm, and for norms that match and are not jbn's; the model is as it
            was.
        TypeError: for patterns that are not strings, and flags that are neither True nor False.

    >>> import jax, jbn.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), jbn.nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    >>> model, paths = jbn.nnx.freeze(model, "layers/*")
    >>> model.train()
    >>> y = model(jax.random.normal(jax.random.key(0), (8, 4)))
    >>> paths, bool((model.layers[1].mean[...] == 0).all())
    (('layers/1',), True)
    """
    frozen = Frozen.read(use_running_average=use_running_average, update=update, affine=affine)
    found = Norms().find(model)
    hits = select([path for path, _ in found], patterns, "norm of the model")
    chosen = [(path, norm) for (path, norm), hit in zip(found, hits, strict=True) if hit]
    if others := [path for path, norm in chosen if not isinstance(norm, BatchNorm)]:
        raise ValueError(
            f"patterns match norms that are not jbn's and cannot be frozen: {name_few(map(repr, others))}; expected "
            "jbn.nnx.BatchNorm. Call jbn.nnx.replace(model) first, with also= for copies of Flax's, or leave them out."
        )
    for _, norm in chosen:
        norm.frozen = frozen
    return model, tuple(path for path, _ in chosen)


def _becomes_ours(norm: Any, norms: Norms) -> bool:
    """Say whether ``replace`` acts on a norm; subclasses of Flax's may have code of their own."""
    return isinstance(norm, BatchNorm) or type(norm) is nnx.BatchNorm or norms.find_class(norm) in norms.also
