"""``diagnose``: what is wrong with the statistics of a model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from jbn.core.numbers import is_schedule, read_epsilon, read_momentum
from jbn.core.state import Observation
from jbn.observing.findings import Examination, Finding, LayerStatistics, find_unobserved, in_words, indices
from jbn.observing.survey import Apply, Batch, ForeignLayers, Layer, Seen, Statistics, Survey, Vector, survey
from jbn.paths import ArrayTree, Keys, count_of, flatten, join, name_few

# A fit of the prior whose standard error is larger tells nothing: the prior and the batch are too much alike.
_UNTOLD = 0.1


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What ``jbn.diagnose`` found; printed, it is the messages of the findings.

    Attributes:
        layers: the statistics of every layer, in the order in which data pass them.
        findings: what is wrong.
    """

    layers: tuple[LayerStatistics, ...]
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        return "\n".join(f.message for f in self.findings) or f"No findings in {count_of(len(self.layers), 'layer')}."


def diagnose(
    apply: Apply,
    params: ArrayTree,
    state: ArrayTree,
    batch: Batch,
    *,
    epsilon: float = 1e-5,
    momentum: float | None = None,
    updates: int | None = None,
) -> Diagnosis:
    r"""Run one batch through a model as in training and say what is wrong with its normalization.

    Running statistics μ, σ² beside those of the batch, μ_B, σ_B², with n independent values per channel:

    .. math::
        z_\mu = \frac{\mu_B - \mu}{\sigma_B / \sqrt{n}}, \quad z_{\sigma^2} = \sqrt{\tfrac{n - 1}{2}}\,
        \ln\frac{\sigma_B^2}{\sigma^2},

    .. math::
        \text{gap}^2 = \sigma_B^2 \left(\frac{1}{\sqrt{\sigma^2 + \epsilon}} -
        \frac{1}{\sqrt{\sigma_B^2 + \epsilon}}\right)^2 + \frac{(\mu_B - \mu)^2}{\sigma^2 + \epsilon}

    The gap is the root mean square of y in evaluation minus y in training, for given x, where scale is 1; it is
    multiplied by ``|scale|`` over the root mean square of the scales of the layer. The share p of the initial mean 0
    and variance 1 in the running statistics is fitted over all channels: :math:`\mu = (1 - p)\,\mu_B`,
    :math:`\sigma^2 = p + (1 - p)\,\sigma_B^2`.

    =================  =============================================================================================
    kind               what was found
    =================  =============================================================================================
    ``evaluates``      layers that evaluate in this call, or that it does not reach, all in one finding
    ``foreign``        layers that are not jbn's and could not be observed, all in one finding
    ``narrow``         running statistics of 16 bits
    ``non-finite``     NaN or inf in a parameter, in running statistics, or in those of the batch (the first such layer)
    ``few values``     fewer than 16 values per channel
    ``dead``           a channel that is constant in this batch
    ``near-constant``  one whose deviation is below a tenth of √ε, or a millionth of its mean
    ``below epsilon``  one whose variance is below ε
    ``prior``          a gap, from half of that below on, because the running statistics still hold the initial 0 and 1
    ``stale``          a gap that the prior does not explain
    ``far mean``       ``|mean|/std`` of 100 or more, where other implementations lose digits
    =================  =============================================================================================

    A gap is reported from half a standard deviation of the output on over a layer, or a whole one in one channel, and
    later for batches below 64 examples. A layer has one finding for one cause, and not one for what follows from it.

    Args:
        apply: ``apply(params, state, batch)`` runs the model as in training and returns its new state, as in
            ``jbn.recalibrate``. It is compiled once for each shape of a batch.
        params: passed to ``apply``; a ``scale`` of a layer is found where its path in ``params`` is that in ``state``.
        state: a tree with the running ``mean`` and ``var`` of every layer.
        batch: what ``apply`` takes, any tree of arrays, sharded or not. The first axis of most of them counts examples:
            values of one example are not independent.
        epsilon: ε of the layers.
        momentum: weight of the old value in training; with ``updates`` it gives p without a fit.
        updates: how often the running statistics were updated.

    Returns:
        ``Diagnosis(layers, findings)``; ``print`` shows the messages of the findings. Of each layer, in the order of
        the data, ``path``; ``dtype``, that of its running statistics; and float64 arrays of the shape of its features:
        ``count`` and ``independent``, values per channel; ``running_mean``, ``running_var``, ``batch_mean``,
        ``batch_var``; ``z_mean``, ``z_var``; ``gap``, and what it is between the batch and a mixture of p prior and
        1 - p batch, ``gap_by_prior``, and between this and the running statistics, ``gap_beyond_prior``; ``ratio``,
        ``|mean|/std`` of the batch; and p, ``prior``, a number, NaN where nothing tells. A layer that was not observed
        is judged by what it remembers, with a count of 0 and NaN for the batch. Of each finding ``path``, ``kind``,
        ``channels`` (indices, or index tuples), ``message``, which says what it means and what to do, and ``layers``,
        all paths of a finding about several.

    Raises:
        ValueError: for a state without statistics, and where no layer can be observed, with their paths: they are not
            jbn's, or evaluate.
        TypeError: for arguments of other kinds.

    >>> import jax, jbn
    >>> params, state = jbn.bn_init(3)
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)).at[:, 1].set(5.0)
    >>> def apply(params, state, x):
    ...     return jbn.bn_forward(params, state, x, True)[1]
    >>> diagnosis = jbn.diagnose(apply, params, state, x)
    >>> [(finding.path, finding.kind, finding.channels) for finding in diagnosis.findings]
    [('the layer', 'dead', (1,))]

    Source: S. Ioffe, C. Szegedy, "Batch Normalization", 2015, for what is compared; the standard errors are those of
    mean and log-variance of normal values. No other library has such a tool.
    """
    return examine(apply, params, state, batch, epsilon=epsilon, momentum=momentum, updates=updates, door="jbn")


