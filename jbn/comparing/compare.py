"""``compare``: the first layer at which two models part by more than rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import TextWrapper
from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn.comparing.explain import explain, is_activation, relative
from jbn.comparing.pairs import Pair, find_pairs, nearest_layout
from jbn.comparing.record import Call, Record
from jbn.converting.names import Names
from jbn.converting.trees import AnyArray, Array, as_numpy
from jbn.paths import count_of, name_few

# Half an ulp is rounded at each operation. An output is rounded a few times to its own dtype, and sums are in float32
# or wider: of n terms they are off by a random walk of √n roundings, and no layer sums many more than 64² = 4096.
_ROUNDINGS, _SUMS = 8, 64
# What the errors before a layer may grow by in it, of whatever is between two calls. A layer that is well-conditioned
# changes the relative error by a factor near one; in deep networks with batch normalization by 1.2 in the mean.
_GROWTH = 8
# A normalization divides by no less than the root of its epsilon.
_EPSILON = 1e-5
# A table is as wide as a terminal at least is: of longer paths it shows the ends.
_COLUMNS = 80


@dataclass(frozen=True)
class ComparedLayer:
    """A layer of one model and the same layer of another.

    Attributes:
        paths: its path in a and its path in b.
        shape: that of its output in a.
        error: ‖a - b‖ / ‖a‖ of its output, in L2, b laid out as a is; inf for another shape, and for NaN in one alone.
        rounding: as large as it may be by rounding.
        input_error: the same of what it took; NaN where that has another number, shape or layout.
    """

    paths: tuple[str, str]
    shape: tuple[int, ...]
    error: float
    rounding: float
    input_error: float

    @property
    def parts(self) -> bool:
        """Whether the outputs differ by more than rounding."""
        return not self.error <= self.rounding


@dataclass(frozen=True, repr=False)
class Comparison:
    """What ``jbn.compare`` found; printed, it is a table and a sentence.

    Attributes:
        matches: the layers that both models have, in the order of the first.
        alone: paths of layers without a partner, of the first model and of the second.
        first: the first match that parts, or None.
        message: what the numbers say about it.
    """

    matches: tuple[ComparedLayer, ...]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    first: ComparedLayer | None
    message: str

    def lines(self) -> Iterator[tuple[str, ...]]:
        """Yield the lines of the table, five cells each: paths, shape of a, error, rounding."""
        yield "a", "b", "shape", "error", "rounding"
        for match in self.matches:
            mark = " <- first" if match is self.first else ""
            paths = (path or "(model)" for path in match.paths)
            shape = "x".join(map(str, match.shape))
            yield *paths, shape, f"{match.error:.1e}", f"{match.rounding:.1e}{mark}"

    def __repr__(self) -> str:
        cells = list(self.lines())
        a, b, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
        room = _COLUMNS - sum(2 + width for width in others) - 2
        widths = min(a, max(room - b, room // 2)), min(b, max(room - a, room // 2)), *others
        table = ["  ".join(map(_end, line, widths)).rstrip() for line in cells]
        text = [
            f"without a partner, {name}: {name_few((path or '(model)' for path in paths), most=8)}"
            for name, paths in zip("ab", self.alone, strict=True)
            if paths
        ]
        wrap = TextWrapper(_COLUMNS, break_long_words=False, break_on_hyphens=False).wrap
        return "\n".join([*table, *(line for part in (*text, self.message) for line in wrap(part))])


def compare(
    a: Record | Mapping[str, AnyArray],
    b: Record | Mapping[str, AnyArray],
    *,
    names: Names | None = None,
    tolerance: float | None = None,
) -> Comparison:
    r"""Say where two models part that were given the same input: at which layer first, and in what way.

    Layers are paired by what they return, up to the layout (features first or last), in the order of the calls; where
    the models have parted, by path, class and order. A layer parts where :math:`\|a - b\|` is more than both

    .. math::
        (8 u + 64 u_{32})\,\|a\| \quad\text{and}\quad
        8\,\max_{\text{before}} \frac{\|a - b\|}{\|a - \bar a\|}\; \|a - \bar a\|

    with u the unit roundoff of the coarser of the two dtypes, u₃₂ that of float32, or of float64 where both have that,
    and ā the mean of each channel. So errors that grow from layer to layer are rounding, and a jump is not: a far mean
    costs digits where the numbers are held, not where a normalization takes the mean away. What a layer took counts
    too, channel by channel, as a normalization would see it. A layer that parts, but whose output the layers that take
    it make equal again, is not the first that parts: ``fold`` moves what a norm does into the layer beside it. Neither
    is one after which both go on with the same: an activation that is a function in one model and part of the norm in
    the other. Where the models themselves return the same, nothing parts.

    Args:
        a: what ``jbn.linen.record``, ``jbn.nnx.record`` or ``jbn.record`` returned; or outputs by path, arrays of any
            kind, in the order of the layers; complex ones are compared as their real and imaginary parts.
        b: the same of the other model, with the same input and weights.
        names: paths in a to paths in b, as in ``jbn.convert``: a mapping with ``*`` for any part of a key and None for
            what is left out, or a function of a path.
        tolerance: the relative error that one layer may add, instead of that of the dtype: where the device multiplies
            in another precision than the arrays have. On a TPU run both in
            ``jax.default_matmul_precision("highest")`` rather.

    Returns:
        ``Comparison(matches, alone, first, message)``; ``print`` shows it as a table. ``first`` is None where the
        models part nowhere.

    Raises:
        ValueError: for records or ``names`` that pair no layers.
        TypeError: for arguments of other kinds.

    >>> import jbn, numpy as np
    >>> x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    >>> print(jbn.compare({"norm": x, "act": np.maximum(x, 0), "out": 2 * x}, {"norm": x, "act": x, "out": 2 * x}))
    a     b     shape  error    rounding
    norm  norm  8x4    0.0e+00  4.3e-06
    act   act   8x4    1.4e+00  4.3e-06 <- first
    out   out   8x4    0.0e+00  4.3e-06
    The models part at act (a) and act (b), whose inputs are not known: a equals
    relu(b): b lacks an activation.
    """
    first, second = _read("a", a), _read("b", b)
    if tolerance is not None and not isinstance(tolerance, int | float | np.number):
        raise TypeError(f"tolerance is of type {type(tolerance).__name__}; expected a number between 0 and 1, or None.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}; expected a relative error between 0 and 1, such as 2**-8.")
    pairs = find_pairs(first, second, names)
    if not pairs:
        raise ValueError(
            f"The {count_of(len(first), 'call of a')} and the {len(second)} of b have nothing in common, neither "
            "shapes nor classes nor paths; expected records of two models, given the same input."
        )
    matches, before = list[ComparedLayer](), 0.0
    previous: Call | None = None
    known = list[tuple[Call | None, float]]()  # what the explanation of a match needs
    for i, j in pairs:
        match, seen = _match((i, j), first[i], second[j], before, tolerance)
        matches.append(match)
        known.append((previous, before))
        if not match.parts:
            previous, before = first[i], max(before, seen)
    parting = _find_parting(matches, first, second, [error for _, error in known], tolerance)
    partners = [{pair[k] for pair in pairs} for k in range(2)]
    alone = tuple(p for p in first if p not in partners[0]), tuple(p for p in second if p not in partners[1])
    if parting:
        match, (i, j) = matches[parting[0]], matches[parting[0]].paths
        message = _explain(match, first[i], second[j], *known[parting[0]], tolerance)
        return Comparison(tuple(matches), alone, match, message)
    meet = sum(match.parts for match in matches)
    meet_again = f", {meet} of them meet again" * bool(meet)
    message = f"The models part nowhere: {count_of(len(matches), 'layer')} within rounding{meet_again}."
    alike = (match.paths[0] for match in matches if not match.parts)
    broken = [path for path in alike if not all(np.isfinite(x).all() for x in first[path].outputs)]
    if broken:
        message += f" Values of {name_few(broken)} are NaN or inf in both, and say nothing: look there first."
    return Comparison(tuple(matches), alone, None, message)


def _end(cell: str, width: int) -> str:
    """Pad a cell, or leave out its beginning: a path is known by its end."""
    return cell.ljust(width) if len(cell) <= width else f"..{cell[len(cell) - width + 2 :]}"


def _read(name: str, record: Any) -> Record:
    if not isinstance(record, Mapping) or not record:
        raise TypeError(
            f"{name} is {'empty' if isinstance(record, Mapping) else 'of type ' + type(record).__name__}; expected "
            "what jbn.linen.record, jbn.nnx.record or jbn.record returns, or outputs by path."
        )
    if other := [path for path in record if not isinstance(path, str)]:
        raise TypeError(f"{name} has the path {other[0]!r}; expected text, such as 'layers/0'.")
    calls = {path: _read_call(f"{name}[{path!r}]", call) for path, call in record.items()}
    return {path: Call(call.kind, _part(call.inputs), _part(call.outputs)) for path, call in calls.items()}


def _read_call(name: str, call: Any) -> Call:
    try:
        return call if isinstance(call, Call) else Call("", (), (as_numpy(call),))
    except TypeError as error:
        raise TypeError(f"{name} {error}") from error


def _part(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Part complex arrays into real and imaginary numbers, along a last axis: errors are those of real ones."""
    return tuple(np.stack([a.real, a.imag], -1) if np.iscomplexobj(a) else a for a in arrays)


