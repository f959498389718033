"""``replace`` puts jbn's norm into an NNX model, ``freeze`` freezes norms there; both in place."""

import warnings
from typing import Any, TypeVar

from flax import nnx

from jbn.freezing import Frozen
from jbn.nnx.module import NEW, BatchNorm
from jbn.nnx.variables import become
from jbn.paths import Patterns, join, name_few, select
from jbn.replacing import Found, check_overrides

ModelT = TypeVar("ModelT")

OPTIONS = (
    "use_running_average", "axis", "momentum", "epsilon", "dtype", "axis_name", "axis_index_groups", "activation",
    "group_size", "unbiased",
)  # fmt: skip


def replace(model: ModelT, **overrides: Any) -> tuple[ModelT, Found]:
    """Turn every ``flax.nnx.BatchNorm`` of a model into jbn's, in place.

    The modules stay the same objects with the same variables: optimizers, shared references and anything else that
    holds them stay valid. A function that was compiled for the model before compiles once more.

    Args:
        model: a module, or a list, tuple or dictionary of them; found are the norms at any depth.
        overrides: options to set on each norm, those that are jbn's already included: ``use_running_average``,
            ``axis``, ``momentum``, ``epsilon``, ``dtype``, ``axis_name``, ``axis_index_groups``, ``activation``,
            ``group_size``, ``unbiased``. The others keep their values.

    Returns:
        The model that was given, and ``Found(paths, skipped)``. A module at several places has one path.

    Raises:
        TypeError: for overrides of other names; the model is as it was.

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
    found = _norms(model)
    ours = [(path, norm) for path, norm in found if type(norm) is nnx.BatchNorm or isinstance(norm, BatchNorm)]
    done = Found(tuple(path for path, _ in ours), tuple(path for path, norm in found if (path, norm) not in ours))
    if not ours:
        others = f"; subclasses, which keep their own code, are {', '.join(done.skipped)}" if done.skipped else ""
        warnings.warn(
            f"The model is of type {type(model).__name__} and holds no flax.nnx.BatchNorm{others}.", stacklevel=2
        )
    for _, norm in ours:
        new = {} if isinstance(norm, BatchNorm) else NEW
        for name, value in (new | overrides).items():
            # Named as one of the two, for NNX lets no attribute change from one into the other silently.
            setattr(norm, name, nnx.data(value) if nnx.is_data(value) else nnx.static(value))
        if new:
            become(norm, BatchNorm)
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
    found = _norms(model)
    hits = select([path for path, _ in found], patterns, "norms of the model")
    chosen = [(path, norm) for (path, norm), hit in zip(found, hits, strict=True) if hit]
    if others := [path for path, norm in chosen if not isinstance(norm, BatchNorm)]:
        raise ValueError(
            f"patterns match norms that are not jbn's and cannot be frozen: {name_few(map(repr, others))}; expected "
            "jbn.nnx.BatchNorm. Call jbn.nnx.replace(model) first, or leave them out."
        )
    for _, norm in chosen:
        norm.frozen = frozen
    return model, tuple(path for path, _ in chosen)


def _norms(model: Any) -> list[tuple[str, Any]]:
    """Return the norms of a model with their paths, Flax's and jbn's."""
    found = ((path, norm) for path, norm in nnx.iter_graph(model) if isinstance(norm, nnx.BatchNorm))
    return [(join(path), norm) for path, norm in found]
