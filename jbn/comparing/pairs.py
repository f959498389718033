"""Which call of one model is which call of the other: by name, or by what the layers take and return."""

import re
from collections.abc import Iterator, Sequence

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
    named = np.equal.outer([_spell(path) for path in a], [_spell(path) for path in b])
    scores = _score(list(a.values()), list(b.values()), named)
    pairs = dict(_align(scores))
    # Branches that the models go through in another order are found by their values, or by their names.
    free = np.where((scores > _VALUES / 2) | named, scores, 0)
    free[:, list(pairs.values())] = 0
    for i in range(len(a)):
        best = int(free[i].argmax())
        if i not in pairs and free[i, best]:
            pairs[i] = best
            free[:, best] = 0
    return [(paths_a[i], paths_b[j]) for i, j in sorted(pairs.items())]


def nearest_layout(x: Array, y: Array) -> Array | None:
    """Return y in the layout in which it is nearest to x, or None where no layout has the shape of x."""
    views = [view for view in _lay_out(y) if view.shape == x.shape]
    if len(views) < 2:
        return views[0] if views else None
    return min(views, key=lambda view: float(_errors(sample(x), sample(view))))


def _lay_out(y: Array) -> list[Array]:
    """Return y as it is, and with features last or first."""
    return [y, np.moveaxis(y, 1, -1), np.moveaxis(y, -1, 1)] if y.ndim > 2 else [y]


def _score(a: Sequence[Call], b: Sequence[Call], named: Array) -> Array:
    """Say how much speaks for each pair; nothing where neither shapes nor classes nor names agree."""
    kind = np.equal.outer([_spell_kind(call) or "a" for call in a], [_spell_kind(call) or "b" for call in b])
    known = _NAME * named + _KIND * kind
    values = _closeness([call.outputs for call in a], [call.outputs for call in b])
    # A layer that takes what another takes is not it: an activation takes what the convolution after it would.
    inputs = np.nan_to_num(_closeness([call.inputs for call in a], [call.inputs for call in b])) * (known > 0)
    return np.nan_to_num(_VALUES * values + _SHAPE) + _INPUTS * inputs + known


def _closeness(a: Sequence[tuple[Array, ...]], b: Sequence[tuple[Array, ...]]) -> Array:
    """Return 1 for equal arrays, 0 for arrays that are farther apart than their size, NaN for other shapes or none."""
    found = np.full((len(a), len(b)), np.nan)
    for number in {len(x) for x in a} & {len(y) for y in b} - {0}:
        rows, columns = ([i for i, x in enumerate(several) if len(x) == number] for several in (a, b))
        errors = [
            _compute_errors([a[i][place] for i in rows], [b[j][place] for j in columns]) for place in range(number)
        ]
        largest = np.maximum(np.max(errors, 0), _NEAREST)
        found[np.ix_(rows, columns)] = (np.log10(largest) / np.log10(_NEAREST)).clip(0, 1)
    return found


def _compute_errors(a: Sequence[Array], b: Sequence[Array]) -> Array:
    """Return the error of each array of b beside each of a, in the nearest layout; NaN where none has the shape.

    Each array is sampled once: of pairs there are many more.
    """
    found, views = np.full((len(a), len(b)), np.nan), dict[tuple[int, ...], list[tuple[int, Array]]]()
    for j, y in enumerate(b):
        for view in _lay_out(y):
            views.setdefault(view.shape, []).append((j, sample(view)))
    stacks = {shape: np.stack([numbers for _, numbers in same]) for shape, same in views.items()}
    for i, x in enumerate(a):
        if x.shape in stacks:
            np.fmin.at(found[i], [j for j, _ in views[x.shape]], _errors(sample(x), stacks[x.shape]))
    return found


def sample(x: Array) -> Array:
    """Return some numbers of an array, of arrays of one shape those at the same places."""
    rng = np.random.default_rng(0)
    at = tuple(rng.integers(0, n, _SAMPLE) for n in x.shape) if x.size > _SAMPLE else ...
    return np.asarray(x[at], np.float64).ravel()


def _errors(x: Array, several: Array) -> Array:
    """Return the relative errors in L2 of samples, the last axis, beside that of x; inf is far, and so is NaN."""
    with np.errstate(all="ignore"):
        norm, off = np.sqrt((x**2).sum()), np.sqrt(((several - x) ** 2).sum(-1))
        errors = off / norm if norm else np.sign(off)
    return np.where(np.isfinite(errors), errors, np.inf)


def _align(scores: Array) -> Iterator[tuple[int, int]]:
    """Yield the pairs, in order on both sides, whose scores have the largest sum; from the last to the first."""
    n, m = scores.shape
    best = np.zeros((n + 1, m + 1))
    for i in range(n):
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], best[i, :-1] + scores[i]))
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

    def spell(self, path: Path) -> str:
        """Write a path as the record does."""
        return self.known.get(path, "/".join(path))

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


def _spell_kind(call: Call) -> str:
    """Write the class of a layer as other libraries would."""
    plain = re.sub(r"_|\d+d?|[Tt]imm", "", call.kind.removeprefix("_")).lower()
    return _ALIASES.get(plain, plain)