def _find_parting(
    matches: list[ComparedLayer], a: Record, b: Record, known: list[float], tolerance: float | None
) -> list[int]:
    """Return which matches part, without those of which all that take what they return make it equal again.

    What takes a match may part too, if it is made good itself: a layer between two norms does the work of both. And
    where models are cut into layers at other places, an activation that one calls after a norm is part of the other's
    norm: what comes next takes the same in both, though in one of them nothing takes what the norm returned.
    """
    calls = [(a[match.paths[0]], b[match.paths[1]]) for match in matches]
    if not any(match.parts for match in matches):
        return []
    outputs, inputs = (
        [tuple({*map(_fingerprint, getattr(call, what))} for call in pair) for pair in calls]
        for what in ("outputs", "inputs")
    )

    def is_inside_of_equals(i: int, later: list[int]) -> bool:
        """Say whether a layer that a match is called in, or the model, returns the same in both, for all that it is."""
        outer = [calls[j] for j in later if _contains(matches[j], matches[i])]
        outer += [(a[""], b[""])] if "" in a and "" in b else []
        meetings = (_Meeting.of(x.outputs, y.outputs, tolerance) for x, y in outer)
        # Half the digits of what tells examples apart must be there too: an output that hardly does says nothing.
        return any(g and g.error <= g.rounding(known[i]) and g.seen <= g.own**0.5 for g in meetings)

    def goes_on_equal(i: int, later: list[int]) -> bool:
        """Say whether what comes after a match takes the same in both models."""
        followers = [j for j in later if any(map(set.intersection, outputs[i], inputs[j]))]
        # A norm that takes the shortcut too is cut elsewhere itself, and says nothing of what comes before it.
        followers = [j for j in followers if len(calls[j][0].inputs) == len(calls[j][1].inputs)]
        if followers:
            return all(_take_the_same(*calls[j], known[j], tolerance) for j in followers)
        if not _is_activation(*calls[i], known[i], tolerance):
            return False
        # What is pooled has no link to either; what was there before the match, another branch, is none of its doing.
        old = [set().union(*(x[k] for x in (*outputs, *inputs[: i + 1]))) for k in range(2)]
        fresh = next((j for j in later if all(map(set.difference, inputs[j], old))), None)
        return fresh is not None and _take_the_same(*calls[fresh], known[fresh], tolerance)

    parting = list[int]()
    for i in reversed([i for i, match in enumerate(matches) if match.parts]):
        later = list(range(i + 1, len(matches)))
        takers = [j for j in later if all(map(set.intersection, outputs[i], inputs[j]))]
        good = not {*takers} & {*parting} if takers else goes_on_equal(i, later)
        if not good and not is_inside_of_equals(i, later):
            parting.insert(0, i)
    return parting


