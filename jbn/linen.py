"""``BatchNorm`` for Flax Linen, and two contexts: ``replace`` puts it into any model, ``freeze`` keeps some of them.

It creates variables and calls ``bn_forward``; it holds no arithmetic.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from ._forward import batch_norm, bn_forward
from ._freeze import Frozen, Patterns, matches, select
from ._layout import check_flag, layout_of

Initializer = Callable[..., Any]

OPTIONS = ("momentum", "epsilon", "dtype", "axis_name", "axis_index_groups", "activation", "group_size")


class BatchNorm(nn.Module):
    r"""Batch normalization as a Linen module, a drop-in for ``flax.linen.BatchNorm``: the import line is the migration.

    .. math:: y = f(\gamma\,(x - \mu)\,(\sigma^2 + \epsilon)^{-1/2} + \beta + \text{residual})

    Constructor, call signature, variables (``params``: ``scale``, ``bias``; ``batch_stats``: ``mean``, ``var``), their
    order, shapes and dtypes are Flax's, so that its checkpoints load unchanged. What differs in the figures is listed
    in the README.

    Args:
        use_running_average: whether to use the statistics in ``batch_stats``; here or at the call, not at both.
        axis: the axis or axes of the features.
        momentum: weight of the old statistics, 0 to 1.
        epsilon: ε > 0, added to the variance.
        dtype: dtype of y, that of x unless given.
        param_dtype: dtype of scale and bias.
        use_bias: whether there is a bias β.
        use_scale: whether there is a scale γ.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: name or names of the axes whose shards form one batch; not needed to initialize or to evaluate.
        axis_index_groups: groups of indices of that axis.
        use_fast_variance: accepted for Flax's sake, without effect: the statistics are always accurate.
        force_float32_reductions: whether the statistics are stored in float32 or in ``param_dtype``; they are computed
            in float32, or float64 for float64 x, in either case.
        activation: f, a function such as ``nn.relu``, applied last and recomputed in the backward pass.
        group_size: number of examples that are a batch of their own, see ``jbn.bn_forward``.

    Raises:
        ValueError: see ``jbn.bn_forward``; and where statistics would silently restart, because ``batch_stats`` was
            not passed to ``apply``.
        TypeError: see ``jbn.bn_forward``.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jbn.linen import BatchNorm
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> layer = BatchNorm(use_running_average=False, activation=nn.relu)
    >>> variables = layer.init(jax.random.key(1), x)
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> updates["batch_stats"]["mean"].shape
    (3,)
    """

    use_running_average: bool | None = None
    axis: int | tuple[int, ...] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: Callable[[Array], Array] | None = None
    group_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize x.

        Args:
            x: float array with the features on ``axis``.
            use_running_average: whether to use the statistics in ``batch_stats``.
            mask: bool, broadcast to x as NumPy does (a mask of examples is ``mask[:, None]``), True where x is valid;
                elsewhere y is 0.
            residual: an array of the shape of x, added before the activation.

        Returns:
            y, of the shape of x. During initialization the statistics are those of the batch at hand, whatever its
            size, and are not stored.

        """
        evaluate = check_flag(
            "use_running_average", nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        )
        if isinstance(self.activation, nn.Module):
            raise TypeError(
                f"activation is the module {type(self.activation).__name__}; expected a function, because the "
                "derivative rule cannot create variables: call the module on the output of BatchNorm instead."
            )
        x = jnp.asarray(x)
        if mask is not None:  # Flax takes any mask that broadcasts to x, of numbers too
            mask = jnp.asarray(mask, dtype=bool)
            if all(m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
                mask = jnp.expand_dims(mask, tuple(range(x.ndim - mask.ndim)))
        shape = layout_of(x, self.axis).features
        _require_statistics(self)
        stored = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stored)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stored)
        params: dict[str, Any] = {
            "scale": self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None,
            "bias": self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
        }
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "activation": self.activation,
            "residual": residual,
            "dtype": self.dtype,
        }
        frozen = _frozen(self)
        train, update = frozen.flags(evaluate)
        if self.is_initializing() and not evaluate:
            return batch_norm(x, **params, **options)[0]
        state = {"mean": mean.value, "var": var.value}
        y, state = bn_forward(
            lax.stop_gradient(params) if frozen.affine else params,
            state,
            x,
            train,
            update=update,
            momentum=self.momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size,
            **options,
        )
        if update:
            mean.value, var.value = state["mean"], state["var"]
        return y


# Not a method: Flax wraps those, and users who intercept method calls would see it.
def _require_statistics(layer: BatchNorm) -> None:
    """Refuse to create statistics outside initialization: they would restart at every step."""
    if layer.has_variable("batch_stats", "mean") or layer.is_initializing():
        return
    if layer.is_mutable_collection("batch_stats") and not layer.is_mutable_collection("params"):
        raise ValueError(
            f"batch_stats is mutable but holds no statistics for {'/'.join(layer.path) or 'this BatchNorm'}, so they "
            "would restart from mean 0 and variance 1 at every call. Pass them: model.apply({'params': params, "
            "'batch_stats': batch_stats}, x, mutable=['batch_stats']), with the batch_stats of model.init or of the "
            "step before."
        )


@dataclasses.dataclass
class Found:
    """The layers that ``replace`` or ``freeze`` has met so far, as paths such as ``block/BatchNorm_0``, each once."""

    paths: tuple[str, ...] = ()  # those that it acted on
    skipped: tuple[str, ...] = ()  # those that it left alone

    def _meet(self, path: str, acts: bool) -> None:
        name = "paths" if acts else "skipped"
        met = getattr(self, name)
        setattr(self, name, met if path in met else (*met, path))


