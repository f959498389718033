"""Paths in trees: the keys of their leaves, patterns that choose among them, and how a message names some of them."""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Annotated, Any, TypeAlias

from jax.tree_util import GetAttrKey, PyTreeDef, keystr, tree_flatten_with_path

Keys = tuple[str, ...]
Patterns: TypeAlias = str | Sequence[str]
"""A pattern of paths such as ``"backbone/*"``, or several of them; ``jbn.keep_statistics`` says what they match."""

ArrayTree: TypeAlias = Annotated[Any, "arrays at any depth"]
"""A tree of arrays as JAX knows them, at any depth: dictionaries, tuples, ``flax`` and ``nnx`` states, one array."""


def flatten(tree: Any, argument: str = "") -> tuple[list[Keys], list[Any], PyTreeDef]:
    """Return the keys and the leaves of a tree, which errors name as ``argument``, and its structure."""
    try:
        found, structure = tree_flatten_with_path(tree)
    except (ValueError, TypeError) as error:  # of a dictionary, or of a class of nodes
        raise TypeError(
            f"{argument} has keys of several kinds in one node, which jax cannot sort ({error}); expected strings "
            "alone, or whole numbers alone.".lstrip()
        ) from error
    return [read_keys(path) for path, _ in found], [leaf for _, leaf in found], structure


def read_keys(path: tuple[Any, ...]) -> Keys:
    """Return the keys of a path as strings; a box around an array adds none.

    Boxes are ``nnx.Param``, ``nn.Partitioned`` and the like, whose array is the attribute ``value``. The key "value" of
    a dictionary is a key like any other.
    """
    boxed = len(path) > 1 and path[-1] == GetAttrKey("value")
    return tuple(keystr((key,), simple=True) for key in (path[:-1] if boxed else path))


def join(keys: Iterable[Any]) -> str:
    """Write keys as a path."""
    return "/".join(map(str, keys))


def match(path: str, patterns: Patterns) -> bool:
    """Say whether a path, or a node above it, matches one of the patterns, and none of those that follow a ``!``.

    Where all of them follow one, whatever they leave out matches.
    """
    several = _read_patterns(patterns)
    without = [pattern[1:] for pattern in several if pattern.startswith("!")]
    those = [pattern for pattern in several if not pattern.startswith("!")] or ["*"] * bool(without)
    return any(_hits(path, pattern) for pattern in those) and not any(_hits(path, pattern) for pattern in without)


def select(paths: Sequence[str], patterns: Patterns, kind: str = "path", argument: str = "patterns") -> list[bool]:
    """Say of each path whether it matches; every pattern must match one of them, those after a ``!`` too."""
    for pattern in _read_patterns(patterns, argument):
        if not any(_hits(path, pattern.removeprefix("!")) for path in paths):
            near = get_close_matches(pattern, paths, n=4, cutoff=0.0)
            there = f" ({name_few(map(repr, near), len(paths))})" if near else ""
            raise ValueError(
                f"{argument}: {pattern!r} matches none of the {count_of(len(paths), kind)}{there}; expected patterns "
                f"of fnmatch for paths joined by '/'.{_name_wrapper(paths, pattern.removeprefix('!'))}"
            )
    return [match(path, patterns) for path in paths]


def find_wrapper(paths: Iterable[Keys], fits: Callable[[Keys], bool]) -> Keys:
    """Return the first keys that all paths have, as those of a wrapper, and without which a path fits; or none."""
    below = [path for path in paths if path]  # the wrapper itself may be called, at the root
    shared = tuple(keys[0] for keys in takewhile(lambda keys: len({*keys}) == 1, zip(*below, strict=False)))
    return next((shared[:n] for n in range(1, len(shared) + 1) if any(fits(path[n:]) for path in below)), ())


def name_few(items: Iterable[str], number: int | None = None, most: int = 4) -> str:
    """Name the first few of some items, and how many more there are, of ``number`` in all where these are a sample.

    >>> from jbn.paths import name_few
    >>> name_few("abcdef")
    'a, b, c, d and 2 more'
    """
    names = list(items)
    more = (len(names) if number is None else number) - len(names[:most])
    return (", ".join(names[:most]) or "none") + f" and {more} more" * (more > 0)


def count_of(number: int, what: str) -> str:
    """Say how many there are of something, whose first word is a noun that takes an s.

    >>> from jbn.paths import count_of
    >>> count_of(1, "layer"), count_of(2, "layer of tree")
    ('1 layer', '2 layers of tree')
    """
    noun, *more = what.split(" ", 1)
    return " ".join([str(number), noun + "s" * (number != 1), *more])


def _read_patterns(patterns: Patterns, argument: str = "patterns") -> Sequence[str]:
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, Sequence) or not all(isinstance(pattern, str) for pattern in several):
        raise TypeError(f"{argument} is {patterns!r}; expected a string or a sequence of strings.")
    return several


def _name_wrapper(paths: Iterable[str], pattern: str) -> str:
    """Say that a pattern lacks the prefix of a wrapper, if that is what it lacks."""
    wrapper = join(find_wrapper([tuple(path.split("/")) for path in paths], lambda keys: _hits(join(keys), pattern)))
    return f" All are under {wrapper!r}: expected {join((wrapper, pattern))!r}." if wrapper else ""


def _hits(path: str, pattern: str) -> bool:
    # Every key gets a slash before it, and a second one between two keys, so that the stars of "/**/" can be empty too.
    path = f"/{path}".replace("/", "//")
    pattern = re.sub(r"(?<=[^/])(/\*\*)+$", "", pattern)  # what matches a node matches everything under it
    pattern = re.sub(r"(//\*\*)+//", "/*/", f"/{pattern}".replace("/", "//"))
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}//*")
