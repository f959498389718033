"""``BatchNorm`` as an NNX module: it holds variables and calls ``bn_forward``; it holds no arithmetic."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jbn.arguments import check_options
from jbn.core.activation import Activation
from jbn.core.axes import forbid_transformations
from jbn.core.checks import OneValue, cast_array, cast_mask, read_flag
from jbn.core.choice import NormalizeBy
from jbn.core.forward import batch_norm, bn_forward, moments
from jbn.core.numbers import is_schedule
from jbn.core.prepare import fill_affine
from jbn.freezing import Frozen
from jbn.nnx.variables import read, write

# The attributes that Flax's norm lacks, and what they are where nothing is said.
NEW = {"activation": None, "group_size": None, "unbiased": False, "normalize_by": None, "sow_moments": False}


class BatchNorm(nnx.BatchNorm):
    r"""Batch normalization as an NNX module, a drop-in for ``flax.nnx.BatchNorm`` and a subclass of it.

    .. math:: y = f(\gamma\,(x - \mu)\,(\sigma^2 + \epsilon)^{-1/2} + \beta + \text{residual})

    Constructor, attributes and variables (``nnx.Param``: ``scale``, ``bias``; ``nnx.BatchStat``: ``mean``, ``var``;
    None where absent) are made by the Flax that is installed, so ``train()``, ``eval()``, ``set_attributes``,
    ``nnx.view``, filters by type and checkpoints work unchanged. What differs in the figures is what differs from Flax
    Linen, see docs/guides/flax_step.md; training and evaluation give the bits of ``jbn.linen.BatchNorm`` and
    ``jbn.bn_forward``.

    Args:
        num_features: the size of the feature axis.
        activation: f, a function such as ``nnx.relu`` or a module such as ``nnx.PReLU()``, applied last and recomputed
            in the backward pass.
        group_size: number of examples that are a batch of their own, see ``jbn.bn_forward``.
        unbiased: let the running variance be that of a sample, as in PyTorch, see ``jbn.bn_forward``.
        normalize_by: what to normalize by in training, such as ``jbn.renorm(3.0, 5.0)``, see ``jbn.bn_forward``; or a
            module that is called so, whose variables are those of the model.
        sow_moments: whether every call sows the ``jbn.Moments`` of its x, differentiable, as an ``nnx.Intermediate`` of
            the name ``moments``, which ``nnx.capture`` collects: for losses on the statistics of a batch, in evaluation
            too. They are those of all valid positions, of the shards of ``axis_name`` in training, and of this shard in
            evaluation. Outside of ``nnx.capture`` Flax keeps those of every call in the layer, with a
            ``DeprecationWarning``: it grows, and ``nnx.jit`` compiles each step anew.
        options: those of ``flax.nnx.BatchNorm``: ``use_running_average``, False unless given; ``axis``, ``momentum``
            (weight of the old statistics, or a function of the number of updates done that returns it; then there is
            ``nnx.BatchStat``: ``count`` too), ``epsilon``, ``dtype``, ``axis_name`` and ``axis_index_groups`` as in
            ``jbn.bn_forward``; ``param_dtype``, ``use_bias``, ``use_scale``, ``bias_init``, ``scale_init`` and ``rngs``
            for scale and bias, with ``bias_metadata`` and ``scale_metadata`` where this Flax has them;
            ``use_fast_variance`` and ``promote_dtype`` without effect: statistics are always accurate, and taken in
            float32 or wider.

    Attributes:
        scale: γ, ``nnx.Param`` (num_features,) of ``param_dtype``; None without ``use_scale``.
        bias: β, likewise; None without ``use_bias``.
        mean: the running mean, ``nnx.BatchStat`` (num_features,), float32, in the unit of x.
        var: the running variance, likewise, ≥ 0, in the unit of x squared; biased without ``unbiased``.
        count: the number of updates done, ``nnx.BatchStat``, an int32 scalar ≥ 0; None where no momentum asks for it.
        num_features: the size of the feature axis.
        use_running_average: whether the layer evaluates; ``train()`` and ``eval()`` set it.
        axis: the axis of the features.
        momentum: weight of the old statistics, 0 to 1, or a function of ``count``.
        epsilon: ε > 0, added to the variance.
        dtype: dtype of y, that of x for None.
        param_dtype: dtype of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        axis_name: name or names of the axes whose shards form one batch, or None.
        axis_index_groups: groups of indices of that axis, or None.
        use_fast_variance: what Flax does with it jbn does not.
        promote_dtype: likewise.
        activation: f, a function of one array, or None.
        group_size: number of examples that are a batch of their own, or None.
        unbiased: whether the running variance is that of a sample.
        normalize_by: what to normalize by in training, or None.
        sow_moments: whether every call sows its moments.
        frozen: how ``jbn.nnx.freeze`` has left it: ``use_running_average``, ``update`` and ``affine``, three bools.

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

    # Of the class, so that a model saved or made before has them too.
    frozen = Frozen()
    count: Any = None  # nnx.BatchStat, the number of updates done, where momentum is a function of it

    def __init__(
        self,
        num_features: int,
        *,
        activation: Activation | None = None,
        group_size: int | None = None,
        unbiased: bool = False,
        normalize_by: NormalizeBy | None = None,
        sow_moments: bool = False,
        **options: Any,
    ) -> None:
        mine = {"activation": activation, "group_size": group_size, "normalize_by": normalize_by}
        flags = {"unbiased": unbiased, "sow_moments": sow_moments}
        # Here, where they are written: a network can be evaluated with a wrong momentum.
        check_options(num_features=num_features, **options, **mine, **flags)
        super().__init__(num_features, **options)
        self.activation = activation
        self.group_size = group_size
        self.unbiased = unbiased
        self.normalize_by = normalize_by
        self.sow_moments = sow_moments
        if is_schedule(self.momentum):
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

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
        """Normalize x; in training, move the statistics.

        Args:
            x: float array with the features on ``axis``.
            use_running_average: whether to use ``mean`` and ``var``; instead of the attribute of this name.
            mask: bool, of the rank of x, each dimension 1 or that of x (a mask of examples is ``mask[:, None]``), True
                where x is valid; elsewhere y is 0.
            residual: an array of the shape of x, added before the activation.
            scale: γ from outside, with ``use_scale=False``: of the rank of x, each dimension 1 or that of x, such as
                (N, 1, 1, C) for one per example; or of the shape of the features.
            bias: β from outside, with ``use_bias=False``, likewise.

        Returns:
            y, of the shape of x.

        Raises:
            ValueError: for a scale or bias of a layer that learns its own; and see ``jbn.bn_forward``.

        Warns:
            UserWarning: for one value per channel in training, where ``jbn.bn_forward`` raises, because an NNX model is
                often tried on a single example first: y does not depend on x, and the statistics are kept. It raises
                where y is mapped or differentiated, for then somebody trains, also if that is a compiled call; one that
                is not is silent, as ``nnx.eval_shape`` and ``nnx.tabulate`` are.

        """
        evaluate = read_flag(
            "use_running_average", self.use_running_average if use_running_average is None else use_running_average
        )
        train, update = self.frozen.flags(evaluate)
        x = cast_array("x", x)
        mask = cast_mask(mask)
        if read_flag("sow_moments", self.sow_moments):
            shards = None if evaluate else self.axis_name
            self.sow(nnx.Intermediate, "moments", moments(x, axis=self.axis, mask=mask, axis_name=shards))
        params: dict[str, Any] = {
            "scale": None if self.scale is None else read(self.scale),
            "bias": None if self.bias is None else read(self.bias),
        }
        params = jax.lax.stop_gradient(params) if self.frozen.affine else params
        params = fill_affine(params, scale=scale, bias=bias)
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
        held = {"mean": self.mean, "var": self.var} | ({} if self.count is None else {"count": self.count})
        state = {name: read(variable) for name, variable in held.items()}
        try:
            y, state = bn_forward(
                params,
                state,
                x,
                train,
                update=update,
                momentum=self.momentum,
                unbiased=self.unbiased,
                normalize_by=self.normalize_by,
                **options,
            )
        except OneValue as error:
            y = forbid_transformations(batch_norm(x, **params, **options)[0], error)
            if not isinstance(x, jax.core.Tracer):
                kept = f"This {type(self).__name__} of {self.num_features} features goes on and keeps its statistics."
                warnings.warn(f"{error} {kept}", stacklevel=2)
            return y
        if update:
            for name, variable in held.items():
                write(variable, state[name])
        return y


def _join_signatures(theirs: Callable[..., None], mine: Callable[..., None]) -> inspect.Signature:
    """Return the signature of Flax's constructor with the new arguments after it."""
    flax, ours = inspect.signature(theirs), inspect.signature(mine).parameters
    return flax.replace(parameters=[*flax.parameters.values(), *(ours[name] for name in NEW)])


BatchNorm.__init__.__signature__ = _join_signatures(nnx.BatchNorm.__init__, BatchNorm.__init__)  # type: ignore[attr-defined]
