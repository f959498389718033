"""``BatchNorm`` for Flax NNX; ``replace`` puts it into a model, ``freeze`` freezes it; they hold no arithmetic."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from ._forward import batch_norm, bn_forward
from ._freeze import Frozen, Patterns, select
from ._layout import OneValue, broadcast_mask, check_flag

ModelT = TypeVar("ModelT")

OPTIONS = (
    "use_running_average", "axis", "momentum", "epsilon", "dtype", "axis_name", "axis_index_groups", "activation",
    "group_size",
)  # fmt: skip


class BatchNorm(nnx.BatchNorm):
    r"""Batch normalization as an NNX module, a drop-in for ``flax.nnx.BatchNorm`` and a subclass of it.

    .. math:: y = f(\gamma\,(x - \mu)\,(\sigma^2 + \epsilon)^{-1/2} + \beta + \text{residual})

    Constructor, attributes and variables (``nnx.Param``: ``scale``, ``bias``; ``nnx.BatchStat``: ``mean``, ``var``;
    None where absent) are made by the Flax that is installed, so ``train()``, ``eval()``, ``set_attributes``,
    ``nnx.view``, filters by type and checkpoints work unchanged. What differs in the figures is what differs from Flax
    Linen, see the README; training and evaluation give the bits of ``jbn.linen.BatchNorm`` and ``jbn.bn_forward``.

    Args:
        num_features: the size of the feature axis.
        activation: f, a function such as ``nnx.relu`` or a module such as ``nnx.PReLU()``, applied last and recomputed
            in the backward pass.
        group_size: number of examples that are a batch of their own, see ``jbn.bn_forward``.
        options: those of ``flax.nnx.BatchNorm``: ``use_running_average``, False unless given; ``axis``, ``momentum``
            (weight of the old statistics), ``epsilon``, ``dtype``, ``axis_name`` and ``axis_index_groups`` as in
            ``jbn.bn_forward``; ``param_dtype``, ``use_bias``, ``use_scale``, ``bias_init``, ``scale_init`` and ``rngs``
            for scale and bias, with ``bias_metadata`` and ``scale_metadata`` where this Flax has them;
            ``use_fast_variance`` and ``promote_dtype`` without effect: statistics are always accurate, and taken in
            float32 or wider.

    Raises:
        ValueError: see ``jbn.bn_forward``.
        TypeError: see ``jbn.bn_forward``; and where ``use_running_average`` is neither True nor False.

    >>> from flax import nnx
    >>> import jax
    >>> from jbn.nnx import BatchNorm
    >>> layer = BatchNorm(3, activation=nnx.relu, rngs=nnx.Rngs(0))
    >>> y = layer(jax.random.normal(jax.random.key(0), (8, 3)))
    >>> bool((layer.mean[...] != 0).all())
    True
    """

    frozen = Frozen()  # of the class, so that a model saved or made before has it too

    def __init__(
        self,
        num_features: int,
        *,
        activation: Callable[[Array], Array] | None = None,
        group_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.activation = activation
        self.group_size = group_size

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize x; in training, move the statistics.

        Args:
            x: float array with the features on ``axis``.
            use_running_average: whether to use ``mean`` and ``var``; instead of the attribute of this name.
            mask: bool, broadcast to x as NumPy does (a mask of examples is ``mask[:, None]``), True where x is valid;
                elsewhere y is 0.
            residual: an array of the shape of x, added before the activation.

        Returns:
            y, of the shape of x.

        Warns:
            UserWarning: for one value per channel in training, where ``jbn.bn_forward`` raises, because an NNX model is
                often tried on a single example first: y does not depend on x, and the statistics are kept.

        """
        evaluate = check_flag(
            "use_running_average", self.use_running_average if use_running_average is None else use_running_average
        )
        train, update = self.frozen.flags(evaluate)
        x = jnp.asarray(x)
        mask = broadcast_mask(mask, x)
        params: dict[str, Any] = {
            "scale": None if self.scale is None else self.scale[...],
            "bias": None if self.bias is None else self.bias[...],
        }
        params = jax.lax.stop_gradient(params) if self.frozen.affine else params
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
            "group_size": self.group_size,
            "activation": self.activation,
            "residual": residual,
            "dtype": self.dtype,
        }
        state = {"mean": self.mean[...], "var": self.var[...]}
        try:
            y, state = bn_forward(params, state, x, train, update=update, momentum=self.momentum, **options)
        except OneValue as error:
            kept = f"This {type(self).__name__} of {self.num_features} features goes on and keeps its statistics."
            warnings.warn(f"{error} {kept}", stacklevel=2)
            if not train:
                return bn_forward(params, state, x, False, **options)[0]
            return batch_norm(x, **params, **options)[0]
        if update:
            self.mean[...], self.var[...] = state["mean"], state["var"]
        return y


