"""What ``replace`` and ``freeze`` of both Flax modules have met, and the options that ``replace`` may set."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jbn.arguments import check_options


@dataclass
class Found:
    """The layers that ``replace`` or ``freeze`` has met in a model, each once.

    Attributes:
        paths: those that it acted on, such as ``block/BatchNorm_0``; the path of the model itself is empty.
        skipped: those that it left alone.
    """

    paths: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """Unpack as ``paths, skipped``."""
        return iter((self.paths, self.skipped))

    def meet(self, path: str, acts: bool) -> None:
        """Note a layer."""
        if acts and path not in self.paths:
            self.paths = (*self.paths, path)
        elif not acts and path not in self.skipped:
            self.skipped = (*self.skipped, path)


def check_overrides(overrides: Mapping[str, Any], options: Collection[str]) -> None:
    """Refuse overrides of other names than those of ``options``, and of other kinds than a layer takes."""
    if unknown := sorted(set(overrides) - set(options)):
        raise TypeError(f"replace() got {', '.join(unknown)}; expected overrides named {', '.join(options)}.")
    check_options(**overrides)