def examine(
    apply: Apply,
    params: ArrayTree,
    state: ArrayTree,
    batch: Batch,
    *,
    epsilon: float,
    momentum: float | None,
    updates: int | None,
    door: str,
) -> Diagnosis:
    """Diagnose, for who came through ``door``: the module whose tools the messages name, such as "jbn.linen"."""
    epsilon = read_epsilon(epsilon)
    prior = _read_prior(momentum, updates)
    if not callable(apply):
        raise TypeError(f"apply is of type {type(apply).__name__}; expected a function of params, state and batch.")
    model = survey(state)
    remembered = model.remembered()
    compiled = jax.jit(apply)
    question, answers = _observe(compiled, params, model, remembered, batch)
    seen, idle = model.select(model.merge([answers]))
    foreign = [layer for layer in model.layers if layer not in answers]
    before = _layers_before(compiled.trace(params, question, batch).jaxpr, model, question, params)
    paths, leaves, _ = flatten(params, "params")
    scales = {keys[:-1]: leaf for keys, leaf in zip(paths, leaves, strict=True) if keys[-1:] == ("scale",)}
    examples = _count_examples(batch)

    def compare(layer: Layer) -> LayerStatistics:
        running, scale = remembered[layer], scales.get(layer.keys)
        found, p = (seen[layer], prior) if layer in seen else (_see_nothing(running), np.nan)
        return _compare(layer, model.dtype(layer), running, found, scale, examples, epsilon, p)

    def depth(layer: Layer) -> float:
        # What an idle layer returns says nothing of where it is: it is before those that depend on it.
        after = (len(before[other]) - 0.5 for other in seen if layer in before[other])
        return len(before[layer]) if layer in seen or layer in foreign else min(after, default=np.inf)

    layers = {layer: compare(layer) for layer in sorted(model.layers, key=depth)}
    findings = [
        *find_unobserved([layer.path for layer in idle], [layer.path for layer in foreign], len(layers), door),
        *_find_non_finite(params, batch, {layer: remembered[layer] for layer in idle}, seen, before),
        *(f for layer, shown in layers.items() for f in Examination(shown, epsilon, door, layer in seen).findings()),
    ]
    return Diagnosis(tuple(layers.values()), tuple(findings))


def _observe(
    apply: Any, params: Any, model: Survey, statistics: dict[Layer, Statistics], batch: Any
) -> tuple[Any, dict[Layer, Observation]]:
    """Return the state that the layers were asked with, and the answers of those that can observe.

    The others run on the statistics that they know.
    """
    question = model.question(statistics, "batch")
    try:
        return question, model.ask(apply, params, question, batch)
    except ForeignLayers as error:
        others = {layer: known for layer, known in statistics.items() if layer not in error.layers}
        if not others:
            raise
        return _observe(apply, params, model, others, batch)