def _contains(outer: ComparedLayer, inner: ComparedLayer) -> bool:
    """Say whether a layer of either model is called inside of another."""
    paths = ((x.replace(".", "/"), y.replace(".", "/")) for x, y in zip(outer.paths, inner.paths, strict=True))
    return any(x != y and (not x or y.startswith(f"{x}/")) for x, y in paths)


def _take_the_same(a: Call, b: Call, before: float, tolerance: float | None) -> bool:
    """Say whether layers take the same values, in any order: another order is no doing of the layer before."""
    taken = _Meeting.of(a.inputs, b.inputs, tolerance)
    if not taken or taken.error > taken.rounding(before):
        taken = _Meeting.of(_sort_inputs(a), _sort_inputs(b), tolerance)
    return bool(taken and taken.error <= taken.rounding(before))


def _sort_inputs(call: Call) -> tuple[Array, ...]:
    return tuple(x.ravel()[np.argsort(np.asarray(x, np.float64), None)] for x in call.inputs)


def _is_activation(a: Call, b: Call, before: float, tolerance: float | None) -> bool:
    """Say whether what one layer returns is an activation of what the other does."""
    given = _Meeting.of(a.outputs, b.outputs, tolerance)
    return given is not None and all(is_activation(x, y, given.rounding(before)) for x, y in given.arrays)


