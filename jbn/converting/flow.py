"""What follows what in a model: read from a traced call, by where the arrays of its layers meet data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jbn.converting.trees import Addresses, Path
from jbn.programs import find_inner, trace

# What a value is made of: the layers whose arrays are in it, as bits, and whether data are.
_Value = tuple[int, bool]

_REPEATED = ("while", "cond")  # whose bodies take other values than the operation itself


@dataclass(frozen=True)
class Flow:
    """What a traced call tells about layers.

    Attributes:
        order: the layers, in the order in which the call comes to them.
        before: for each of them all those whose results are in what it takes.
    """

    order: tuple[Path, ...] = ()
    before: Mapping[Path, frozenset[Path]] | None = None

    def precedes(self, first: Path, second: Path) -> bool:
        """Say whether a layer comes before another on every way, and not beside it or in a loop with it."""
        before = self.before or {}
        return first in before.get(second, ()) and second not in before.get(first, ())


def trace_flow(call: Callable[..., Any], tree: Any, addresses: Addresses, inputs: Sequence[Any]) -> Flow:
    """Trace ``call(tree, *inputs)`` and follow the arrays of its layers; arrays and shapes alone are traced."""
    program, traced = trace(call, tree, *inputs)
    paths = list(dict.fromkeys(address[0] for address in addresses if address))
    bits = {path: 1 << i for i, path in enumerate(paths)}
    held = dict(enumerate(bits.get(address[0], 0) if address else 0 for address in addresses))
    values = [(held.get(i, 0), i >= len(addresses)) for i in traced]
    met: dict[int, int] = {}  # a layer, and the layers before it; in the order of the call
    _follow(program, values, met)
    named = {1 << i: path for i, path in enumerate(paths)}
    before = {named[layer]: frozenset(named[other] for other in _each(others)) for layer, others in met.items()}
    return Flow(tuple(before), before)


def _follow(program: Any, values: Sequence[_Value], met: dict[int, int]) -> list[_Value]:
    """Follow values through a program, and note what the layers meet."""
    held = dict(zip(program.invars, values, strict=True))

    def read(var: Any) -> _Value:
        return (0, False) if hasattr(var, "val") else held.get(var, (0, False))

    for eqn in program.eqns:
        given = [read(var) for var in eqn.invars]
        body = next((inner for inner in find_inner(eqn) if _is_like(inner, eqn)), None)
        if body is None:
            results = [_meet(given, met)] * len(eqn.outvars)
        else:
            results = _follow(body, given, met)
            if eqn.primitive.name == "scan":  # what a step returns, the next one takes
                first = eqn.params["num_consts"]
                for i, (layers, data) in enumerate(results[: eqn.params["num_carry"]], first):
                    given[i] = given[i][0] | layers, given[i][1] or data
                results = _follow(body, given, met)
        held |= zip(eqn.outvars, results, strict=True)
    return [read(var) for var in program.outvars]


def _meet(given: Sequence[_Value], met: dict[int, int]) -> _Value:
    """Return what becomes of values in an operation: where arrays of a layer meet data, it takes these."""
    data = [layers for layers, is_data in given if is_data]
    told = _join(data)
    for layer in _each(_join(layers for layers, is_data in given if not is_data) if data else 0):
        met[layer] = (met.get(layer, 0) | told) & ~layer
    return _join(layers for layers, _ in given), bool(data)


def _join(several: Any) -> int:
    found = 0
    for layers in several:
        found |= layers
    return found


def _each(layers: int) -> Iterator[int]:
    while layers:
        yield layers & -layers
        layers &= layers - 1


def _is_like(inner: Any, eqn: Any) -> bool:
    same = len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars)
    return same and eqn.primitive.name not in _REPEATED
