"""``convert``: the arrays of a layer or a model from the layout of one library into that of another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import isqrt
from numbers import Integral
from typing import Any, Literal, TypeAlias, TypeVar

import jax

from jbn.arguments import read_choice
from jbn.converting.dialects import DIALECTS, KINDS, Dialect, Said, translate
from jbn.converting.names import Names, check_keys, rename, rename_arrays
from jbn.converting.trees import (
    Address,
    Layer,
    LibraryTree,
    Path,
    as_numpy,
    convey,
    dtype_of,
    fill,
    index_shapes,
    is_float,
)
from jbn.core.checks import read_flag
from jbn.paths import count_of, find_wrapper, name_few, select

Value = TypeVar("Value")
Library: TypeAlias = Literal["jbn", "linen", "nnx", "torch", "keras", "haiku", "equinox"]
"""A library, by its name."""


def convert(
    tree: LibraryTree,
    source: Library,
    target: Library,
    *,
    like: LibraryTree | None = None,
    names: Names | None = None,
    kinds: Mapping[str, str] | None = None,
    flattened: Mapping[str, tuple[int, ...]] | None = None,
    count: int | Mapping[str, int] | None = None,
    unbiased: bool = False,
) -> LibraryTree:
    r"""Return the arrays of a layer or a model as another library has them: renamed, laid out anew, nothing left over.

    .. math:: \sigma^2_\text{biased} = \frac{n - 1}{n}\,\sigma^2_\text{sample}

    Trees, of arrays of any kind:

    ===========  =========================================================================================
    "jbn"        ``(params, state)``, such as those of ``jbn.bn_init``, or mappings of them by layer
    "linen"      ``{"params": ..., "batch_stats": ...}``, or a ``TrainState`` that has them
    "nnx"        ``nnx.state(model, (nnx.Param, nnx.BatchStat))``, for ``nnx.update(model, ...)``
    "torch"      ``model.state_dict()``, or the model
    "keras"      the model, or ``{v.path: v.numpy() for v in model.weights}``, ``v.name`` for a single layer
    "haiku"      ``(params, state)`` of ``hk.transform_with_state``, or names such as "net/~/conv/w" to arrays,
                 as they are in files
    "equinox"    ``(model, state)`` of ``eqx.nn.make_with_state``
    ===========  =========================================================================================

    Those of jbn, Flax and Haiku may also be flat, as ``jbn.load_arrays`` gives back what ``jbn.save_arrays`` wrote.
    Running statistics are those that the source evaluates with, so that both evaluate alike: with Haiku and Equinox the
    debiased ones. These two go on from them as after 2³⁰ updates, not as from the first, where no count says more. In
    Keras two models inside of one may have layers of the same path, of which a mapping keeps the last: give them names
    of their own. Arrays that no other library has, such as those of Keras's ``Normalization``, are refused: leave the
    layer out, by ``names``.

    Args:
        tree: what the source has; leaves may be of NumPy, jax or PyTorch, in bfloat16 too.
        source: the library that ``tree`` comes from.
        target: the library that it is for.
        like: a tree of the target, of arrays or their shapes such as those of ``jax.eval_shape``. The result has its
            structure, shapes, dtypes and, where it is committed, sharding; and all of it is filled. Haiku and Equinox
            need it. Of a model of PyTorch or Keras the result is the mapping of its arrays; in a ``TrainState`` the
            step and the optimizer stay as they are. Without it nothing says what is lacking, and arrays of no known
            name go along as they are, in jbn and Linen as parameters; those that may be none are refused: integers,
            what lies beside running statistics or is named as such elsewhere, and what the target would take for such.
        names: paths in the source to paths in the target; the first that matches counts, so that the most special ones
            come first, and each must decide about a layer. What lies under a path goes with it, ``*`` is any part of a
            key, the same on both sides, ``""`` is the root, and None leaves out:
            ``{"fc": None, "layer*.*.bn*": "layer*/block*/norm*", "module": ""}``. Or a function of a path of a layer.
            Without it paths are the same, but for the separator, which is a point in PyTorch and a slash elsewhere. A
            function renumbers: ``lambda path: re.sub(r"layer(\d)", lambda m: f"stage{int(m[1]) - 1}", path)``. See
            ``jbn.propose_names``. What matches no layer but the last keys of arrays gives these, first of all, the
            name that the library of the source has for such, and None leaves them out:
            ``{"*:0": "*", "norm*/vars/0": "norm*/gamma"}``; all other paths are those after that.
        kinds: layers of which the arrays do not tell what they are, by patterns of paths in the source, see
            ``jbn.keep_statistics``. "transposed": a transposed convolution; "transpose_kernel": one that has
            ``transpose_kernel=True`` in Flax; "depthwise": a depthwise convolution, to or from Keras; "embedding": an
            embedding, from PyTorch or Equinox. Name every one of the first three: with as many channels in as out,
            shapes do not tell. Models of PyTorch and Keras tell it themselves, as ``tree`` and as ``like``, all but
            "transpose_kernel". What their layout does not say, groups and channels, is read from ``like``.
        flattened: the shapes (C, H, W), features first, by patterns as above, of examples that are flattened before a
            dense layer or a normalization; or unflattened after it, if that is the size of what comes out. PyTorch and
            Equinox flatten the features first, the others last. Shapes agree without it; ``{}`` says that there is
            none.
        count: how many values per feature the running variance was estimated from, batch · height · width, for all
            normalizations or by patterns as above. With it the variance is converted between that of a sample, in
            PyTorch, and the biased one of the others; without it, it stays as it is, and evaluation the same.
        unbiased: whether in jbn, Linen or NNX the running variance is that of a sample, see ``jbn.bn_forward``. With
            that, what comes from PyTorch trains on as there.

    Returns:
        A tree of the target, of jax arrays; for PyTorch and Keras of NumPy's, and of tensors where ``like`` has some.
        Without ``like`` dtypes are those of the source, as far as jax has them, but statistics are at least float32.
        The number of updates goes from PyTorch, Haiku and Equinox into a ``count`` of ``like``, and from a ``count`` to
        PyTorch and Equinox. Else ``num_batches_tracked`` is that of ``like``, or 0, and the counters of Haiku and
        Equinox are as after very many updates; Haiku's always, for no array tells its decay.

    Raises:
        ValueError: for what cannot be mapped, with the paths: arrays that are left over or lacking, of another shape,
            layers at the same path, patterns that match nothing, running statistics that are not finite or variances
            that are negative.
        TypeError: for trees of another kind.

    Warns:
        UserWarning: without ``flattened``, where a dense layer seems to take flattened examples, by as many inputs as
            a convolution has channels, times a number; with it, where the last number of a shape is how many channels
            a layer has, and the first is not.

    >>> import numpy as np, jbn
    >>> names = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    >>> state_dict = {f"layers.0.{name}": np.ones(3, np.float32) for name in names}
    >>> variables = jbn.convert(state_dict, "torch", "linen", names={"layers.0": "norm"})
    >>> variables["batch_stats"]["norm"]["mean"].tolist()
    [1.0, 1.0, 1.0]
    >>> params, state = jbn.convert(state_dict, "torch", "jbn", names={"layers.0": ""}, count=100)
    >>> round(float(state.var[0]), 6)
    0.99

    Elsewhere: what these names and layouts mean was read in PyTorch 2.13, Keras 3.15, Haiku 0.0.17, Equinox 0.13.8 and
    Flax 0.12.8. The running variance of Equinox (``mode="batch"``) holds some of its first value, 1, for long; it
    evaluates with that. What a layer is made with, such as epsilon, momentum and padding, is not in its arrays: see
    ``jbn.convert_options``.
    """
    unbiased = read_flag("unbiased", unbiased)
    origin, goal = read_dialect("source", source, unbiased), read_dialect("target", target, unbiased)
    tree, known = unpack("tree", origin, tree)
    like, known_there = unpack("like", goal, like)
    layers, names = rename_arrays(names, origin, read_layers("tree", origin.read, tree))
    wanted = None if like is None else read_layers("like", lambda like: index_shapes(goal.addresses(like), like), like)
    if wanted is None and goal.make is None:
        raise ValueError(f"like is None; expected a tree of {target} to fill, for it holds more than arrays.")
    everywhere = count if count is None or isinstance(count, Mapping) else {"*": count}
    kind = read_by_path("kinds", kinds, origin, layers, KINDS.__contains__, f"one of {', '.join(map(repr, KINDS))}")
    shape = read_by_path("flattened", flattened, origin, layers, _is_shape, "a shape (C, H, W), features first")
    number = read_by_path("count", everywhere, origin, layers, _is_count, "2 or more values")
    shapes: dict[Path, dict[str, tuple[int, ...]]] = {}  # of the form between libraries
    found: dict[Path, Layer] = {}
    came: dict[Path, str] = {}
    for path, new in rename(names, origin, goal, list(layers)).items():
        old = origin.spell(path) or "the layer"
        if new in found:
            raise ValueError(
                f"names: {came[new]} and {old} both become {goal.spell(new) or 'the layer'}; expected a path of its "
                "own for each layer."
            )
        try:
            place = None if wanted is None else wanted.get(new, {})
            arrays = {name: as_numpy(leaf) for name, leaf in layers[path].items()}
            said = Said(kind.get(path) or known.get(path) or known_there.get(new), shape.get(path), number.get(path))
            found[new] = translate(arrays, origin, goal, place, said)
            shapes[path] = {name: value.shape for name, value in origin.decode(arrays, said.kind).items()}
            came[new] = old
        except (ValueError, TypeError) as error:
            raise _kind_of(error)(f"{old} of tree {error}") from error
    if origin.features_first != goal.features_first:
        if flattened is None:
            _warn_of_flattened(shapes, kind, origin, source, target)
        _warn_of_features_last(shapes, shape, origin)
    if wanted is not None:
        _check_complete(origin, goal, list(layers), found, came, wanted)
        return fill(like, goal.addresses(like), goal.stored(like, found), goal.numpy)
    assert goal.make is not None
    made = goal.make(convey(found, goal.numpy))
    # Not jnp.asarray, which compiles a program for each shape.
    return made if goal.numpy else jax.tree.map(jax.device_put, made)


def _warn_of_flattened(
    shapes: Mapping[Path, Mapping[str, tuple[int, ...]]],
    kinds: Mapping[Path, str],
    origin: Dialect,
    source: str,
    target: str,
) -> None:
    """Warn of a dense layer whose inputs seem to be flattened images: no shape tells their order.

    They are as many as no other layer has features, and a multiple of the channels of the widest convolution, or of the
    last one, if layers are in an order of their own. After global pooling they are the channels themselves.
    """
    kernels = {path: shape["kernel"] for path, shape in shapes.items() if "kernel" in shape and path not in kinds}
    convolutions = {path: shape[-1] for path, shape in kernels.items() if len(shape) > 2}
    if not convolutions:
        return
    places = [max(convolutions, key=lambda path: convolutions[path])]
    if [*shapes] != sorted(shapes):
        places.append([*convolutions][-1])
    for path, shape in kernels.items():
        others = {size[-1] for other, held in shapes.items() if other != path for size in held.values() if size}
        fitting = [place for place in places if shape[0] % convolutions[place] == 0]
        if len(shape) == 2 and shape[0] not in others and fitting:
            channels = convolutions[fitting[0]]
            positions = shape[0] // channels
            side = isqrt(positions)
            example = (channels, side, side) if side**2 == positions else (channels, positions, 1)
            warnings.warn(
                f"{origin.spell(path)} of tree takes {shape[0]} values, {positions} for each of the {channels} "
                f"channels of {origin.spell(fitting[0])}: if these are flattened before it, {source} and {target} have "
                f"them in another order, and nothing else says so. Expected flattened={{{origin.spell(path)!r}: "
                f"{example}}}, the shape (C, H, W) before; or flattened={{}} if they are not.",
                stacklevel=3,
            )
            return


def _warn_of_features_last(
    shapes: Mapping[Path, Mapping[str, tuple[int, ...]]], flattened: Mapping[Path, tuple[int, ...]], origin: Dialect
) -> None:
    """Warn of a flattened shape whose last number is one of channels, and whose first one no layer has."""
    for path, example in flattened.items():
        others = {other: held for other, held in shapes.items() if other != path}
        channels = {size[-1]: other for other, held in others.items() for size in held.values() if len(size) > 2}
        known = {n for held in others.values() for size in held.values() for n in size[-2:]}
        if example[-1] in channels and example[0] not in known:
            warnings.warn(
                f"flattened is {tuple(example)} for {origin.spell(path)}, and no layer has {example[0]} channels, but "
                f"{origin.spell(channels[example[-1]])} has {example[-1]}. Expected features first, (C, H, W), as in "
                f"{(example[-1], *example[:-1])}, whichever library the tree is of.",
                stacklevel=3,
            )


def _kind_of(error: Exception) -> type[Exception]:
    return TypeError if isinstance(error, TypeError) else ValueError


def read_dialect(argument: str, name: str, unbiased: bool) -> Dialect:
    """Return the dialect of a library, or refuse an argument that names none."""
    dialect = DIALECTS[read_choice(argument, name, DIALECTS)]
    return replace(dialect, unbiased=unbiased) if dialect.unbiased is None else dialect


def unpack(argument: str, dialect: Dialect, tree: Any) -> tuple[Any, Mapping[Path, str]]:
    """Return the tree of a model, or of flat names, and what the model says its layers are."""
    try:
        return dialect.unpack(tree)
    except ValueError as error:
        raise ValueError(f"{argument} {error}") from error


def read_layers(argument: str, read: Callable[[Any], Mapping[Address, Any]], tree: Any) -> dict[Path, dict[str, Any]]:
    """Return the arrays of a tree by layer and name."""
    layers: dict[Path, dict[str, Any]] = {}
    try:
        for (path, name), leaf in read(tree).items():
            layers.setdefault(path, {})[name] = leaf
    except (ValueError, TypeError) as error:
        raise _kind_of(error)(f"{argument} {error}") from error
    if not layers:
        raise ValueError(f"{argument} holds no arrays; expected those of at least one layer.")
    return layers


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) > 1


def _is_shape(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 1 and all(_is_number(n) and n > 0 for n in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_by_path(
    argument: str,
    said: Mapping[str, Value] | None,
    origin: Dialect,
    layers: Iterable[Path],
    fits: Callable[[Any], bool],
    expected: str,
) -> dict[Path, Value]:
    """Return what was said by pattern for each path; the first that matches counts."""
    found: dict[Path, Value] = {}
    paths = ["/".join(path) for path in layers]
    if said is None:
        return found
    if not isinstance(said, Mapping):
        raise TypeError(f"{argument} is {said!r}; expected a mapping of patterns.")
    check_keys(argument, said)
    for pattern, value in said.items():
        if not fits(value):
            raise ValueError(f"{argument}: {pattern!r} has {value!r}; expected {expected}.")
        try:
            hits = select(paths, "/".join(origin.split(pattern)), "layer of tree")
        except ValueError as error:
            raise ValueError(f"{argument}, {error}") from error
        found = {path: value for path, hit in zip(layers, hits, strict=True) if hit} | found
    return found


def _find_wrapper(paths: Sequence[Path], lost: Iterable[Path], wanted: Mapping[Path, Any]) -> Path:
    """Return the first keys that all layers of the source have and none in ``like`` has: those of a wrapper."""
    first = {path[:1] for path in paths}
    if len(first) > 1 or first & {(), *(path[:1] for path in wanted)} or first != {at[:1] for at in lost}:
        return ()
    return find_wrapper(paths, wanted.__contains__) or paths[0][:1]


def _check_complete(
    origin: Dialect,
    goal: Dialect,
    paths: Sequence[Path],
    found: Mapping[Path, Layer],
    came: Mapping[Path, str],
    wanted: Mapping[Path, Mapping[str, Any]],
) -> None:
    """Refuse what is left over, lacking, or of another shape than in ``like``."""
    ours = {(*path, name): value for path, layer in found.items() for name, value in layer.items()}
    theirs = {(*path, name): leaf for path, layer in wanted.items() for name, leaf in layer.items()}
    lost, lacking = [at for at in ours if at not in theirs], [goal.spell(at) for at in theirs if at not in ours]
    if lost or lacking:
        shown = []
        wrapper = origin.spell(_find_wrapper(paths, lost, wanted))
        hint = f" All layers of tree are under {wrapper!r}: names={{{wrapper!r}: ''}} strips it." if wrapper else ""
        for at in lost[:4]:
            near = "".join(f" (near {name!r})" for name in get_close_matches(goal.spell(at), lacking, n=1, cutoff=0.0))
            shown.append(f"{goal.spell(at)!r} from {came[at[:-1]]!r}{near}")
        raise ValueError(
            f"tree and like differ. Of {count_of(len(ours), 'array of tree')} {len(lost)} are left over: "
            f"{name_few(shown, len(lost))}. Of {len(theirs)} in like {len(lacking)} are lacking: "
            f"{name_few(map(repr, lacking))}. Expected names that bring them together, layers or, as in "
            "{'*/gamma:0': '*/gamma'}, arrays by what the source's library calls them; None for what is left out; in "
            f"like only what is to be filled; embeddings named in kinds.{hint}"
        )
    pairs = {goal.spell(at): (value, theirs[at]) for at, value in ours.items()}
    other = [
        f"{at!r} is {v.dtype} {v.shape}, in like {dtype_of(leaf)} {tuple(leaf.shape)}"
        for at, (v, leaf) in pairs.items()
        if v.shape != tuple(leaf.shape) or is_float(v.dtype) != is_float(dtype_of(leaf))
    ]
    if other:
        raise ValueError(
            f"tree and like differ in {count_of(len(other), 'array')}: {name_few(other)}. Expected the same sizes; "
            "transposed and depthwise convolutions are to be named in kinds."
        )
