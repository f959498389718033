"""``propose_names``: which layer of one model is which of another, by shapes, order and names, for somebody to read."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jbn.arguments import refuse
from jbn.converting.convert import Library, read_by_path, read_dialect, read_layers, unpack
from jbn.converting.dialects import KINDS
from jbn.converting.flow import Flow, trace_flow
from jbn.converting.pairing import Arrays, Fits, Match, Search, find_groups
from jbn.converting.trees import LibraryTree, Path, dtype_of, index_shapes
from jbn.paths import ArrayTree, count_of, name_few


@dataclass(frozen=True)
class Proposal:
    """What ``propose_names`` found; its text is a table, and Python: the ``names`` and ``kinds`` of ``convert``.

    Attributes:
        matches: a line for each layer of the source, in its order.
        lacking: the layers of the target that nothing is for.
    """

    matches: tuple[Match, ...]
    lacking: tuple[str, ...]

    @property
    def certain(self) -> tuple[Match, ...]:
        """Those of which nothing else is possible."""
        return tuple(match for match in self.matches if match.certain)

    @property
    def ambiguous(self) -> tuple[Match, ...]:
        """Those that may be another layer too; ``target`` is the best guess."""
        return tuple(match for match in self.matches if not match.certain and (match.target or match.rivals))

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The layers of the source that fit no layer of the target."""
        return tuple(match.source for match in self.matches if match.target is None and not match.rivals)

    @property
    def names(self) -> dict[str, str | None]:
        """The guesses for ``convert(names=...)``; what is left over is left out. A layer inside of one comes first."""
        inside = {match: sum(_is_under(match.source, other.source) for other in self.matches) for match in self.matches}
        return {match.source: match.target for match in sorted(self.matches, key=lambda match: -inside[match])}

    @property
    def kinds(self) -> dict[str, str]:
        """What ``convert(kinds=...)`` is to be told."""
        return {match.source: match.kind for match in self.matches if match.kind}

    def __repr__(self) -> str:
        known = {match.source: match for match in self.matches}
        cells = [(f"    {old!r}: {new!r},", known[old]) for old, new in self.names.items()]
        width = max(len(cell) for cell, _ in cells)
        lines = [f"{cell:{width}}  # {_remark(match)}" for cell, match in cells]
        several = (
            f"{count_of(len(self.matches), 'layer')}: {len(self.certain)} certain, {len(self.ambiguous)} ambiguous"
        )
        ends = [f"# {several}, {len(self.unmatched)} without a match; {len(self.lacking)} lacking in the source"]
        if self.lacking:
            ends.append(f"# lacking: {', '.join(self.lacking)}")
        kinds = [f"kinds = {self.kinds!r}"] if self.kinds else []
        return "\n".join(["names = {", *lines, "}", *kinds, *ends])


