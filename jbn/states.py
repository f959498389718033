"""States without a batch at hand: ``update`` moves one towards moments, ``merge_states`` pools those of clients."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.numpy import asarray
from jax.typing import ArrayLike

from jbn.arguments import is_several
from jbn.core import checks
from jbn.core.axes import Sync
from jbn.core.numbers import Momentum, read_momentum, read_number
from jbn.core.prepare import StateLike, read_state
from jbn.core.state import Observation, advance, replace_arrays
from jbn.core.statistics import Moments, check_moments
from jbn.observing.survey import Statistics, Survey, put, survey
from jbn.paths import count_of, flatten, join, name_few

StateT = TypeVar("StateT", bound=StateLike)
Tree = TypeVar("Tree")
"""A tree that holds the statistics of one layer or of many."""


def update(state: StateT, moments: Moments, *, momentum: Momentum = 0.99, unbiased: bool = False) -> StateT:
    r"""Return the state after a batch of these moments, as ``bn_forward`` does for the moments of its x.

    .. math:: \text{new} = \text{old} + (1 - \text{momentum})(\text{batch} - \text{old})

    Of a batch that no call ever has as a whole, the moments are ``merge``'s: of micro-batches, of clients, of steps.

    Args:
        state: ``State`` or a mapping with ``mean`` and ``var``, of the shape of the features; with a ``count`` too, as
            in ``bn_forward``.
        moments: of ``jbn.moments``, ``batch_norm`` or ``merge``, of the same features.
        momentum: weight of the old value, 0 to 1, a number, a traced scalar, or a function of the count of the state.
        unbiased: let the running variance be n/(n - 1) times the biased one.

    Returns:
        A state of the type, shapes and dtypes of the one given, without gradients. A feature whose moments are not
        finite, or come from fewer than two rows, keeps its old statistics.

    Raises:
        ValueError: for shapes and ranges that do not fit, and moments of a shard where all shards hold one state.
        TypeError: for kinds and dtypes that do not fit.

    >>> import jax, jbn
    >>> x, state = jax.random.normal(jax.random.key(0), (4, 8, 3)) + 100, jbn.bn_init(3)[1]
    >>> whole, _ = jax.lax.scan(lambda m, x: (jbn.merge(m, jbn.moments(x)), None), jbn.Moments.empty(3), x)
    >>> state = jbn.update(state, whole)  # as after one batch of 32 rows
    >>> bool(abs(state.mean - 1.0).max() < 0.01)
    True

    Source: Ioffe and Szegedy 2015, algorithm 2.
    """
    check_moments("moments", moments)
    held, mean, var, count = read_state(state)
    features = jnp.shape(moments.var)
    for name, value in (("state.mean", mean), ("state.var", var), ("moments.var", moments.var)):
        if value.dtype.name not in checks.FLOATS:
            raise TypeError(f"{name} has dtype {value.dtype.name}; expected {', '.join(checks.FLOATS)}.")
        if jnp.shape(value) != features:
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}, but moments are of features of shape {features}; expected the "
                f"same: make the state with bn_init({features[0] if len(features) == 1 else features})."
            )
    weight = read_momentum(momentum, count)
    checks.check_replicas(Sync(), asarray(moments.var), None, mean, "moments")
    checks.check_moving(mean, var)
    new = _advance(checks.read_flag("unbiased", unbiased), held, var, count, moments, weight)
    return replace_arrays(state, **new)


@partial(jax.jit, static_argnums=0)
def _advance(
    unbiased: bool, held: Array | Observation, var: Array, count: Array | None, moments: Moments, weight: ArrayLike
) -> dict[str, Any]:
    return advance(held, var, count, moments, asarray(weight, moments.var.dtype), unbiased)


def merge_states(states: Sequence[Tree], counts: Sequence[ArrayLike] | Array) -> Tree:
    r"""Return the state of all rows together, of states that each hold the statistics of rows of their own.

    .. math:: \mu = \frac{\sum_i n_i \mu_i}{\sum_i n_i}, \qquad
        \sigma^2 = \frac{\sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)}{\sum_i n_i}

    For the clients of federated training, and for micro-batches: a layer with a momentum of 0 leaves the statistics of
    the batch as its state. An average of variances, as federated averaging takes it, lacks the distance of the means.

    Args:
        states: of one structure: ``State``, or trees that hold a ``mean`` and a ``var`` beside each other anywhere,
            such as the ``batch_stats`` of a whole model, or ``nnx.state(model, nnx.BatchStat)``. Variances are biased
            ones.
        counts: how many rows each state is of, numbers ≥ 0. Nothing of a state of no rows is taken. That all are 0 is
            refused where they are known; where they are traced, the first state comes back.

    Returns:
        A state of the structure, dtypes and devices of the first. Counts of updates, as in ``CountedState``, are added
        up. What is no statistic is the same in all. Computed on the host in float64;
        where anything is traced, in float32 or wider, differentiable.

    Raises:
        ValueError: for structures and shapes that differ, for counts that are no numbers of rows, and for other leaves
            that differ, or are traced, so that nobody can tell.
        TypeError: for arguments of other kinds.

    >>> import jax.numpy as jnp, jbn
    >>> a, b = (jbn.State(jnp.array([mean]), jnp.array([1.0])) for mean in (0.0, 4.0))
    >>> pooled = jbn.merge_states([a, b], [30, 10])
    >>> pooled.mean.item(), pooled.var.item()  # 1 + 3/16 · 4²
    (1.0, 4.0)

    Source: Chan, Golub and LeVeque 1979, eq. 2.1.
    """
    models = _read_states(states)
    numbers = _read_counts(counts, len(models))
    _check_others(models)
    arrays = [numbers, *(leaf for model in models for leaf in model.leaves)]
    traced = any(isinstance(value, jax.core.Tracer) for value in arrays)
    first = _add_updates(jnp if traced else np, numbers, models)
    if not traced:
        known = [model.remembered() for model in models]
        parts = {layer: [(one[layer].mean, one[layer].var) for one in known] for layer in first.layers}
        pooled = {layer: Statistics(*_pool(np, numbers, of_layer)) for layer, of_layer in parts.items()}
        return first.fill(pooled)  # type: ignore[no-any-return]
    leaves = list(first.leaves)
    for layer in first.layers:
        of_layer = [(model.leaves[layer.mean], model.leaves[layer.var]) for model in models]
        for i, value in zip((layer.mean, layer.var), _pool(jnp, numbers, of_layer), strict=True):
            leaves[i] = value.astype(leaves[i].dtype)
    return jax.tree.unflatten(first.structure, leaves)  # type: ignore[no-any-return]


def _add_updates(xp: Any, counts: Any, models: list[Survey]) -> Survey:
    """Return the first state with the updates of all; a sum ends at the largest count."""
    leaves = list(models[0].leaves)
    for i in (layer.count for layer in models[0].layers if layer.count is not None):
        largest, total = jnp.iinfo(leaves[i].dtype).max, xp.zeros_like(leaves[i])
        for one, taken in zip(models, _taken(xp, counts), strict=True):
            total = total + xp.where(taken, xp.minimum(one.leaves[i], largest - total), 0).astype(total.dtype)
        leaves[i] = put(total, leaves[i], total.dtype) if xp is np else total
    return replace(models[0], leaves=leaves)


def _taken(xp: Any, counts: Any) -> Any:
    """Say of each state whether it is of any rows; the first counts where none is."""
    n = xp.asarray(counts)
    return xp.where(n.sum() > 0, n > 0, xp.arange(len(n)) == 0)


def _pool(xp: Any, counts: Any, parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return the mean and variance of all rows, computed by NumPy or by ``jax.numpy``."""
    means, variances = (xp.stack(fields) for fields in zip(*parts, strict=True))
    wide = checks.arithmetic_dtype(means.dtype, variances.dtype)
    means, variances = means.astype(wide), variances.astype(wide)
    n = xp.asarray(counts).astype(wide)
    n = xp.where(n.sum() > 0, n, _taken(xp, n))
    total = n.sum()
    share = n / total
    share = share + (n - share * total) / total  # on devices that divide inexactly
    share = share.reshape(-1, *(1,) * (means.ndim - 1))
    # A state of no rows may hold anything, NaN too. Around one of the means no digits of their differences are lost.
    center = means[n.argmax()][None]
    delta = xp.where(share > 0, means - center, 0)
    offset = (share * delta).sum(0, keepdims=True)
    spread = xp.where(share > 0, variances + (delta - offset) ** 2, 0)
    return (center + offset)[0], (share * spread).sum(0)


