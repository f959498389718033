"""What the statistics of a layer say about it: thresholds, each with its reason, and a sentence for each finding."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jbn.observing.survey import Vector

Flags = np.ndarray[Any, np.dtype[np.bool_]]

# Below this many values a statistic carries noise of more than 1/√16, a quarter of a standard deviation, from one batch
# to the next.
_FEW = 16
# y has the deviation √(σ²/(σ²+ε)): half of its variance is gone at σ² = ε, 99 % at ε/100, and at ε/10⁶ no more than a
# thousandth of a deviation is left, which is the size of what one sweep leaves of a constant in float32.
_SMALL, _NEAR, _CONSTANT = 1.0, 1e-2, 1e-6
# |mean|/std in float32: from 2²⁴ on x varies by less than half a step of its mean, at 2²⁰ by sixteen steps.
_NEAR_RATIO, _CONSTANT_RATIO = 2.0**20, 2.0**24
# |mean|/std from which batch norms lose digits of y, and what they keep (README, "How accurate").
_FAR = {
    1e2: "Flax and Haiku keep two digits of y, Equinox, Keras and PyTorch four or five",
    1e4: "Flax, Haiku and, for channels-last x, PyTorch keep no digit of y, Equinox, Keras and PyTorch two or three",
}
# The gap between evaluation and training, in standard deviations of the output. Half of one over a layer is seen in the
# loss; a single channel of many may be a whole one off. Below 64 independent values chance alone moves mean and
# deviation by 1/√n and more, and as much more is allowed: in healthy networks the gap of batches of 32 was up to 0.28
# in a layer and 0.70 in a channel, of batches of 8 up to 0.52 and 1.45.
_GAP_OF_LAYER, _GAP_OF_CHANNEL, _ENOUGH = 0.5, 1.0, 64
# A gap that the prior explains, in most of the channels where it should make one, has a known cause: half as much is
# enough, but chance is what it was.
_BY_PRIOR = 0.5


class LayerStatistics(NamedTuple):
    """What a layer saw in a batch, beside what it remembers; arrays are float64, of the shape of its features."""

    path: str
    count: Vector  # type: ignore[assignment]  # valid values per channel
    independent: Vector  # of these; of one example there is no more than one
    running_mean: Vector
    running_var: Vector
    batch_mean: Vector
    batch_var: Vector  # biased
    z_mean: Vector  # batch_mean - running_mean, in standard errors of a mean of independent values
    z_var: Vector  # log(batch_var / running_var), in standard errors of such a logarithm
    gap: Vector  # root mean square of y in evaluation - y in training, in deviations of the output of the layer
    prior: float  # share of the initial mean 0 and variance 1 in the running statistics; NaN where nothing tells
    gap_by_prior: Vector  # the gap if the running statistics were that prior and this batch, in these shares
    gap_beyond_prior: Vector  # what lies between these and the running statistics, as a gap
    ratio: Vector  # |batch_mean| / √batch_var


class Finding(NamedTuple):
    """Something that is wrong with a layer or a parameter."""

    path: str  # keys joined by "/"
    kind: str
    channels: tuple[int, ...] | tuple[tuple[int, ...], ...]  # their indices, or index tuples
    message: str  # what it means and what to do


def findings_of(layer: LayerStatistics, epsilon: float) -> Iterator[Finding]:
    """Judge a layer; a channel that one kind explains is not judged by those that would follow from it."""
    judged = (layer.count > 1) & np.isfinite(layer.batch_mean) & np.isfinite(layer.batch_var)
    known = np.isfinite(layer.running_mean) & np.isfinite(layer.running_var) & (layer.running_var >= 0)
    var, ratio, deviation = layer.batch_var, layer.ratio, np.sqrt(layer.batch_var)

    def finding(kind: str, what: str, where: Flags, means: str) -> Iterator[Finding]:
        if where.any():
            yield Finding(layer.path, kind, indices(where), f"{layer.path}: {what}: {in_words(where)}. {means}")

    yield from finding(
        "non-finite",
        "running mean or variance is not a number that can be used",
        ~known,
        "Evaluation is NaN there. Go back to an older checkpoint, or take the statistics anew: jbn.recalibrate.",
    )
    few = layer.count < _FEW
    yield from finding(
        "few values",
        f"only {layer.count.min():.0f} values per channel in this batch, expected {_FEW} or more",
        few,
        "Statistics of so few differ much from batch to batch, and y with them. Take larger batches, or those of all "
        "devices together (axis_name); for evaluation, jbn.recalibrate.",
    )
    constant = judged & ((var <= _CONSTANT * epsilon) | (ratio >= _CONSTANT_RATIO))
    varied = (constant & (layer.running_var > _SMALL * epsilon)).any()
    yield from finding(
        "dead",
        "constant in this batch",
        constant,
        "y is the bias there, whatever x is. Look for a kernel of zeros, a ReLU before it that is always off or a "
        "feature that is the same in all examples; "
        + ("but by the running variance it varied before." if varied else "the channel can be removed."),
    )
    near = judged & ~constant & ((var < _NEAR * epsilon) | (ratio >= _NEAR_RATIO))
    yield from finding(
        "near-constant",
        f"nearly constant, with deviations from {least(deviation, near)} on",
        near,
        f"They are lost beside √epsilon = {epsilon**0.5:.1g}, or beside the rounding of a mean that is a million times "
        "as large: y hardly depends on x. Scale what comes before up, or take its mean out.",
    )
    small = judged & ~constant & ~near & (var < _SMALL * epsilon)
    left = np.sqrt(var / (var + epsilon))
    yield from finding(
        "below epsilon",
        f"variance below epsilon = {epsilon:.1g}, down to {least(var, small)}",
        small,
        f"y has a deviation there of as little as {np.min(left, where=small, initial=1):.0%} of what it should have. "
        "Scale what comes before up, or train with a smaller epsilon.",
    )
    yield from _differences(layer, judged & known & ~constant & ~near, finding)
    far = judged & ~constant & ~near & ~small & (ratio >= min(_FAR))
    largest = np.max(ratio, where=far, initial=0)
    lost = [kept for bound, kept in _FAR.items() if bound <= largest]
    yield from finding(
        "far mean",
        f"|mean|/std up to {largest:.2g}",
        far,
        f"jbn is exact here. {lost[-1] if lost else ''}; in bfloat16 x itself comes in steps of up to "
        f"{largest / 128:.1g} standard deviations. Take the mean out of what comes before.",
    )


def _differences(layer: LayerStatistics, judged: Flags, finding: Any) -> Iterator[Finding]:
    """Compare running and batch statistics where both can be."""
    chance = np.sqrt(_ENOUGH / np.maximum(layer.independent, 1))
    size, off = _off(layer.gap, judged, np.maximum(chance, 1))
    by_prior, left = _off(layer.gap_by_prior, judged, np.maximum(chance, _BY_PRIOR))
    beyond, other = _off(layer.gap_beyond_prior, judged, np.maximum(chance, 1))

    def of(size: float, gap: Vector) -> str:
        worst = np.max(gap, where=judged, initial=0)
        deviations = f"{size:.2g} standard deviations of the output, root mean square over channels"
        return f"Evaluation is off by {deviations} (worst: {worst:.2g})."

    explained = 2 * (left & ~other).sum() > left.sum()
    if explained:
        yield from finding(
            "prior",
            f"running statistics are as if {layer.prior:.0%} of them were still the initial mean 0 and variance 1",
            judged,
            f"{of(by_prior, layer.gap_by_prior)} Train longer, take a smaller momentum, or use jbn.recalibrate. If "
            "they are those of normalized data, normalize this batch too.",
        )
    yield from finding(
        "stale",
        "running statistics are not those of this batch" + ", beyond that" * int(explained),
        other if explained else off,
        f"{of(beyond, layer.gap_beyond_prior) if explained else of(size, layer.gap)} They are those of other weights "
        "or other data, or follow too slowly: use jbn.recalibrate, or a smaller momentum.",
    )


def _off(gap: Vector, judged: Flags, allowed: Vector) -> tuple[float, Flags]:
    """Return the root mean square of the gap, and where it is too large; of stacked layers each is judged by itself."""
    gap = np.where(judged, gap, 0)
    mean_square = (gap**2).sum(-1, keepdims=True) / np.maximum(judged.sum(-1, keepdims=True), 1)
    strict = mean_square > (_GAP_OF_LAYER * allowed) ** 2
    return float(np.sqrt(mean_square.max())), gap > allowed * np.where(strict, _GAP_OF_LAYER, _GAP_OF_CHANNEL)


def indices(where: Flags) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Return the indices of what is true, index tuples where there are several axes."""
    found = np.argwhere(where).tolist()
    return tuple(i[0] for i in found) if where.ndim == 1 else tuple(map(tuple, found))


def in_words(where: Flags) -> str:
    """Name the channels that are true."""
    found = indices(where)
    if len(found) == where.size > 1:
        return f"all {where.size} channels"
    shown = ", ".join(map(str, found[:5])) + f" and {len(found) - 5} more" * (len(found) > 5)
    return f"channel{'s' * (len(found) > 1)} {shown} of {where.size}"


def least(values: Vector, where: Flags) -> str:
    """Return the least of the values where it is true."""
    return f"{np.min(values, where=where, initial=np.inf):.1g}"
