"""``BatchNorm`` as a Linen module: it creates variables and calls ``bn_forward``; it holds no arithmetic."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from flax.typing import Initializer
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jbn.arguments import check_options, refuse
from jbn.core.activation import Activation
from jbn.core.checks import arithmetic_dtype, cast_array, cast_mask, read_flag, read_layout
from jbn.core.choice import NormalizeBy
from jbn.core.forward import batch_norm, bn_forward, moments
from jbn.core.numbers import Momentum, is_schedule
from jbn.core.prepare import AxisName, Groups, fill_affine
from jbn.linen.freezing import frozen_at


class BatchNorm(nn.Module):
    r"""Batch normalization as a Linen module, a drop-in for ``flax.linen.BatchNorm``: the import line is the migration.

    .. math:: y = f(\gamma\,(x - \mu)\,(\sigma^2 + \epsilon)^{-1/2} + \beta + \text{residual})

    Constructor, call signature, variables (``params``: ``scale``, ``bias``; ``batch_stats``: ``mean``, ``var``), their
    order, shapes and dtypes are Flax's, so that its checkpoints load unchanged; a function as ``momentum`` adds
    ``count``. What differs in the figures is listed in docs/guides/flax_step.md.

    Attributes:
        use_running_average: whether to use the statistics in ``batch_stats``; here or at the call, not at both.
        axis: the axis or axes of the features.
        momentum: weight of the old statistics, 0 to 1; or a function of the number of updates done that returns it,
            see ``jbn.bn_forward``: then ``batch_stats`` has a ``count`` too, an int32 scalar.
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
        force_float32_reductions: whether the statistics are stored in float32 whatever ``param_dtype`` is; else in
            float64 with parameters of float64. They are computed in float32, or float64 for float64 x, in either case.
        activation: f, a function such as ``nn.relu``, applied last and recomputed in the backward pass.
        group_size: number of examples that are a batch of their own, see ``jbn.bn_forward``.
        unbiased: let the running variance be that of a sample, as in PyTorch, see ``jbn.bn_forward``.
        normalize_by: what to normalize by in training, such as ``jbn.renorm(3.0, 5.0)``, see ``jbn.bn_forward``.
        sow_moments: whether every call sows the ``jbn.Moments`` of its x, differentiable, as ``moments`` into the
            collection ``intermediates``: for losses on the statistics of a batch, in evaluation too. They are those of
            all valid positions, of the shards of ``axis_name`` in training, and of this shard in evaluation.

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
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: Activation | None = None
    group_size: int | None = None
    unbiased: bool = False
    normalize_by: NormalizeBy | None = None
    sow_moments: bool = False

    def __post_init__(self) -> None:
        """Refuse options where they are written: a network can be initialized and evaluated with a wrong momentum."""
        first: Any = self.use_running_average
        if type(first) is int:
            raise refuse("use_running_average", first, "True or False; Flax takes the number of features from x")
        check_options(**vars(self))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Normalize x.

        Args:
            x: float array with the features on ``axis``.
            use_running_average: whether to use the statistics in ``batch_stats``.
            mask: bool, of the rank of x, each dimension 1 or that of x (a mask of examples is ``mask[:, None]``), True
                where x is valid; elsewhere y is 0.
            residual: an array of the shape of x, added before the activation.
            scale: γ from outside, with ``use_scale=False``: of the rank of x, each dimension 1 or that of x, such as
                (N, 1, 1, C) for one per example; or of the shape of the features.
            bias: β from outside, with ``use_bias=False``, likewise.

        Returns:
            y, of the shape of x. During initialization the statistics are those of the batch at hand, whatever its
            size, and are not stored.

        Raises:
            ValueError: for a scale or bias of a layer that learns its own; and see ``jbn.bn_forward``.

        """
        evaluate = read_flag(
            "use_running_average", nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        )
        for name, value, instead in (
            ("activation", self.activation, "call the module on the output of BatchNorm"),
            ("normalize_by", self.normalize_by, "let a function read arrays that the module around BatchNorm holds"),
        ):
            if isinstance(value, nn.Module):
                raise TypeError(
                    f"{name} is the module {type(value).__name__}; expected a function, because the derivative rule "
                    f"cannot create variables: {instead} instead."
                )
        x = cast_array("x", x)
        mask = cast_mask(mask)
        shape = read_layout(x, self.axis).features
        frozen = frozen_at("/".join(self.path))
        train, update = frozen.flags(evaluate)
        counts = _counts(self, update)
        _require_statistics(self)
        # Statistics of 16 bits would stall, whatever the dtype of the parameters.
        stored = jnp.float32 if self.force_float32_reductions else arithmetic_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stored)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stored)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32) if counts else None
        params: dict[str, Any] = {
            "scale": self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None,
            "bias": self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
        }
        params = lax.stop_gradient(params) if frozen.affine else params
        params = fill_affine(params, scale=scale, bias=bias)
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "activation": self.activation,
            "residual": residual,
            "dtype": self.dtype,
        }
        if read_flag("sow_moments", self.sow_moments):
            shards = None if evaluate or self.is_initializing() else self.axis_name
            self.sow("intermediates", "moments", moments(x, axis=self.axis, mask=mask, axis_name=shards))
        if self.is_initializing() and not evaluate:
            return batch_norm(x, **params, **options)[0]
        held = {"mean": mean, "var": var} | ({} if count is None else {"count": count})
        state = {name: variable.value for name, variable in held.items()}
        y, state = bn_forward(
            params,
            state,
            x,
            train,
            update=update,
            momentum=self.momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size,
            unbiased=self.unbiased,
            normalize_by=self.normalize_by,
            **options,
        )
        if update:
            for name, variable in held.items():
                variable.value = state[name]
        return y


# Not methods: Flax wraps those, and users who intercept method calls would see them.
def _counts(layer: BatchNorm, update: bool) -> bool:
    """Say whether a layer counts its updates; refuse to begin in the midst of training."""
    if layer.has_variable("batch_stats", "count"):
        return True
    if not is_schedule(layer.momentum) or not (update or layer.is_initializing()):
        return False
    if layer.has_variable("batch_stats", "mean") and not layer.is_initializing():
        raise ValueError(
            "momentum is a function of the number of updates done, and batch_stats holds no count of them for "
            f"{'/'.join(layer.path) or 'this BatchNorm'}. Expected an int32 scalar beside mean and var: initialize "
            "with that momentum, inside of replace(momentum=...) where that sets it; or add "
            "batch_stats[...]['count'] = jnp.zeros((), jnp.int32)."
        )
    return True


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
