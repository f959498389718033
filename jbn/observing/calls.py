"""What the call of a Flax model takes of a batch: its positional arguments, and a number that random keys depend on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


def arguments(batch: Any) -> tuple[Any, ...]:
    """Return the positional arguments that a batch stands for: a plain tuple is several, all else is one."""
    return batch if type(batch) is tuple else (batch,)


@dataclass(frozen=True)
class NumberedBatches:
    """Batches with their numbers, so that dropout differs from batch to batch and is the same in every pass.

    Attributes:
        batches: what can be read once or again and again, which stays so.
    """

    batches: Iterable[Any]

    def __iter__(self) -> Iterator[tuple[np.uint32, Any]]:
        """Yield every number with its batch."""
        return ((np.uint32(number), batch) for number, batch in enumerate(self.batches))