class _StandIn(BatchNorm):
    """A layer in the scope of the one that was called, which reports to ``capture_intermediates`` itself."""

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        return False


@contextmanager
def replace(**overrides: Any) -> Iterator[Found]:
    """Let every ``flax.linen.BatchNorm`` of any model compute with jbn inside a ``with`` block.

    The model and its variables stay what they are: names, shapes, dtypes, initial values, checkpoints. What differs in
    the figures is what differs between the layers, see the README. Tracing decides: enter it before the first call, for
    a function compiled before keeps Flax's arithmetic, and one compiled inside keeps jbn's afterwards; the same goes
    for the parts of a model that are under ``nn.jit``.

    Args:
        overrides: fields to set on each layer, jbn's own included: ``momentum``, ``epsilon``, ``dtype``, ``axis_name``,
            ``axis_index_groups``, ``activation``, ``group_size``. The others keep their values.

    Yields:
        ``Found(paths, skipped)``, which fills up as layers are called: those that compute with jbn, and those that
        keep their own code, because their class overrides ``__call__``.

    Raises:
        TypeError: for overrides of other names.

    Warns:
        UserWarning: at the end, where no layer was met.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(False), nn.relu]), jnp.ones((8, 3))
    >>> with jbn.linen.replace(momentum=0.9) as replaced:
    ...     variables = model.init(jax.random.key(0), x)
    ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
    >>> replaced
    Found(paths=('layers_1',), skipped=())
    """
    if unknown := sorted(set(overrides) - set(OPTIONS)):
        raise TypeError(f"replace() got {', '.join(unknown)}; expected overrides named {', '.join(OPTIONS)}.")
    found, inside = Found(), False

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal inside
        layer = context.module
        if inside or context.method_name != "__call__" or not isinstance(layer, nn.BatchNorm | BatchNorm):
            return call(*args, **kwargs)
        ours = type(layer).__call__ is BatchNorm.__call__
        known = ours or type(layer).__call__ is nn.BatchNorm.__call__
        found._meet("/".join(layer.path), known)
        if not known or (ours and not overrides):
            return call(*args, **kwargs)
        fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)} | overrides
        mine = {name: value for name, value in fields.items() if name in BatchNorm.__dataclass_fields__}
        inside = True
        try:  # a call like any other, which freeze, contexts within this one and other interceptors see
            return _StandIn(**mine | {"parent": layer.scope})(*args, **kwargs)
        finally:
            inside = False

    with nn.intercept_methods(intercept):
        yield found
    if not found.paths:
        others = f" Subclasses, which keep their own code, are {', '.join(found.skipped)}." if found.skipped else ""
        warnings.warn(f"replace() met no flax.linen.BatchNorm.{others} {_TRACED}", stacklevel=3)


_TRACED = "It acts on what is traced inside it: enter it before the first call, once, around the loop over the steps."


class _Rule(NamedTuple):
    """One ``freeze`` under way."""

    patterns: Patterns
    frozen: Frozen
    seen: Found


_RULES: ContextVar[tuple[_Rule, ...]] = ContextVar("rules", default=())


def _frozen(layer: BatchNorm) -> Frozen:
    """Return how a layer is frozen; where several rules match, the innermost decides."""
    frozen, path = Frozen(), "/".join(layer.path)
    for rule in _RULES.get():
        acts = matches(path, rule.patterns)
        rule.seen._meet(path, acts)
        frozen = rule.frozen if acts else frozen
    return frozen


@contextmanager
def freeze(
    patterns: Patterns = "*", *, use_running_average: bool = True, update: bool = False, affine: bool = False
) -> Iterator[Found]:
    """Keep ``BatchNorm`` layers as they are inside a ``with`` block, while the model around them trains.

    It acts where the model trains: a call in evaluation stays one, and so does the initialization. It takes Flax's
    layers too inside ``replace``, in either order. Tracing decides, as there. Of several around one another the
    innermost that matches a layer decides.

    Args:
        patterns: one or several ``fnmatch`` patterns for the paths of layers, see ``jbn.freeze``; all unless given.
        use_running_average: whether they normalize by their running statistics or by those of the batch.
        update: whether the running statistics move all the same.
        affine: whether scale and bias are constants, in evaluation too. Weight decay needs ``jbn.trainable_mask``.

    Yields:
        ``Found(paths, skipped)``, which fills up as layers are called: those that match, and those that do not.

    Raises:
        TypeError: for patterns that are not strings, and flags that are not bools.

    Warns:
        UserWarning: at the end, where a pattern has matched no layer.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), jbn.linen.BatchNorm(False), nn.relu]), jnp.ones((8, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> with jbn.linen.freeze("layers_*") as frozen:
    ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
    >>> frozen.paths, float(updates["batch_stats"]["layers_1"]["var"][0])
    (('layers_1',), 1.0)
    """
    matches("", patterns)  # their kind
    flags = {"use_running_average": use_running_average, "update": update, "affine": affine}
    rule = _Rule(patterns, Frozen(**{name: check_flag(name, value) for name, value in flags.items()}), Found())
    token = _RULES.set((*_RULES.get(), rule))
    try:
        yield rule.seen
    finally:
        _RULES.reset(token)
    try:
        select((*rule.seen.paths, *rule.seen.skipped), patterns, "layers")
    except ValueError as error:
        warnings.warn(f"freeze(): {error} {_TRACED}", stacklevel=3)
