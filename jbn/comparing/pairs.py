"""Which call of one model is which call of the other: by name, or by what the layers take and return."""

import re
from collections.abc import Iterator

import numpy as np

from jbn.comparing.record import Call, Record
from jbn.converting.names import Names, rename
from jbn.converting.trees import Array, Path
from jbn.paths import count_of, name_few

Pair = tuple[str, str]

# As many numbers of each array say how near two arrays are when partners are looked for.
_SAMPLE = 2048
# What speaks for a pair, in the order of its weight: equal values, equal inputs, the same name, the same class, the
# same shape. Values decide while they agree; where the models have parted, names, classes and the order do.
_VALUES, _INPUTS, _NAME, _KIND, _SHAPE = 2.0, 0.5, 0.3, 0.15, 0.05
# Sampled errors below it speak for a pair, the more the smaller they are; 1e-8 is full agreement.
_NEAREST = 1e-8
_ALIASES = {"linear": "dense", "batchnormalization": "batchnorm"}


def find_pairs(a: Record, b: Record, names: Names | None) -> list[Pair]:
    """Pair the calls of two models, in the order of the first."""
    if names is not None:
        return _pair_by_names(a, b, names)
    paths_a, paths_b = list(a), list(b)
    scores = np.array([[_score(i, a[i], j, b[j]) for j in paths_b] for i in paths_a]).reshape(len(a), len(b))
    pairs = dict(_align(scores))
    # Branches that the models go through in another order are found by their values.
    free = [j for j in range(len(b)) if j not in pairs.values()]
    for i in range(len(a)):
        best = max(free, key=lambda j: scores[i, j], default=None)
        if i not in pairs and best is not None and scores[i, best] > _VALUES / 2:
            pairs[i] = best
            free.remove(best)
    return [(paths_a[i], paths_b[j]) for i, j in sorted(pairs.items())]


def lay_out(x: Array, y: Array) -> Iterator[Array]:
    """Yield y as it is and with features last or first, each if it has the shape of x."""
    views = [y, np.moveaxis(y, 1, -1), np.moveaxis(y, -1, 1)] if y.ndim > 2 else [y]
    yield from (view for view in views if view.shape == x.shape)


def nearest_layout(x: Array, y: Array) -> Array | None:
    """Return y in the layout in which it is nearest to x, or None where no layout has the shape of x."""
    return min(lay_out(x, y), key=lambda view: _sample_error(x, view), default=None)


def _score(path_a: str, a: Call, path_b: str, b: Call) -> float:
    """Say how much speaks for a pair; nothing where neither shapes nor classes nor names agree."""
    values = _closeness(a.outputs, b.outputs)
    name = _NAME if _spell(path_a) == _spell(path_b) else 0.0
    kind = _KIND if a.kind and _spell_kind(a.kind) == _spell_kind(b.kind) else 0.0
    known = name + kind
    # A layer that takes what another takes is not it: an activation takes what the convolution after it would.
    inputs = _closeness(a.inputs, b.inputs) if known else None
    if values is None:
        return known + _INPUTS * (inputs or 0) if known else 0.0
    return _VALUES * values + _INPUTS * (inputs or 0) + known + _SHAPE


def _closeness(a: tuple[Array, ...], b: tuple[Array, ...]) -> float | None:
    """Return 1 for equal arrays, 0 for arrays that are farther apart than their size, None for other shapes."""
    if len(a) != len(b) or not a:
        return None
    errors = []
    for x, y in zip(a, b, strict=True):
        view = nearest_layout(x, y)
        if view is None:
            return None
        errors.append(_sample_error(x, view))
    return float(min(1.0, max(0.0, np.log10(max(*errors, _NEAREST)) / np.log10(_NEAREST))))


def _sample_error(x: Array, y: Array) -> float:
    """Return the relative error in L2 of a sample of two arrays; inf is far, and so is NaN."""
    rng = np.random.default_rng(0)
    at = tuple(rng.integers(0, n, _SAMPLE) for n in x.shape) if x.size > _SAMPLE else ...
    with np.errstate(all="ignore"):
        left, right = (np.asarray(v[at], np.float64) for v in (x, y))
        norm = np.sqrt((left**2).sum())
        error = np.sqrt(((left - right) ** 2).sum()) / norm if norm else float(np.any(right))
    return float(error) if np.isfinite(error) else np.inf


def _align(scores: Array) -> Iterator[tuple[int, int]]:
    """Yield the pairs, in order on both sides, whose scores have the largest sum; from the last to the first."""
    n, m = scores.shape
    best = np.zeros((n + 1, m + 1))
    for i in range(n):
        for j in range(m):
            best[i + 1, j + 1] = max(best[i, j] + scores[i, j], best[i, j + 1], best[i + 1, j])
    i, j = n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            yield i, j


class _Paths:
    """The paths of a record, with slashes or points between their keys."""

    def __init__(self, record: Record) -> None:
        self.known = {self.split(path): path for path in record}
        self.spell = self.known.__getitem__

    def split(self, path: str) -> Path:
        """Read a path."""
        return tuple(_spell(path).split("/")) if path else ()


def _pair_by_names(a: Record, b: Record, names: Names) -> list[Pair]:
    """Pair calls by what ``names`` makes of the paths of a."""
    ours, theirs = _Paths(a), _Paths(b)
    renamed = rename(names, ours, theirs, list(ours.known))
    pairs = [(ours.known[old], theirs.known[new]) for old, new in renamed.items() if new in theirs.known]
    if not pairs:
        raise ValueError(
            f"names pairs none of the {count_of(len(a), 'call of a')} ({name_few(map(repr, a))}) with one of the "
            f"{len(b)} of b "
            f"({name_few(map(repr, b))}); expected paths of a to paths of b."
        )
    return pairs


def _spell(path: str) -> str:
    """Write a path with slashes: PyTorch writes points."""
    return path.replace(".", "/")


def _spell_kind(kind: str) -> str:
    """Write the class of a layer as other libraries would."""
    plain = re.sub(r"_|\d+d?|[Tt]imm", "", kind.removeprefix("_")).lower()
    return _ALIASES.get(plain, plain)
