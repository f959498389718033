"""Which normalizations can be folded into which layers: read from a traced call in which both are marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jbn.arguments import is_several, refuse
from jbn.paths import Keys, flatten
from jbn.programs import find_inner, trace

Pair: TypeAlias = tuple[str, str]
"""The paths of a layer and of the norm that goes into it, in the order in which data pass them."""

_PREFIX = "jbn fold"
# Their bodies run more than once or not at all, with parameters that may be stacked.
_REPEATED = ("scan", "while", "cond")
# What a kernel goes into, and what may happen to it on the way.
_PRODUCTS = ("dot_general", "conv_general_dilated")
_AS_IT_IS = ("convert_element_type", "reshape", "transpose", "rev", "sharding_constraint", "copy")


@dataclass(frozen=True)
class Folds:
    """Which normalizations are folded into which layers, as paths such as ``block/bn1``.

    Attributes:
        pairs: (layer, norm) where the layer's output is normalized, (norm, layer) where its input is.
        kept: norms that stay as they are.
    """

    pairs: tuple[Pair, ...]
    kept: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Unpack as ``pairs, kept``."""
        return iter((self.pairs, self.kept))


@dataclass(frozen=True)
class Links:
    """What a traced call tells.

    Attributes:
        pairs: (a, b) where b is the only one that takes what a returns.
        norms: the paths of all norms.
    """

    pairs: tuple[Pair, ...]
    norms: tuple[str, ...]

    def choose(self, pairs: Sequence[Pair] | None) -> Folds:
        """Return the pairs that were asked for, or for each norm the layer before it and else the one after it."""
        given = self._propose() if pairs is None else _read_pairs(pairs)
        for pair in given:
            if pair not in self.pairs:
                linked = ", ".join(map(repr, [known for known in self.pairs if set(known) & set(pair)])) or "none"
                raise ValueError(
                    f"pairs has {pair!r}; expected (layer, norm) or (norm, layer), where the second alone takes what "
                    "the first returns, both are called once, nothing lies between, not even an activation, no zeros "
                    "are padded, and the kernel goes as it is into one product and nowhere else. Of those paths there "
                    f"is {linked}."
                )
        norms = Counter(path for pair in given for path in pair if path in self.norms)
        if twice := [path for path, number in norms.items() if number > 1]:
            raise ValueError(f"pairs has {', '.join(map(repr, twice))} more than once; expected each norm once.")
        return Folds(tuple(given), tuple(path for path in self.norms if path not in norms))  # type: ignore[arg-type]

    def _propose(self) -> list[Pair]:
        before = [pair for pair in self.pairs if pair[1] in self.norms]
        done = {norm for _, norm in before}
        return before + [pair for pair in self.pairs if pair[0] in self.norms and pair[0] not in done]


def _read_pairs(pairs: Any) -> list[Pair]:
    if not is_several(pairs):
        raise refuse("pairs", pairs, "a list of (layer, norm) or (norm, layer), such as those of foldable(...).pairs")
    several = list(pairs)
    for pair in several:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(path, str) for path in pair)):
            raise TypeError(
                f"pairs has {pair!r}; expected (layer, norm) or (norm, layer), two paths joined by '/', such as "
                "('block/conv', 'block/bn')."
            )
    return [(first, second) for first, second in several]


def mark(x: Array, role: Literal["in", "out"], path: str) -> Array:
    """Name what a layer or a norm takes or returns."""
    return checkpoint_name(x, f"{_PREFIX} {role} {path}")


def place_x_first(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a layer or a norm with x, which may have been given by name, as the first of them."""
    name = next((name for name in ("x", "inputs") if name in kwargs), None)
    if args or name is None:
        return args, kwargs
    return (kwargs[name],), {other: value for other, value in kwargs.items() if other != name}


def find_links(
    call: Callable[..., Any], args: Any, kwargs: Any, params: Any, *states: Any, norms: Sequence[str]
) -> Links:
    """Trace ``call(params, *states, *args, **kwargs)`` and find what is linked; only arrays and shapes are traced.

    Args:
        call: it marks what its layers take and return.
        args: positional arguments, arrays or ``jax.ShapeDtypeStruct`` or anything else.
        kwargs: keyword arguments, likewise.
        params: a tree in which the ``kernel`` and the ``bias`` of a layer are under its path.
        states: trees of arrays.
        norms: a list that ``call`` fills with the paths of norms.
    """

    def run(states: Any, args: Any, kwargs: Any) -> Any:
        return call(*states, *args, **kwargs)

    jaxpr, traced = trace(run, (params, *states), args, kwargs)
    seen = Counter[tuple[str, str]]()
    links = list(_find_pairs(jaxpr, seen))
    once = [pair for pair in links if all(seen[role, path] <= 1 for role in ("in", "out") for path in pair)]
    keys = flatten(params)[0]  # the leaves of params come first
    held = {keys[i]: var for i, var in zip(traced, jaxpr.invars, strict=True) if i < len(keys)}

    def folds(pair: Pair) -> bool:
        layers = [path for path in pair if path not in norms]
        return len(layers) == 1 and _multiplies_once(jaxpr, held, tuple(layers[0].split("/") if layers[0] else ()))

    return Links(tuple(pair for pair in once if folds(pair)), tuple(norms))


def _multiplies_once(jaxpr: Any, held: Mapping[Keys, Any], keys: Keys) -> bool:
    """Say whether nothing but one product takes the kernel of a layer, and nothing but one sum its bias.

    Otherwise it is masked or normalized before, or another layer has it too.
    """
    places = (*keys, "kernel"), (*keys, "bias")
    kernel, bias = ([*_find_takers(jaxpr, held[place])] if place in held else [] for place in places)
    return len(kernel) == 1 and kernel[0] in _PRODUCTS and len(bias) <= 1


def _find_takers(jaxpr: Any, var: Any) -> Iterator[str | int]:
    """Yield what operations take a value, cast or rearranged or not; where it is returned, its place."""
    for eqn in jaxpr.eqns:
        for place in (i for i, taken in enumerate(eqn.invars) if taken is var):
            body = next((inner for inner in find_inner(eqn) if len(inner.invars) == len(eqn.invars)), None)
            if body is not None:
                for taker in _find_takers(body, body.invars[place]):
                    yield from [taker] if isinstance(taker, str) else _find_takers(jaxpr, eqn.outvars[taker])
            elif eqn.primitive.name in _AS_IT_IS:
                yield from _find_takers(jaxpr, eqn.outvars[0])
            else:
                yield eqn.primitive.name
    yield from (i for i, returned in enumerate(jaxpr.outvars) if returned is var)


def _find_pairs(jaxpr: Any, seen: Counter[tuple[str, str]], times: int = 1) -> Iterator[Pair]:
    """Yield which marked value is taken under which mark, and by nothing else; count the marks."""
    uses = Counter(id(v) for eqn in jaxpr.eqns for v in eqn.invars) + Counter(map(id, jaxpr.outvars))
    made: dict[int, str] = {}
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name", ""))
        if eqn.primitive.name == "name" and name.startswith(_PREFIX):
            role, path = name.removeprefix(f"{_PREFIX} ").split(" ", 1)
            seen[role, path] += times
            (given,), (returned,) = eqn.invars, eqn.outvars
            if role == "out":
                made[id(returned)] = path
            elif id(given) in made and uses[id(given)] == 1:
                yield made[id(given)], path
        for body in find_inner(eqn):
            yield from _find_pairs(body, seen, times + (eqn.primitive.name in _REPEATED))