def _fingerprint(x: Array) -> int:
    """Return a number that is the same for the same values in another order: arrays are transposed on the way."""
    with np.errstate(over="ignore"):
        bits = (np.asarray(x, np.float64) + 0.0).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return int(((bits ^ (bits >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)).sum())


def _match(pair: Pair, a: Call, b: Call, before: float, tolerance: float | None) -> tuple[ComparedLayer, float]:
    """Compare two layers; the second value is the error that later layers may build on."""
    taken, given = _Meeting.of(a.inputs, b.inputs, tolerance), _Meeting.of(a.outputs, b.outputs, tolerance)
    shape, input_error = a.outputs[0].shape, taken.error if taken else np.nan
    if given is None:
        return ComparedLayer(pair, shape, np.inf, 0.0, input_error), 0.0
    if taken and taken.error <= taken.rounding(before):
        return ComparedLayer(
            pair, shape, given.error, given.rounding(max(before, taken.per_channel)), input_error
        ), given.seen
    return ComparedLayer(pair, shape, given.error, given.rounding(before), input_error), given.seen


@dataclass(frozen=True)
class _Meeting:
    """Arrays of two layers, in float64 and in the layout of the first.

    Attributes:
        arrays: the pairs.
        own: the relative error that one layer may add.
        error: the largest relative error in L2.
        deviation: ‖a - mean of its channel‖ / ‖a‖ where that error is.
        seen: the error in such deviations.
        per_channel: the same as a normalization would see it, that of each channel in deviations of that channel.
    """

    arrays: tuple[tuple[Array, Array], ...]
    own: float
    error: float
    deviation: float
    seen: float
    per_channel: float

    @classmethod
    def of(cls, a: tuple[Array, ...], b: tuple[Array, ...], tolerance: float | None) -> _Meeting | None:
        """Compare arrays; None where there are none, or of other shapes."""
        views = [nearest_layout(x, y) for x, y in zip(a, b, strict=False)]
        if not a or len(a) != len(b) or any(view is None for view in views):
            return None
        wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(a, views, strict=True)]
        own = _own_rounding(a + b) if tolerance is None else tolerance
        found = [_measure(x, y) for x, y in wide]
        return cls(tuple(wide), own, *max(found)[:2], max(seen for _, _, seen, _ in found), max(c for *_, c in found))

    def rounding(self, before: float) -> float:
        """Return the relative error that is rounding, where that before is ``before`` in deviations."""
        return max(self.own, _GROWTH * before * self.deviation)