def _read_states(states: Any) -> list[Survey]:
    """Read the states, which have one structure and shapes."""
    if not _is_list(states) or hasattr(states, "_fields"):
        raise TypeError(
            f"states is of type {type(states).__name__}; expected a list of states, one of each client: "
            "merge_states([state, other], [rows, other_rows])."
        )
    models = [_survey(i, state) for i, state in enumerate(states)]
    if not models:
        raise ValueError("states holds none; expected one state or more.")
    paths, _, _ = flatten(models[0].structure.unflatten(models[0].leaves))
    for i, model in enumerate(models):
        if model.structure != models[0].structure:
            others, _, _ = flatten(model.structure.unflatten(model.leaves))
            differ = name_few(sorted({join(keys) for keys in {*paths} ^ {*others}}) or ["the types of their nodes"])
            raise ValueError(f"states[{i}] and states[0] differ in {differ}; expected states of one model.")
        for keys, leaf, other in zip(paths, models[0].leaves, model.leaves, strict=True):
            if np.shape(leaf) != np.shape(other):
                raise ValueError(
                    f"{join(keys)} has shape {np.shape(other)} in states[{i}], and {np.shape(leaf)} in states[0]; "
                    "expected states of one model."
                )
    return models


def _survey(i: int, state: Any) -> Survey:
    try:
        return survey(state)
    except (TypeError, ValueError) as error:
        raise type(error)(f"states[{i}]: {error}") from error


