"""The public functions: ``bn_init``, ``bn_forward``, and without a state ``batch_norm`` and ``moments``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.numpy import asarray, broadcast_to, ones, zeros
from jax.typing import ArrayLike, DTypeLike

from jbn.core import checks
from jbn.core.activation import Activation
from jbn.core.axes import name_mesh
from jbn.core.choice import NormalizeBy, moments_of_state
from jbn.core.normalize import Operands, Recipe, lift, normalize, normalize_by_batch
from jbn.core.numbers import Momentum, read_momentum
from jbn.core.prepare import (
    Axis,
    AxisName,
    Groups,
    ParamsLike,
    StateLike,
    read_choice,
    read_operands,
    read_pilot,
    read_rows,
    read_sharing,
    read_state,
)
from jbn.core.state import CountedState, Observation, Params, State, advance, replace_arrays
from jbn.core.statistics import Moments, SharedRows, choose_pilot, merge_groups, show_overflow, statistics

StateT = TypeVar("StateT", bound=StateLike)


@overload
def bn_init(
    num_features: int | tuple[int, ...],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    counted: Literal[False] = False,
) -> tuple[Params, State]: ...


@overload
def bn_init(
    num_features: int | tuple[int, ...],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    counted: Literal[True],
) -> tuple[Params, CountedState]: ...


def bn_init(
    num_features: int | tuple[int, ...],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    counted: bool = False,
) -> tuple[Params, State | CountedState]:
    r"""Return the parameters and the state of a new layer: :math:`\gamma = 1, \beta = 0, \mu = 0, \sigma^2 = 1`.

    Args:
        num_features: the size of the feature axis, or of each feature axis in ascending order.
        use_scale: whether there is a scale.
        use_bias: whether there is a bias.
        dtype: dtype of the parameters; statistics are at least float32.
        counted: whether the state counts its updates, from 0 on, which a function as ``momentum`` needs.

    Returns:
        ``Params(scale, bias)`` and ``State(mean, var)``, or ``CountedState(mean, var, count)``. Plain dictionaries with
        these keys, such as the leaves of a Flax checkpoint, serve as well.

    >>> import jbn
    >>> params, state = jbn.bn_init(4)
    >>> state.var.shape
    (4,)
    """
    shape = checks.read_features(num_features)
    kind = checks.read_dtype(dtype, zeros(()))
    wide = checks.arithmetic_dtype(kind)
    has_scale, has_bias = checks.read_flag("use_scale", use_scale), checks.read_flag("use_bias", use_bias)
    params = Params(ones(shape, kind) if has_scale else None, zeros(shape, kind) if has_bias else None)
    state = State(zeros(shape, wide), ones(shape, wide))
    return params, CountedState(*state, zeros((), jnp.int32)) if checks.read_flag("counted", counted) else state


def bn_forward(
    params: ParamsLike,
    state: StateT,
    x: ArrayLike,
    train: bool,
    *,
    update: bool | None = None,
    axis: Axis = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    group_size: int | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    unbiased: bool = False,
    normalize_by: NormalizeBy | None = None,
) -> tuple[Array, StateT]:
    r"""Normalize x per feature, by the statistics of the batch or by running ones, and return the new state.

    .. math::
        y = f\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \text{residual}\right), \qquad
        \mu = \mathrm{E}[x],\ \sigma^2 = \mathrm{E}[(x - \mu)^2]

    With ``train=True`` the moments are those of all valid positions of the batch, over every shard of ``axis_name``,
    with ``train=False`` those of the state. With ``update``, which is what ``train`` is unless given, the state moves
    towards those of the batch:

    .. math:: \text{new} = \text{old} + (1 - \text{momentum})(\text{batch} - \text{old})

    Args:
        params: ``Params`` or a mapping with ``scale`` and ``bias``, either or both absent; each of the shape of the
            features, or of the rank of x, each dimension 1 or that of x: (N, 1, 1, C) is one for each example. Of the
            latter, what belongs to no valid position reaches nothing.
        state: ``State`` or a mapping with ``mean`` and ``var``, of the shape of the features; or ``CountedState`` or a
            mapping with ``count`` too, the number of updates done, an int32 scalar.
        x: float16, bfloat16, float32 or float64, of any rank ≥ 1.
        train: whether to use the statistics of the batch; a Python bool, known when tracing.
        update: whether the state moves, or comes back as it is; a Python bool, that of ``train`` unless given.
        axis: the axis or axes of the features, the last unless given; parameters have their sizes in ascending order.
        momentum: weight of the old value, 0 to 1, a number or a traced scalar (PyTorch's is one minus it). Or a
            function of the count of the state that returns it, such as ``jbn.debiased(0.99)``, ``jbn.cumulative`` or a
            schedule of optax: from step to step nothing is compiled anew.
        epsilon: ε > 0, added to the variance.
        mask: bool, of the rank of x, each dimension 1 or that of x; only positions where it is true are counted, the
            others give 0, and nothing in them reaches an output, a gradient or the state. For sequences x (N, T, C)
            of known lengths: ``(jnp.arange(T) < lengths[:, None])[..., None]``.
        axis_name: name or names of axes of ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` whose shards form one
            batch; ignored where no statistics are taken. All of them must hold the same state. Under ``jax.jit`` a
            sharded batch is one batch without it. In ``jax.shard_map`` without it statistics and states are those of a
            shard.
        axis_index_groups: groups of indices of that axis, each index in one of them, of any sizes; each group is a
            batch of its own.
        group_size: number of examples, positions on the first axis that is not one of features, that are a batch of
            their own: those of a shard, or those of several shards of ``axis_name``, in order. Groups inside a shard
            need no other shard for y and its gradients, and sweep x twice. Ignored where no statistics are taken.
        activation: f, a function of one array such as ``jax.nn.relu``, applied in the dtype of the arithmetic and
            recomputed in the backward pass. Arrays that it closes over, such as a learned slope, are differentiated
            too. Eager calls compile anew for a new function object and for one that holds arrays.
        residual: an array of the shape of x, added before the activation.
        dtype: dtype of y, that of x unless given.
        unbiased: let the running variance be n/(n - 1) times the biased one, as in PyTorch.
        normalize_by: a function of the moments of the batch (of each group, where there are groups), those of the
            state and ε, differentiable in all of them, that returns what to normalize by in their place: ``Moments``;
            or a ``Correction`` beside those of the batch, as ``jbn.renorm`` does. It costs no pass over x, and decides
            nothing where x is normalized by the state, nor about how the state moves.

    Returns:
        y, of the shape of x, and a state of the type, shapes, dtypes and sharding of the one given. No gradient flows
        through the new state. With groups it moves towards the statistics of the whole batch, on every shard. A
        feature whose batch statistics are not finite, or come from fewer than two rows, keeps its old ones. A count
        grows by 1 where any feature moved, so that one that kept its statistics is counted with the others.

    Raises:
        ValueError: for shapes, ranges and names that do not fit, and for one value per feature where statistics are
            taken.
        TypeError: for dtypes and kinds that do not fit.

    >>> import jax, jbn
    >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 4)) + 100
    >>> params, state = jbn.bn_init(4)
    >>> y, state = jbn.bn_forward(params, state, x, True, activation=jax.nn.relu)
    >>> bool(abs(state.mean - 1.0).max() < 0.01)  # 0.99 · 0 + 0.01 · 100
    True

    Source: S. Ioffe, C. Szegedy, "Batch Normalization", 2015, algorithms 1 and 2. Elsewhere: Flax and Haiku take the
    variance as E[x²] - E[x]², which has no digits left where the mean is 10⁴ standard deviations; Flax normalizes
    masked positions, averages shards with equal weights and returns float32 for bfloat16 x.
    """
    train = checks.read_flag("train", train)
    if normalize_by is not None:
        checks.check_callable(
            "normalize_by", normalize_by, "of the moments of the batch, those of the state and epsilon"
        )
    update = train if update is None else checks.read_flag("update", update)
    unbiased = checks.read_flag("unbiased", unbiased)
    held, mean, var, count = read_state(state)
    scale, bias = checks.read_fields("params", params, ("scale", "bias"))
    train = train and not (update and isinstance(held, Observation) and held.upstream == "recalibrated")
    recipe, operands = read_operands(
        x, scale, bias, mean, var,
        axis=axis, epsilon=epsilon, mask=mask, activation=activation, residual=residual, dtype=dtype, by_batch=train,
    )  # fmt: skip
    for name, value in (("state.mean", mean), ("state.var", var)):
        checks.check_vector(name, value, recipe.layout)
    if not (train or update):
        return _evaluate(recipe, operands, mean, var), state
    rows = read_sharing(recipe, operands.x, axis_name, axis_index_groups, group_size)
    weight = read_momentum(momentum, count) if update else 0.0
    if update:
        checks.check_replicas(rows.sync, operands.x, operands.mask, mean)
        checks.check_moving(mean, var)
    shards = int(np.min(rows.sums_over.shards()))
    if isinstance(held, Observation) and update:
        train = train and rows.layout.group_row_count * shards != 1  # a last batch of one row
    elif train:
        checks.check_rows(rows.layout, shards)
    if train and normalize_by is not None:
        recipe, operands = read_choice(normalize_by, rows, recipe, operands, mean, var)
    y, new = _with_statistics(rows, recipe, _Uses(train, update, unbiased), operands, held, var, count, weight)
    return y, replace_arrays(state, **new) if update else state


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    group_size: int | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    r"""Normalize x per feature by the statistics of the batch, and return these too; nothing is remembered.

    .. math:: y = f(\gamma\,(x - \mathrm{E}[x])\,(\mathrm{Var}[x] + \epsilon)^{-1/2} + \beta + \text{residual})

    Args:
        x: float16, bfloat16, float32 or float64, of any rank ≥ 1.
        scale: γ, of the shape of the features, or of the rank of x, each dimension 1 or that of x; or None for 1.
        bias: β, likewise, or None for 0.
        axis: as in ``bn_forward``, like all that follow.
        epsilon: ε > 0, added to the variance.
        mask: bool, True where x is valid.
        axis_name: name or names of axes whose shards form one batch.
        axis_index_groups: groups of indices of that axis, each a batch of its own.
        group_size: number of examples that are a batch of their own.
        activation: f, applied last.
        residual: an array of the shape of x, added before the activation.
        dtype: dtype of y, that of x unless given.

    Returns:
        y, of the shape of x, and its ``Moments``, differentiable like y; with groups those of the whole batch, without
        gradients. One value per feature gives the bias: without a state there is nothing that it could spoil.

    Raises:
        ValueError: for shapes, ranges and names that do not fit.
        TypeError: for dtypes and kinds that do not fit.

    >>> import jax.numpy as jnp, jbn
    >>> y, moments = jbn.batch_norm(jnp.array([[1.0], [3.0]]))
    >>> moments.mean.item(), moments.var.item()
    (2.0, 1.0)

    Source: Ioffe and Szegedy 2015, algorithm 1.
    """
    recipe, operands = read_operands(
        x, scale, bias,
        axis=axis, epsilon=epsilon, mask=mask, activation=activation, residual=residual, dtype=dtype, by_batch=True,
    )  # fmt: skip
    rows = read_sharing(recipe, operands.x, axis_name, axis_index_groups, group_size)
    return _normalize(rows, recipe, operands)


def moments(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    pilot: ArrayLike | None = None,
) -> Moments:
    r"""Return count, mean and biased variance per feature, to the rounding error of the dtype of the arithmetic.

    .. math:: \mu = \mathrm{E}[x], \quad \sigma^2 = \mathrm{E}[(x - \mu)^2]

    Args:
        x: float16, bfloat16, float32 or float64, of any rank ≥ 1.
        axis: the axis or axes of the features.
        mask: bool, of the rank of x, each dimension 1 or that of x; only positions where it is true are counted.
        axis_name: name or names of axes whose shards form one batch.
        pilot: a number near the mean, or one per feature, the same on all shards, such as the mean of the batch before:
            where it is within a deviation or so, x is swept once, however far from 0. Of any other, the moments are
            right too, up to rounding, and x is swept twice. 0 unless given.

    Returns:
        ``Moments``, at least float32, differentiable in x. No valid rows give ``Moments.empty``, around the pilot.

    Raises:
        ValueError: for shapes and names that do not fit.
        TypeError: for dtypes that do not fit.

    >>> import jax.numpy as jnp, jbn
    >>> jbn.moments(jnp.array([[10001.0], [10003.0]])).var.item()
    1.0

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance", 1983: shifted data.
    """
    layout, values, valid = read_rows(x, axis, mask)
    rows = SharedRows(layout, checks.read_axis_name(axis_name), 0.0)
    return _find_moments(rows, valid, values, read_pilot(pilot, layout))


@dataclass(frozen=True)
class _Uses:
    """What the statistics of the batch are taken for."""

    train: bool  # y is normalized by them
    update: bool  # the running ones move towards them
    unbiased: bool  # as those of a sample


# One compiled call each, so that an eager step costs one dispatch and the second call traces nothing.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _with_statistics(
    rows: SharedRows,
    recipe: Recipe,
    uses: _Uses,
    operands: Operands,
    held: Array | Observation,
    var: Array,
    count: Array | None,
    weight: ArrayLike,
) -> tuple[Array, dict[str, Any]]:
    wide = recipe.wide
    mean = held.mean if isinstance(held, Observation) else held
    pilot = choose_pilot(mean, wide)
    if uses.train:
        y, batch = normalize_by_batch(rows, recipe, pilot, operands)
    else:
        y, batch = (
            _normalize_by_running(recipe, operands, mean, var),
            _statistics(rows, operands.x, operands.mask, pilot),
        )
    new: dict[str, Any] = {}
    if uses.update:
        whole = merge_groups(rows, batch, pilot)
        new = advance(held, var, count, whole, asarray(weight, wide), uses.unbiased)
    return y, new


@partial(jax.jit, static_argnums=0)
def _evaluate(recipe: Recipe, operands: Operands, mean: Array, var: Array) -> Array:
    return _normalize_by_running(recipe, operands, mean, var)


@partial(jax.jit, static_argnums=(0, 1))
def _normalize(rows: SharedRows, recipe: Recipe, operands: Operands) -> tuple[Array, Moments]:
    pilot = zeros(rows.layout.features, recipe.wide)
    y, batch = normalize_by_batch(rows, recipe, pilot, operands)
    return y, merge_groups(rows, batch, pilot)


@partial(jax.jit, static_argnums=0)
def _find_moments(rows: SharedRows, mask: Array | None, x: Array, guess: Array | None) -> Moments:
    wide = checks.arithmetic_dtype(x.dtype)
    none = zeros(rows.layout.features, wide)
    pilot = none if guess is None else choose_pilot(broadcast_to(guess, none.shape), wide)
    return _statistics(rows, x, mask, pilot)


def _statistics(rows: SharedRows, x: Array, mask: Array | None, pilot: Array) -> Moments:
    with name_mesh():  # The derivative then finds what was traced for the value.
        return statistics(rows, x, mask, pilot)


def _normalize_by_running(recipe: Recipe, operands: Operands, mean: Array, var: Array) -> Array:
    """Normalize by the statistics of the state."""
    known = moments_of_state(mean.astype(recipe.wide), show_overflow(var.astype(recipe.wide)))
    return normalize(recipe, known, lift(recipe, operands, operands.mask))