def propose_names(
    tree: LibraryTree,
    source: Library,
    target: Library,
    *inputs: ArrayTree,
    like: LibraryTree,
    call: Callable[..., Any] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Proposal:
    """Propose the ``names`` of ``convert``: which layer of a model is which of the same model in another library.

    Nothing is converted. A pair is certain if its arrays fit no other layer; or, of layers that fit one another, if a
    traced call of the target comes to them one after the other, so that the order in the source decides; or if both
    models have the same paths. Layers beside one another, such as the last convolution of a residual block and that of
    its shortcut, are ambiguous; then the guess is what names and order suggest. All that is certain is so if both are
    one architecture and the source is in an order in which the data may walk, as the ``state_dict`` of nearly every
    PyTorch model is and the weights of a functional Keras model are. Where layers of one kind contradict that, or the
    source is merely sorted, order counts as a guess.

    Args:
        tree: what the source has, see ``convert``; shapes will do. Mappings are read in their own order.
        source: the library that ``tree`` comes from.
        target: the library that it is for.
        inputs: what ``call`` takes after ``like``, arrays or ``jax.ShapeDtypeStruct``.
        like: a tree of the target, of arrays or their shapes.
        call: a function of ``like`` and ``inputs`` that calls the target; it is traced, nothing is computed. Such as
            ``model.apply``, or for NNX ``lambda state, x: nnx.merge(graph, state)(x)``. Without it order decides
            nothing.
        kinds: see ``convert``. What shapes tell of them is proposed too; of transposed convolutions with as many
            channels in as out they tell nothing.

    Returns:
        A ``Proposal``: ``names`` and ``kinds`` for ``convert``, and what is certain and what is not.

    Raises:
        ValueError: for trees without arrays, and a call that takes no data.
        TypeError: for trees of another kind.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, jbn
    >>> model, x = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3), nn.relu, nn.Dense(2)]), jnp.ones((1, 3))
    >>> like = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> sizes = {"stem": 3, "body": 3, "head": 2}  # in order of definition
    >>> theirs = {f"{name}.weight": np.ones((size, 3)) for name, size in sizes.items()}
    >>> theirs |= {f"{name}.bias": np.ones(size) for name, size in sizes.items()}
    >>> jbn.propose_names(theirs, "torch", "linen", x, like=like, call=model.apply)
    names = {
        'stem': 'layers_0',  # certain: order, of 2 such layers
        'body': 'layers_2',  # certain: order, of 2 such layers
        'head': 'layers_4',  # certain: shapes
    }
    # 3 layers: 3 certain, 0 ambiguous, 0 without a match; 0 lacking in the source
    """
    origin, goal = read_dialect("source", source, False), read_dialect("target", target, False)
    (tree, known), (like, _) = unpack("tree", origin, tree), unpack("like", goal, like)
    ours = read_layers("tree", lambda tree: index_shapes(origin.addresses(tree), tree), _keep_order(tree))
    theirs = read_layers("like", lambda like: index_shapes(goal.addresses(like), like), _keep_order(like))
    said = read_by_path("kinds", kinds, origin, ours, KINDS.__contains__, f"one of {', '.join(map(repr, KINDS))}")
    if call is not None and not callable(call):
        raise refuse("call", call, "a function of like and inputs that calls the target, such as model.apply")
    flow = Flow() if call is None else trace_flow(call, like, goal.addresses(like), inputs)
    if call is not None and not flow.order:
        raise ValueError("call meets no data; expected those of the model in inputs, after source and target.")
    given, trusted = _sort(list(ours))
    wanted = [*flow.order, *(path for path in _sort(list(theirs))[0] if path not in flow.order)]
    fits = Fits(origin, goal, _read_arrays(ours), _read_arrays(theirs), {**known, **said})
    groups = find_groups(fits, given, wanted)
    matches = Search(fits, flow, given, trusted).match(groups)
    used = {match.target for match in matches}
    return Proposal(matches, tuple(name for name in map(goal.spell, wanted) if name not in used))


def _read_arrays(layers: Mapping[Path, Mapping[str, Any]]) -> dict[Path, Arrays]:
    return {
        path: tuple(sorted((name, tuple(leaf.shape), dtype_of(leaf)) for name, leaf in layer.items()))
        for path, layer in layers.items()
    }


def _keep_order(tree: Any) -> Any:
    """Return a tree of which jax does not sort the mappings."""
    if isinstance(tree, Mapping):
        return OrderedDict((key, _keep_order(value)) for key, value in tree.items())
    return tuple(map(_keep_order, tree)) if type(tree) is tuple else tree


def _sort(paths: list[Path]) -> tuple[list[Path], bool]:
    """Return paths in their order, and whether it may be that of definition; where they are sorted, by number."""
    if paths != sorted(paths):
        return paths, True
    parts = {path: [_split_number(part) for part in re.findall(r"\d+|[^\d]+", "/".join(path))] for path in paths}
    paths = sorted(paths, key=parts.__getitem__)
    first = (
        next(((a, b) for a, b in zip(parts[x], parts[y], strict=False) if a != b), None) for x, y in pairwise(paths)
    )
    return paths, all(pair is None or pair[0][0] == pair[1][0] == 0 for pair in first)


def _split_number(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdecimal() else (1, 0, part)


def _is_under(path: str, other: str) -> bool:
    """Say whether a layer is inside of another one."""
    return path != other and (not other or path.startswith((f"{other}/", f"{other}.")))


def _remark(match: Match) -> str:
    if match.certain:
        return f"certain: {match.reason}"
    if match.target is None and not match.rivals:
        return f"left out: {match.reason}"
    return f"AMBIGUOUS, {match.reason}" + f": or {name_few(map(repr, match.rivals))}" * bool(match.rivals)
