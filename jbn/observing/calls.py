"""What the call of a Flax model takes of a batch: its positional arguments, and a number that random keys depend on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from jbn.observing.survey import Batch

Method: TypeAlias = Callable[..., Any] | str
"""What is called of an NNX model: a method by its name, or a function of the model and what it is called with."""


def arguments(batch: Batch) -> tuple[Any, ...]:
    """Return the positional arguments that a batch stands for: a plain tuple is several, all else is one."""
    return batch if type(batch) is tuple else (batch,)


@dataclass(frozen=True)
class NumberedBatches:
    """Batches with their numbers, so that dropout differs from batch to batch and is the same in every pass.

    Attributes:
        batches: what can be read once or again and again, which stays so.
    """

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[tuple[np.uint32, Any]]:
        """Yield every number with its batch."""
        return ((np.uint32(number), batch) for number, batch in enumerate(self.batches))