def _see_nothing(running: Statistics) -> Seen:
    """Return what a layer has seen that was not observed."""
    none, unknown = np.zeros_like(running.mean), np.full_like(running.mean, np.nan)
    return Seen(none, unknown, unknown, none)


def _compare(
    layer: Layer,
    dtype: str,
    running: Statistics,
    seen: Seen,
    scale: Any,
    examples: float,
    epsilon: float,
    given_prior: float | None,
) -> LayerStatistics:
    """Put what a layer saw beside what it remembers."""
    mean, var = running.mean, running.var
    with np.errstate(all="ignore"):
        # The steps of a scan, or a stack's layers, may share a scale that has no axis for them.
        fits = np.shape(scale) == mean.shape[-np.ndim(scale) :]
        scale = np.abs(np.broadcast_to(np.asarray(scale, np.float64), mean.shape)) if fits else np.ones_like(mean)
        share = scale / np.sqrt(np.maximum((scale**2).mean(-1, keepdims=True), np.finfo(np.float64).tiny))
        independent = np.minimum(seen.count, examples)
        usable = (seen.count > 1) & np.isfinite(mean + var + seen.mean + seen.var)
        prior = _fit_prior(running, seen, independent, usable, epsilon) if given_prior is None else given_prior
        p = prior if np.isfinite(prior) else 0.0
        mixture = Statistics((1 - p) * seen.mean, p + (1 - p) * seen.var)
        batch = Statistics(seen.mean, seen.var)
        return LayerStatistics(
            path=layer.path,
            dtype=dtype,
            count=seen.count,
            independent=independent,
            running_mean=mean,
            running_var=var,
            batch_mean=seen.mean,
            batch_var=seen.var,
            z_mean=(seen.mean - mean) / np.sqrt(seen.var / independent),
            z_var=np.log(seen.var / var) * np.sqrt((independent - 1) / 2),
            gap=share * _gap(running, batch, epsilon),
            prior=prior,
            gap_by_prior=share * _gap(mixture, batch, epsilon),
            gap_beyond_prior=share * _gap(running, mixture, epsilon),
            ratio=np.abs(seen.mean) / np.sqrt(seen.var),
        )


def _gap(running: Statistics, batch: Statistics, epsilon: float) -> Vector:
    ours, theirs = np.sqrt(running.var + epsilon), np.sqrt(batch.var + epsilon)
    return np.sqrt(batch.var * (1 / ours - 1 / theirs) ** 2 + ((batch.mean - running.mean) / ours) ** 2)


def _fit_prior(running: Statistics, seen: Seen, independent: Vector, usable: Any, epsilon: float) -> float:
    """Fit p to what is missing: μ_B - μ = p μ_B and σ² - σ_B² = p (1 - σ_B²), in running standard deviations.

    By least absolute values, so that channels that are off for another reason do not decide.
    """
    deviation = np.sqrt(running.var + epsilon)
    missing = np.stack([(seen.mean - running.mean) / deviation, (running.var - seen.var) / deviation**2])[:, usable]
    slope = np.stack([seen.mean / deviation, (1 - seen.var) / deviation**2])[:, usable]
    if not np.sqrt(2 / (independent[usable] * slope**2).sum()) < _UNTOLD:
        return np.nan
    order = np.argsort(missing / slope, axis=None)  # NaN, of slope 0 and weight 0, comes last
    weights = np.abs(slope).ravel()[order].cumsum()
    middle = order[np.searchsorted(weights, weights[-1] / 2)]
    return float(np.clip((missing / slope).ravel()[middle], 0, 1)) + 0.0