def _is_list(several: Any) -> bool:
    """Say whether something has items in an order."""
    return np.ndim(several) > 0 if hasattr(several, "dtype") else is_several(several) and not isinstance(several, Set)


def _read_counts(counts: Any, states: int) -> Any:
    """Read the counts as an array, of NumPy where they are known."""
    if not _is_list(counts):
        raise TypeError(f"counts is {counts!r}; expected a list of numbers of rows, one of each state.")
    each = list(counts)
    if len(each) != states:
        raise ValueError(
            f"counts holds {count_of(len(each), 'number')} for {count_of(states, 'state')}; expected one of each state."
        )
    known = [read_number(count) for count in each]
    for i, (count, number) in enumerate(zip(each, known, strict=True)):
        if number is None and not (isinstance(count, jax.core.Tracer) and count.shape == ()):
            raise TypeError(f"counts[{i}] is {count!r}; expected the number of rows of states[{i}].")
        if number is not None and not 0 <= number < np.inf:
            raise ValueError(f"counts[{i}] is {count}; expected the number of rows of states[{i}], 0 or more.")
    if None in known:
        return jnp.stack([asarray(count) for count in each])
    if not any(known):
        raise ValueError("counts are all 0; expected rows in one state at least.")
    return np.asarray(known)


def _check_others(models: list[Survey]) -> None:
    """Refuse leaves that are no statistics and differ."""
    first = models[0]
    statistics = {i for layer in first.layers for i in (layer.mean, layer.var, layer.count)}
    paths, _, _ = flatten(first.structure.unflatten(first.leaves))
    for i, model in enumerate(models):
        for place, (keys, leaf, other) in enumerate(zip(paths, first.leaves, model.leaves, strict=True)):
            if place in statistics or leaf is other or np.size(leaf) == 0:
                continue
            traced = isinstance(leaf, jax.core.Tracer) or isinstance(other, jax.core.Tracer)
            if traced or not np.all(leaf == other):
                how = "is traced, so that nobody can tell whether it differs" if traced else "differs"
                raise ValueError(
                    f"{join(keys)} {how} between states[0] and states[{i}], and is no mean or var that could be "
                    "pooled; expected it to be the same. Pass the statistics alone, or choose one of its values first."
                )
