"""What the statistics of a layer say about it: thresholds, each with its reason, and a sentence for each finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn.observing.survey import Vector
from jbn.paths import count_of, name_few

Flags = np.ndarray[Any, np.dtype[np.bool_]]

# Below this many values a statistic carries noise of more than 1/√16, a quarter of a standard deviation, from one batch
# to the next.
FEW = 16
# y has the deviation √(σ²/(σ²+ε)): half of its variance is gone at σ² = ε, 99 % at ε/100, and at ε/10⁶ no more than a
# thousandth of a deviation is left, which is the size of what one sweep leaves of a constant in float32.
_SMALL, _NEAR, _CONSTANT = 1.0, 1e-2, 1e-6
# |mean|/std in float32: at 2²⁴ a deviation is at most one step of the numbers near the mean, at 2²⁰ at most sixteen.
_NEAR_RATIO, _CONSTANT_RATIO = 2.0**20, 2.0**24
# |mean|/std from which batch norms lose digits of y, and what they keep (docs/how/accuracy.md).
_KEPT = {
    1e2: "Flax and Haiku keep two digits of y, Equinox, Keras and PyTorch four or five",
    1e4: "Flax, Haiku and, for channels-last x, PyTorch keep no digit of y, Equinox, Keras and PyTorch two or three",
}
FAR = min(_KEPT)
# The gap between evaluation and training, in standard deviations of the output. Half of one over a layer is seen in the
# loss; a single channel of many may be a whole one off. Below 64 independent values chance alone moves mean and
# deviation by 1/√n and more, and as much more is allowed: in healthy networks the gap of batches of 32 was up to 0.28
# in a layer and 0.70 in a channel, of batches of 8 up to 0.52 and 1.45.
_GAP_OF_LAYER, _GAP_OF_CHANNEL, _ENOUGH = 0.5, 1.0, 64
# A gap that the prior explains in most of the channels that are off has a known cause and needs less evidence: half the
# usual gap is reported. The allowance for chance in small batches is not halved.
_BY_PRIOR = 0.5
# A running variance above this many times the prior's share is more than is left of the initial 1: shares are fitted.
_ALLOWED = 1.1
LEAST_GAP = _GAP_OF_LAYER * _BY_PRIOR


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer saw in a batch, beside what it remembers; arrays are float64, of the shape of its features.

    A layer that was not observed, because it evaluates or is not jbn's, has a count of 0, and NaN for what is seen.

    Attributes:
        path: keys joined by "/".
        dtype: the name of the dtype of the running statistics, such as "float32".
        count: valid values per channel, ≥ 0.
        independent: as many of them as are independent; of one example there is no more than one.
        running_mean: what the layer remembers, in the unit of its input.
        running_var: likewise, ≥ 0, in that unit squared.
        batch_mean: what it saw, in the unit of its input.
        batch_var: likewise, biased, in that unit squared.
        z_mean: batch_mean - running_mean, in standard errors of a mean of independent values.
        z_var: log(batch_var / running_var), in standard errors of such a logarithm.
        gap: root mean square of y in evaluation - y in training, in deviations of the output of the layer, ≥ 0.
        prior: share of the initial mean 0 and variance 1 in the running statistics, a float from 0 to 1; NaN where
            nothing tells.
        gap_by_prior: the gap between the batch and the mixture of prior and batch in these shares, in the unit of gap.
        gap_beyond_prior: the gap between that mixture and the running statistics, in the unit of gap.
        ratio: the distance of batch_mean from 0, in standard deviations of the batch, ≥ 0.
    """

    path: str
    dtype: str
    count: Vector
    independent: Vector
    running_mean: Vector
    running_var: Vector
    batch_mean: Vector
    batch_var: Vector
    z_mean: Vector
    z_var: Vector
    gap: Vector
    prior: float
    gap_by_prior: Vector
    gap_beyond_prior: Vector
    ratio: Vector


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a layer, with several or with a parameter.

    Attributes:
        path: keys joined by "/"; empty where it is about several layers.
        kind: one of the kinds in ``jbn.diagnose``.
        channels: the indices of the channels, or index tuples.
        message: what it means and what to do.
        layers: the paths of all layers that it is about, where it is about several.
    """

    path: str
    kind: str
    channels: tuple[int, ...] | tuple[tuple[int, ...], ...]
    message: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    """A layer, and what is the matter with each of its channels.

    A channel that one kind explains is not judged by the kinds that would follow from it.

    Attributes:
        door: the module whose tools messages name, such as "jbn.linen".
    """

    layer: LayerStatistics
    epsilon: float
    door: str
    is_observed: bool = True

    def findings(self) -> Iterator[Finding]:
        """Yield what is found, kind by kind; of a layer that was not observed, in what it remembers."""
        yield from self._narrow_memory()
        yield from self._broken_memory()
        if not self.is_observed:
            return
        yield from self._few_values()
        yield from self._constant()
        yield from self._nearly_constant()
        yield from self._below_epsilon()
        yield from self._differences()
        yield from self._far_mean()

    @cached_property
    def comparable(self) -> Flags:
        """The channels whose statistics of this batch are numbers."""
        layer = self.layer
        return (layer.count > 1) & np.isfinite(layer.batch_mean) & np.isfinite(layer.batch_var)

    @cached_property
    def usable(self) -> Flags:
        """The channels whose running statistics evaluate to numbers."""
        mean, var = self.layer.running_mean, self.layer.running_var
        return np.isfinite(mean) & np.isfinite(var) & (var >= 0)

    @cached_property
    def constant(self) -> Flags:
        """The channels without any variation."""
        layer = self.layer
        return self.comparable & ((layer.batch_var <= _CONSTANT * self.epsilon) | (layer.ratio >= _CONSTANT_RATIO))

    @cached_property
    def nearly_constant(self) -> Flags:
        """The channels whose variation is lost."""
        layer = self.layer
        lost = (layer.batch_var < _NEAR * self.epsilon) | (layer.ratio >= _NEAR_RATIO)
        return self.comparable & ~self.constant & lost

    @cached_property
    def below_epsilon(self) -> Flags:
        """The channels of which epsilon takes much."""
        small = self.layer.batch_var < _SMALL * self.epsilon
        return self.comparable & ~self.constant & ~self.nearly_constant & small

    def _finding(self, kind: str, what: str, where: Flags, means: str) -> Iterator[Finding]:
        path = self.layer.path
        if where.any():
            yield Finding(path, kind, indices(where), f"{path}: {what}: {in_words(where)}. {means}")

    def _narrow_memory(self) -> Iterator[Finding]:
        narrow = jnp.dtype(self.layer.dtype).itemsize < 4
        return self._finding(
            "narrow",
            f"running statistics are {self.layer.dtype}",
            np.full(self.layer.count.shape, narrow),
            "They are known to two or three digits, and training would refuse to move them, for they would stall. Cast "
            f"them to float32, and take them anew: {self.door}.recalibrate.",
        )

    def _broken_memory(self) -> Iterator[Finding]:
        return self._finding(
            "non-finite",
            "running mean or variance is not a number that can be used",
            ~self.usable,
            "Evaluation is NaN there, or the bias. Go back to an older checkpoint, or take the statistics anew: "
            f"{self.door}.recalibrate.",
        )

    def _few_values(self) -> Iterator[Finding]:
        count = self.layer.count
        return self._finding(
            "few values",
            f"only {count_of(int(count.min()), 'value per channel')} in this batch, expected {FEW} or more",
            count < FEW,
            "Statistics of so few differ much from batch to batch, and y with them. Take larger batches, or those of "
            f"all devices together (axis_name); for evaluation, {self.door}.recalibrate.",
        )

    def _constant(self) -> Iterator[Finding]:
        yield from self._finding(
            "dead",
            "constant in this batch",
            self.constant,
            "y is the bias there, whatever x is. Look for a kernel of zeros, a ReLU before it that is always off or a "
            f"feature that is the same in all examples; {self._has_varied()}.",
        )

    def _has_varied(self) -> str:
        """Say what the running variance tells of what is constant now, beside what is left of its initial 1."""

        def exceeds(share: float) -> bool:
            least = _ALLOWED * share + _SMALL * self.epsilon
            return bool((self.constant & (self.layer.running_var > least)).any())

        known = np.isfinite(self.layer.prior)
        if exceeds(self.layer.prior if known else 1.0):
            return "but by the running variance it varied before"
        if exceeds(0.0) and not known:
            return "its running variance may be what is left of the initial 1: diagnose with momentum and updates"
        return "the channel can be removed"

    def _nearly_constant(self) -> Iterator[Finding]:
        deviation = np.sqrt(self.layer.batch_var)
        return self._finding(
            "near-constant",
            f"nearly constant, with deviations from {_least(deviation, self.nearly_constant)} on",
            self.nearly_constant,
            f"They are lost beside √epsilon = {self.epsilon**0.5:.1g}, or beside the rounding of a mean that is a "
            "million times as large: y hardly depends on x. Scale what comes before up, or take its mean out.",
        )

    def _below_epsilon(self) -> Iterator[Finding]:
        var, small = self.layer.batch_var, self.below_epsilon
        left = np.min(np.sqrt(var / (var + self.epsilon)), where=small, initial=1)
        return self._finding(
            "below epsilon",
            f"variance below epsilon = {self.epsilon:.1g}, down to {_least(var, small)}",
            small,
            f"y has a deviation there of as little as {left:.0%} of what it should have. Scale what comes before up, "
            "or train with a smaller epsilon.",
        )

    def _differences(self) -> Iterator[Finding]:
        """Compare running and batch statistics where both can be."""
        layer, both = self.layer, self.comparable & self.usable & ~self.constant & ~self.nearly_constant
        chance = np.sqrt(_ENOUGH / np.maximum(layer.independent, 1))
        size, off = _off(layer.gap, both, np.maximum(chance, 1))
        by_prior, left = _off(layer.gap_by_prior, both, np.maximum(chance, _BY_PRIOR))
        beyond, other = _off(layer.gap_beyond_prior, both, np.maximum(chance, 1))

        def describe(size: float, gap: Vector) -> str:
            worst = np.max(gap, where=both, initial=0)
            deviations = f"{size:.2g} standard deviations of the output, root mean square over channels"
            return f"Evaluation is off by {deviations} (worst: {worst:.2g})."

        explained = 2 * (left & ~other).sum() > left.sum()
        if explained:
            yield from self._finding(
                "prior",
                f"running statistics are as if {layer.prior:.0%} of them were still the initial mean 0 and variance 1",
                both,
                f"{describe(by_prior, layer.gap_by_prior)} Train longer, take a smaller momentum, or use "
                f"{self.door}.recalibrate. If they are those of normalized data, normalize this batch too.",
            )
            size, gap, off, beside = beyond, layer.gap_beyond_prior, other, ", beyond that"
        else:
            gap, beside = layer.gap, ""
        yield from self._finding(
            "stale",
            f"running statistics are not those of this batch{beside}",
            off,
            f"{describe(size, gap)} They are those of other weights or other data, or follow too slowly: use "
            f"{self.door}.recalibrate, or a smaller momentum.",
        )

    def _far_mean(self) -> Iterator[Finding]:
        explained = self.constant | self.nearly_constant | self.below_epsilon
        far = self.comparable & ~explained & (self.layer.ratio >= FAR)
        largest = np.max(self.layer.ratio, where=far, initial=0)
        kept = [words for bound, words in _KEPT.items() if bound <= largest]
        return self._finding(
            "far mean",
            f"|mean|/std up to {largest:.2g}",
            far,
            f"jbn is exact here. {kept[-1] if kept else ''}; in bfloat16 x itself comes in steps of up to "
            f"{largest / 128:.1g} standard deviations. Take the mean out of what comes before.",
        )


def find_unobserved(idle: Sequence[str], foreign: Sequence[str], number: int, door: str) -> Iterator[Finding]:
    """Find layers that have shown nothing, so that this is known of them alone.

    Args:
        idle: the paths of those that evaluate, or are not called.
        foreign: the paths of those whose code is not jbn's.
        number: how many layers there are.
        door: see ``Examination``.
    """
    if idle:
        message = (
            f"{len(idle)} of {count_of(number, 'layer')} evaluate in a training call, or it does not reach them: they "
            f"normalize by running statistics and never move: {name_few(idle)}. Is the flag of training passed on to "
            "them? If they are frozen on purpose, all is well."
        )
        yield Finding("", "evaluates", (), message, tuple(idle))
    if foreign:
        fix = "For copies of Flax's class say so: also=(Class,)."
        if door == "jbn":
            fix = (
                "For Flax's own use diagnose of jbn.linen or jbn.nnx, or replace there; for copies of their class tell "
                "either so: also=(Class,)."
            )
        message = (
            f"{len(foreign)} of {count_of(number, 'layer')} are not jbn's, and what they see is not known: "
            f"{name_few(foreign)}. {fix}"
        )
        yield Finding("", "foreign", (), message, tuple(foreign))


def _off(gap: Vector, both: Flags, allowed: Vector) -> tuple[float, Flags]:
    """Return the root mean square of the gap, and where it is too large; of stacked layers each is judged by itself."""
    gap = np.where(both, gap, 0)
    mean_square = (gap**2).sum(-1, keepdims=True) / np.maximum(both.sum(-1, keepdims=True), 1)
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
    return f"{'channel' + 's' * (len(found) > 1)} {name_few(map(str, found), most=5)} of {where.size}"


def _least(values: Vector, where: Flags) -> str:
    return f"{np.min(values, where=where, initial=np.inf):.1g}"