def _find_non_finite(
    params: Any,
    batch: Any,
    evaluated: dict[Layer, Statistics],
    seen: dict[Layer, Seen],
    before: dict[Layer, set[Layer]],
) -> Iterator[Finding]:
    """Find what is not finite, where it begins."""
    in_params = list(_non_finite_leaves(params))
    for keys, bad in in_params:
        where = bad.any(tuple(range(bad.ndim - 1))) if bad.ndim else bad[None]
        path = join(keys) or "params"
        message = f"{path}: NaN or inf in {bad.sum()} of {count_of(bad.size, 'value')}: {in_words(where)}. It reaches "
        message += "all that comes after. Go back to an older checkpoint, and look for what made a step too large."
        yield Finding(path, "non-finite", indices(where), message)
    if in_params:
        return
    in_batch = [join(("batch", *keys)) for keys, _ in _non_finite_leaves(batch)]
    in_state = [
        layer.path
        for layer, known in evaluated.items()
        if not (np.isfinite(known.mean + known.var) & (known.var >= 0)).all()
    ]
    why = "Params and batch are finite: what comes before it overflowed, so look for values too large for their dtype."
    if in_batch:
        why = f"So are values of {name_few(in_batch)}: mend or mask them."
    elif in_state:
        why = (
            f"So is what evaluates before it by running statistics that are NaN, inf or negative: {name_few(in_state)}."
        )
    broken = {layer for layer, found in seen.items() if not np.isfinite(found.mean + found.var).all()}
    # It begins in the layers that have no broken one before them; of layers in a circle, in those with the fewest.
    least = min((len(before[layer] & broken) for layer in broken), default=0)
    for layer in sorted(layer for layer in broken if len(before[layer] & broken) == least):
        where = ~np.isfinite(seen[layer].mean + seen[layer].var)
        others = len(broken) - 1
        spread = f" and so in {count_of(others, 'layer')} beside it" if others else ""
        message = f"{layer.path}: statistics of this batch are NaN or inf{spread}: {in_words(where)}. {why}"
        yield Finding(layer.path, "non-finite", indices(where), message)


def _non_finite_leaves(tree: Any) -> Iterator[tuple[Keys, Any]]:
    paths, leaves, _ = flatten(tree)
    for keys, leaf in zip(paths, leaves, strict=True):
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
            bad = ~np.asarray(jnp.isfinite(leaf))
            if bad.any():
                yield keys, bad


def _layers_before(jaxpr: Any, model: Survey, question: Any, params: Any) -> dict[Layer, set[Layer]]:
    """Return of each layer those that its statistics depend on: the ones that its data have passed.

    Args:
        jaxpr: the traced program of ``apply``.
        model: the state, taken apart.
        question: the state that was traced.
        params: the arguments before it.
    """
    leaves = model.structure.flatten_up_to(question)
    # An observation is several arrays in the place of one leaf.
    arrays = [i for i, leaf in enumerate(leaves) for _ in jax.tree.leaves(leaf)]
    start = len(jax.tree.leaves(params))

    def used_leaves(layer: Layer) -> set[int]:
        outputs = [i in (layer.mean, layer.var) for i in arrays]
        used = partial_eval.dce_jaxpr(jaxpr.jaxpr, outputs)[1][start : start + len(arrays)]
        return {i for i, is_used in zip(arrays, used, strict=True) if is_used}

    used = {layer: used_leaves(layer) for layer in model.layers}
    return {
        layer: {other for other in model.layers if other != layer and {other.mean, other.var} & used[layer]}
        for layer in model.layers
    }


def _count_examples(batch: Any) -> float:
    """Return the size that most arrays begin with; of several such, that of the most numbers."""
    arrays: dict[int, list[int]] = {}
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            arrays.setdefault(np.shape(leaf)[0], []).append(np.size(leaf))
    return max(arrays, key=lambda size: (len(arrays[size]), sum(arrays[size])), default=np.inf)


def _read_prior(momentum: float | None, updates: int | None) -> float | None:
    """Return the share of the prior that is left after so many updates, or None."""
    if momentum is None and updates is None:
        return None
    if momentum is None or updates is None:
        given, missing = ("updates", "momentum") if momentum is None else ("momentum", "updates")
        raise ValueError(f"{given} is given without {missing}; expected both: the prior left is momentum**updates.")
    if is_schedule(momentum):
        raise TypeError(
            f"momentum is the function {momentum!r}; expected a number, or neither momentum nor updates: the prior "
            "left is estimated then. With jbn.debiased and jbn.cumulative there is none."
        )
    read_momentum(momentum)
    if isinstance(updates, bool) or not isinstance(updates, int | np.integer):
        raise TypeError(f"updates is {updates!r}; expected how often the statistics were updated, a whole number.")
    if updates < 0:
        raise ValueError(f"updates is {updates}; expected how often the statistics were updated, 0 or more.")
    return float(momentum) ** int(updates)