def _own_rounding(arrays: tuple[Array, ...]) -> float:
    """Return the relative error that one layer adds in the coarsest dtype of these."""
    units = [float(jnp.finfo(x.dtype).eps) / 2 for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    coarsest = max(units, default=0.0)
    return _ROUNDINGS * coarsest + _SUMS * min(coarsest, 2.0**-24)


def _measure(x: Array, y: Array) -> tuple[float, float, float, float]:
    """Return the error, the deviation, the error in deviations, and the same channel by channel."""
    bad = ~np.isfinite(x)
    if not np.array_equal(np.where(bad, x, 0), np.where(np.isfinite(y), 0, y), equal_nan=True):
        return np.inf, 1.0, 0.0, 0.0
    x, y = np.where(bad, 0, x), np.where(bad, 0, y)
    error, norm = relative(x, y), np.sqrt((x**2).sum())
    deviation, per_channel = 1.0, 0.0
    for axis in {x.ndim - 1, min(1, x.ndim - 1)} if x.ndim > 1 else ():  # features are last, or second
        rows = tuple(i for i in range(x.ndim) if i != axis)
        var, off = x.var(rows), ((x - y) ** 2).mean(rows)
        per_channel = max(per_channel, np.sqrt((off / (var + _EPSILON)).mean()))
        deviation = min(deviation, np.sqrt(var.sum() * (x.size // x.shape[axis])) / norm if norm else 1.0)
    return error, deviation, error / deviation if deviation > 2.0**-53 else error, per_channel


def _explain(
    match: ComparedLayer, a: Call, b: Call, previous: Call | None, before: float, tolerance: float | None
) -> str:
    """Say in a sentence where a match parts, and what the numbers there say."""
    where = f"{match.paths[0] or 'the model'} (a) and {match.paths[1] or 'the model'} (b)"
    taken, given = _Meeting.of(a.inputs, b.inputs, tolerance), _Meeting.of(a.outputs, b.outputs, tolerance)
    if taken and taken.error > taken.rounding(before):
        base = tuple(np.asarray(x, np.float64) for x in previous.outputs) if previous else ()
        found = _look(taken, base, before)
        origin = "after the layers before it" if previous else "from the first layer on: is the input the same?"
        return f"The models part before {where}: what these take differs {origin}{found}."
    if a.inputs and b.inputs and taken is None:
        shapes = " and ".join(str([x.shape for x in call.inputs]) for call in (a, b))
        return f"The models part before {where}: what these take has other shapes, {shapes}."
    known = "whose inputs agree" if taken else "whose inputs are not known"
    if given is None:
        shapes = " and ".join(str([x.shape for x in call.outputs]) for call in (a, b))
        return f"The models part at {where}, {known}: what they return has other shapes, {shapes}: stride or padding."
    base = tuple(x for x, _ in taken.arrays) if taken else ()
    return f"The models part at {where}, {known}{_look(given, base, before)}."


def _look(meeting: _Meeting, base: tuple[Array, ...], before: float) -> str:
    """Return the first explanation that holds of the arrays that differ, after a colon."""
    allowed = meeting.rounding(before)
    for x, y in meeting.arrays:
        if not relative(x, y) <= allowed and (found := explain(x, y, allowed, base)):
            return f": {found}"
    return ": nothing simple is seen in the numbers, such as an activation, a border or other statistics"
