"""``names``: what paths in one model become in another, by patterns with stars or by a function."""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol, TypeAlias

from jbn.converting.trees import OTHER, Path
from jbn.paths import count_of, find_wrapper, name_few

Names: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None]
"""Paths in one model to paths in another, None for what is left out: a mapping with ``*``, or a function of a path."""


class Writing(Protocol):
    """How a library writes the path of a layer; a ``Dialect`` knows."""

    def split(self, path: str) -> Path:
        """Read a path."""

    def spell(self, path: Path) -> str:
        """Write a path."""


def rename(names: Names | None, origin: Writing, goal: Writing, paths: Sequence[Path]) -> dict[Path, Path]:
    """Return the new paths of layers, without those that are left out."""
    if names is None:
        return {path: path for path in paths}
    if callable(names):
        said = {path: _check_name(origin.spell(path), names(origin.spell(path))) for path in paths}
        return {path: goal.split(new) for path, new in said.items() if new is not None}
    if not isinstance(names, Mapping):
        raise TypeError(f"names is of type {type(names).__name__}; expected a mapping or a function of paths.")
    check_keys("names", names)
    found: dict[Path, Path | None] = {}
    rules: dict[Path, str] = {}  # that have decided
    for old, value in names.items():
        new = _check_name(old, value)
        pattern = _compile(origin, old)
        hits = {path: match for path in paths if (match := pattern.fullmatch(_slash(path)))}
        if not hits:
            near = name_few(get_close_matches(old, list(map(origin.spell, paths)), n=4, cutoff=0.0), len(paths))
            wrapper = find_wrapper(paths, lambda path, pattern=pattern: bool(pattern.fullmatch(_slash(path))))  # type: ignore[misc]
            fix = f"{origin.spell((*wrapper, *origin.split(old)))!r}"
            hint = f" All are under {origin.spell(wrapper)!r}: expected {fix}." if wrapper else ""
            raise ValueError(f"names: {old!r} matches none of the {count_of(len(paths), 'layer')}: {near}.{hint}")
        if not any(path not in found for path in hits):
            before = name_few(map(repr, dict.fromkeys(rules[path] for path in hits)))
            raise ValueError(
                f"names: {old!r} comes after {before}, which decided about every layer that it matches. The first that "
                "matches counts; expected the most special one first."
            )
        for path, match in hits.items():
            rules.setdefault(path, old)
            found.setdefault(path, None if new is None else _rewrite(goal.split(new), match.groups()))
    return {path: way for path in paths if (way := found.get(path, path)) is not None}


def rename_arrays(
    names: Names | None, origin: Writing, layers: dict[Path, dict[str, Any]]
) -> tuple[dict[Path, dict[str, Any]], Names | None]:
    """Give arrays the names that the library of the source has, by the names that match no layer; return the others."""
    if not isinstance(names, Mapping):
        return layers, names
    check_keys("names", names)
    arrays = {(*path, name): leaf for path, layer in layers.items() for name, leaf in layer.items()}
    rules = {
        old: pattern
        for old in names
        if origin.split(old)[-1:] not in ((), ("*",))
        and not any(_compile(origin, old).fullmatch(_slash(path)) for path in layers)
        and any((pattern := _compile(origin, old, ends=True)).fullmatch(_bare(at)) for at in arrays)
    }
    if not rules:
        return layers, names
    found: dict[Path, Any] = {}
    for at, leaf in arrays.items():
        new: Path | None = at
        for old, pattern in rules.items():  # the first that matches counts
            if match := pattern.fullmatch(_bare(at)):
                value = _check_name(old, names[old])
                above, *parts = match.groups()
                new = None if value is None else origin.split(above.rstrip("/")) + _rewrite(origin.split(value), parts)
                break
        if new in found or new == ():
            raise ValueError(
                f"names: {origin.spell(at)} becomes {origin.spell(new) or 'the root'}; expected a path of its own for "
                "each array, which ends in what the library of the source calls it."
            )
        if new is not None:
            found[new] = leaf
    renamed: dict[Path, dict[str, Any]] = {}
    for at, leaf in found.items():
        renamed.setdefault(at[:-1], {})[at[-1]] = leaf
    return renamed, {old: new for old, new in names.items() if old not in rules}


def check_keys(argument: str, said: Mapping[Any, Any]) -> None:
    """Refuse keys that are no paths."""
    if strange := [key for key in said if not isinstance(key, str)]:
        raise TypeError(f"{argument} has the key {strange[0]!r}; expected strings, which are paths of layers.")


def _compile(origin: Writing, old: str, ends: bool = False) -> re.Pattern[str]:
    """Compile a pattern for paths with a slash after every key, that begin with it and go on, or that end in it."""
    stars = re.escape(_slash(origin.split(old))).replace(r"\*", "([^/]*)")
    return re.compile(f"((?:.*/)?){stars}()" if ends else f"{stars}(.*)")


def _check_name(old: str, new: Any) -> str | None:
    if new is not None and not isinstance(new, str):
        raise TypeError(f"names: {old!r} becomes {new!r}; expected a string or None.")
    if new is not None and new.count("*") != old.count("*"):
        raise ValueError(f"names: {old!r} becomes {new!r}; expected as many stars on both sides.")
    return new


def _rewrite(new: Path, parts: Sequence[str]) -> Path:
    """Put parts of the old path in the place of the stars and at the end."""
    pieces = zip(_slash(new).split("*"), parts, strict=True)
    return tuple("".join(piece + part for piece, part in pieces).split("/")[:-1])


def _slash(path: Path) -> str:
    return "".join(f"{key}/" for key in path)


def _bare(path: Path) -> str:
    """Return the path of an array as somebody writes it, without what says that its name has no meaning here."""
    return _slash((*path[:-1], path[-1].lstrip(OTHER)))