def _shown(theirs: Callable[..., None], mine: Callable[..., None]) -> inspect.Signature:
    """Return the signature of Flax's constructor with the new arguments after it."""
    flax, ours = inspect.signature(theirs), inspect.signature(mine).parameters
    return flax.replace(parameters=[*flax.parameters.values(), ours["activation"], ours["group_size"]])


BatchNorm.__init__.__signature__ = _shown(nnx.BatchNorm.__init__, BatchNorm.__init__)  # type: ignore[attr-defined]


class Replaced(NamedTuple):
    """What ``replace`` found in a model, as paths such as ``layers.3.bn``; that of the model itself is empty."""

    paths: tuple[str, ...]  # norms that are jbn's now, those that were already among them
    skipped: tuple[str, ...]  # subclasses of Flax's norm, which keep their own code


def replace(model: ModelT, **overrides: Any) -> tuple[ModelT, Replaced]:
    """Turn every ``flax.nnx.BatchNorm`` of a model into jbn's, in place.

    The modules stay the same objects with the same variables: optimizers, shared references and anything else that
    holds them stay valid. A function that was compiled for the model before compiles once more.

    Args:
        model: a module, or a list, tuple or dictionary of them; found are the norms at any depth.
        overrides: options to set on each norm, those that are jbn's already included: ``use_running_average``,
            ``axis``, ``momentum``, ``epsilon``, ``dtype``, ``axis_name``, ``axis_index_groups``, ``activation``,
            ``group_size``. The others keep their values.

    Returns:
        The model that was given, and ``Replaced(paths, skipped)``. A module at several places has one path.

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
    Replaced(paths=('layers.1',), skipped=())
    """
    if unknown := sorted(set(overrides) - set(OPTIONS)):
        raise TypeError(f"replace() got {', '.join(unknown)}; expected overrides named {', '.join(OPTIONS)}.")
    found = [
        (".".join(map(str, path)), norm) for path, norm in nnx.iter_graph(model) if isinstance(norm, nnx.BatchNorm)
    ]
    ours = [(path, norm) for path, norm in found if type(norm) is nnx.BatchNorm or isinstance(norm, BatchNorm)]
    done = Replaced(tuple(path for path, _ in ours), tuple(path for path, norm in found if (path, norm) not in ours))
    if not ours:
        others = f"; subclasses, which keep their own code, are {', '.join(done.skipped)}" if done.skipped else ""
        warnings.warn(
            f"The model is of type {type(model).__name__} and holds no flax.nnx.BatchNorm{others}.", stacklevel=2
        )
    for _, norm in ours:
        new = {} if isinstance(norm, BatchNorm) else {"activation": None, "group_size": None}
        for name, value in (new | overrides).items():
            # Named as one of the two, for NNX lets no attribute change from one into the other silently.
            setattr(norm, name, nnx.data(value) if nnx.is_data(value) else nnx.static(value))
        if new:  # not a new module, which those who hold the old one would not see
            object.__setattr__(norm, "__class__", BatchNorm)
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

    Where the model evaluates, frozen norms evaluate. ``jbn.freeze`` has a table of the ways to freeze, and says what
    patterns match. The parameters of a frozen norm get gradients of zero with ``affine=True``; weight decay would
    still move them: the optimizer needs ``jbn.trainable_mask``.

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

    >>> from flax import nnx
    >>> import jbn.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), jbn.nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    >>> model, paths = jbn.nnx.freeze(model, "layers/*")
    >>> model.train()
    >>> y = model(jax.random.normal(jax.random.key(0), (8, 4)))
    >>> paths, bool((model.layers[1].mean[...] == 0).all())
    (('layers/1',), True)
    """
    flags = {"use_running_average": use_running_average, "update": update, "affine": affine}
    frozen = Frozen(**{name: check_flag(name, value) for name, value in flags.items()})
    found: list[tuple[str, Any]] = [
        ("/".join(map(str, path)), norm) for path, norm in nnx.iter_graph(model) if isinstance(norm, nnx.BatchNorm)
    ]
    hits = select([path for path, _ in found], patterns, "norms of the model")
    chosen = [(path, norm) for (path, norm), hit in zip(found, hits, strict=True) if hit]
    if others := [path for path, norm in chosen if not isinstance(norm, BatchNorm)]:
        raise ValueError(
            f"patterns match norms that are not jbn's and cannot be frozen: {', '.join(map(repr, others))}; expected "
            "jbn.nnx.BatchNorm. Call jbn.nnx.replace(model) first, or leave them out."
        )
    for _, norm in chosen:
        norm.frozen = frozen
    return model, tuple(path for path, _ in chosen)
