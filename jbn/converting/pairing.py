"""Which layer may be which: groups of layers that fit one another, order inside of them, and guesses by names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from jbn.converting.dialects import Dialect, Said, translate
from jbn.converting.flow import Flow
from jbn.converting.trees import Path, is_float
from jbn.paths import find_wrapper, name_few

# The arrays of a layer: their names, shapes and dtypes.
Arrays = tuple[tuple[str, tuple[int, ...], Any], ...]

# A depthwise convolution of Keras has the shape of a transposed one from one feature, and is the likelier of the two.
_KINDS = (None, "embedding", "depthwise", "transpose_kernel", "transposed")


@dataclass(frozen=True)
class Match:
    """A layer of the source, and which it may be in the target.

    Attributes:
        source: its path.
        target: the path in the target; None if no layer is left for it there.
        certain: whether nothing else is possible, if the two models are the same and the source is in order.
        reason: why, or why not.
        rivals: the other layers of the target that it may be.
        kind: what ``convert`` has to be told of it, see ``kinds`` there; or None.
    """

    source: str
    target: str | None
    certain: bool
    reason: str
    rivals: tuple[str, ...] = ()
    kind: str | None = None


@dataclass(frozen=True)
class Group:
    """Layers of the source and of the target, of which any may be any, and the kinds of the former."""

    sources: list[Path]
    targets: list[Path]
    kinds: dict[Path, str | None]

    @property
    def is_pair(self) -> bool:
        """Whether there is one of each."""
        return len(self.sources) == len(self.targets) == 1

    def join(self, other: Group) -> Group:
        """Return both as one."""
        targets = list(dict.fromkeys((*self.targets, *other.targets)))
        return Group(self.sources + other.sources, targets, self.kinds | other.kinds)

    def is_alike(self, fits: Fits) -> bool:
        """Say whether each fits each, not one the first two and another the last two."""
        return all(fits(source, target, self.kinds[source]) for source in self.sources for target in self.targets)


class Fits:
    """Which layers fit which: what ``convert`` does, with shapes alone, once for layers of equal arrays."""

    def __init__(
        self,
        origin: Dialect,
        goal: Dialect,
        ours: Mapping[Path, Arrays],
        theirs: Mapping[Path, Arrays],
        kind: Mapping[Path, str],
    ) -> None:
        self.origin, self.goal, self.ours, self.theirs, self.said = origin, goal, ours, theirs, kind
        self.known: dict[Any, bool] = {}

    def __call__(self, source: Path, target: Path, kind: str | None = None) -> bool:
        """Say whether a layer of the source, of this kind, has the arrays of one of the target."""
        key = self.ours[source], self.theirs[target], self.said.get(source, kind)
        if key not in self.known:
            self.known[key] = self._compute(*key)
        return self.known[key]

    def _compute(self, ours: Arrays, theirs: Arrays, kind: str | None) -> bool:
        wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in theirs}
        # A view of one number: nothing of the size of the model is made.
        arrays = {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape, dtype in ours}
        try:
            found = translate(arrays, self.origin, self.goal, wanted, Said(kind))
        except (ValueError, TypeError):
            return False
        return found.keys() == wanted.keys() and all(
            value.shape == wanted[name].shape and is_float(value.dtype) == is_float(wanted[name].dtype)
            for name, value in found.items()
        )

    def has_kernel(self, path: Path) -> bool:
        """Say whether a layer of the source multiplies, rather than normalizes."""
        return any(len(shape) > 1 for _, shape, _ in self.ours[path])


def find_groups(fits: Fits, given: Sequence[Path], wanted: Sequence[Path]) -> list[Group]:
    """Part the layers into groups of which any may be any."""
    groups: list[Group] = []
    left, free = list(given), list(wanted)
    for kind in _KINDS:  # a layer is of a special kind only if it fits nothing else
        for path in list(left):
            if targets := [target for target in free if fits(path, target, kind)]:
                left.remove(path)
                group = Group([path], targets, {path: fits.said.get(path, kind)})
                for other in [other for other in groups if set(other.targets) & set(targets)]:
                    groups.remove(other)
                    group = other.join(group)
                groups.append(group)
        free = [path for path in free if not any(path in group.targets for group in groups)]
    for group in groups:
        group.sources.sort(key=given.index)
        group.targets.sort(key=wanted.index)
    return groups


class Search:
    """The search for pairs: what is certain first, and by what it teaches a guess for the others."""

    def __init__(self, fits: Fits, flow: Flow, given: Sequence[Path], trusted: bool) -> None:
        self.fits, self.flow, self.given, self.trusted = fits, flow, given, trusted

    def match(self, groups: Sequence[Group]) -> tuple[Match, ...]:
        """Return what each layer of the source may be, in their order."""
        fits = self.fits
        arrays = {path: name_few(f"{name} {shape}" for name, shape, _ in fits.ours[path]) for path in self.given}
        found = {path: self._write(path, None, False, f"fits no layer: {arrays[path]}") for path in self.given}
        certain: dict[Path, Path] = {}
        wrapper = find_wrapper(self.given, fits.theirs.__contains__)
        same = {path: path[len(wrapper) :] for path in self.given}
        if {*same.values()} == fits.theirs.keys() and all(fits(path, target) for path, target in same.items()):
            reason = f"same paths under {fits.origin.spell(wrapper)!r}" if wrapper else "same paths"
            return tuple(self._write(path, target, True, reason, fits.said.get(path)) for path, target in same.items())
        parts = [(group, part) for group in groups for part in self._part(group)]
        contrary = self._find_contrary([part for _, part in parts])
        open_parts: list[tuple[Group, Group, str]] = []
        for group, part in parts:
            (path, *_), size = part.sources, len(group.sources)
            if part.is_pair and (size == 1 or self.fits.has_kernel(path) not in contrary):
                reason = "shapes" if size == 1 else f"order, of {size} such layers"
                certain[path] = part.targets[0]
                found[path] = self._write(path, certain[path], True, reason, group.kinds[path])
            else:
                whole = group if part.is_pair else part  # its order is worth nothing
                if not any(whole is other for _, other, _ in open_parts):
                    open_parts.append((group, whole, self._explain(group, part)))
        taught = _Lessons(certain.items())
        for group, part, reason in open_parts:
            guesses = taught.guess(part, self.fits, group.kinds)
            for path in part.sources:
                rivals = [target for target in part.targets if target != guesses.get(path)]
                found[path] = self._write(path, guesses.get(path), False, reason, group.kinds[path], rivals)
        return tuple(found.values())

    def _write(
        self,
        source: Path,
        target: Path | None,
        certain: bool,
        reason: str,
        kind: str | None = None,
        rivals: Iterable[Path] = (),
    ) -> Match:
        """Write the paths as the libraries do."""
        spell = self.fits.goal.spell
        written = None if target is None else spell(target)
        return Match(self.fits.origin.spell(source), written, certain, reason, tuple(map(spell, rivals)), kind)

    def _part(self, group: Group) -> list[Group]:
        """Part a group where all layers before come before all layers after it, however the data walk."""
        size = len(group.sources)
        if size != len(group.targets) or not self.trusted or not group.is_alike(self.fits):
            return [group]
        precedes = self.flow.precedes
        cuts = [
            i
            for i in range(1, size)
            if all(precedes(first, second) for first in group.targets[:i] for second in group.targets[i:])
        ]
        ends = [0, *cuts, size]
        return [Group(group.sources[a:b], group.targets[a:b], group.kinds) for a, b in pairwise(ends)]

    def _find_contrary(self, parts: Iterable[Group]) -> set[bool]:
        """Return the kinds of layers, with a kernel or without, of which the source is in no order of the call."""
        pairs = sorted(
            ((part.sources[0], part.targets[0]) for part in parts if part.is_pair),
            key=lambda pair: self.given.index(pair[0]),
        )
        has = {source: self.fits.has_kernel(source) for source, _ in pairs}
        return {
            has[source]
            for i, (source, target) in enumerate(pairs)
            for later, other in pairs[i + 1 :]
            if has[source] == has[later] and self.flow.precedes(other, target)
        }

    def _explain(self, group: Group, part: Group) -> str:
        if len(group.sources) != len(group.targets):
            return f"{len(group.sources)} such layers here, {len(group.targets)} there"
        if not self.flow.order:
            return "no call says what comes first"
        if not self.trusted:
            return "the source is sorted"
        return "the source is in another order than the call" if part.is_pair else "beside one another"


class _Lessons:
    """What pairs that are certain teach: which parts of names go together."""

    def __init__(self, pairs: Iterable[tuple[Path, Path]]) -> None:
        self.both, self.ours, self.theirs = Counter[tuple[str, str]](), Counter[str](), Counter[str]()
        for source, target in pairs:
            ours, theirs = _find_tokens(source), _find_tokens(target)
            self.ours.update(ours)
            self.theirs.update(theirs)
            self.both.update((a, b) for a in ours for b in theirs)

    def rate(self, source: Path, target: Path) -> float:
        """Say how well two names go together."""
        ours, theirs = _find_tokens(source), _find_tokens(target)
        known = sum(
            self.both[a, b] / (self.ours[a] + self.theirs[b] - self.both[a, b])
            for a in ours
            for b in theirs
            if (a, b) in self.both
        )
        return known + len(ours & theirs) / len(ours | theirs)

    def guess(self, part: Group, fits: Fits, kinds: Mapping[Path, str | None]) -> dict[Path, Path]:
        """Pair the layers of a group, those that go together best first; the order decides between equals."""
        rated = sorted(
            (
                (-self.rate(source, target) - (i == j), abs(i - j), source, target)
                for i, source in enumerate(part.sources)
                for j, target in enumerate(part.targets)
                if fits(source, target, kinds[source])
            ),
            key=lambda rate: rate[:2],
        )
        found: dict[Path, Path] = {}
        taken: set[Path] = set()
        for *_, source, target in rated:
            if source not in found and target not in taken:
                found[source] = target
                taken.add(target)
        return found


def _find_tokens(path: Path) -> frozenset[str]:
    """Return the parts of a name, alone and two by two: ``conv2_block1_0_bn`` has ``block1`` and ``0_bn``."""
    parts = [part for part in re.split(r"[^0-9a-z]+", "/".join(path).lower()) if part]
    return frozenset((*parts, *map("_".join, pairwise(parts))))
