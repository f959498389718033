"""Public models of torchvision, keras.applications and Haiku, converted into twins of Flax (`benchmarks.twins`)."""

from functools import partial
from typing import Any

import jbn
from benchmarks.sources import READERS
from benchmarks.twins import TWINS, Truth, shapes
from benchmarks.zoo.cases import IMAGES, Case, Model, draw
from benchmarks.zoo.linen import Linen

PACKAGES = {"torch": "torchvision", "keras": "keras", "haiku": "dm-haiku"}


def _convert(key: str) -> Model:
    """Convert a model by the names that propose themselves; what is ambiguous the twin decides, as a reader would."""
    library, name, make = TWINS[key]
    source = READERS[library](name, draw(IMAGES, 1))
    truth = Truth(library, source.norms)
    model = make(truth)
    like, x = shapes(model, IMAGES[1])
    proposal = jbn.propose_names(source.tree, library, "linen", x, like=like, call=model.apply)
    names = proposal.names | {match.source: truth.names.get(match.source) for match in proposal.ambiguous}
    variables = jbn.convert(source.tree, library, "linen", like=like, names=names, kinds=proposal.kinds or None)
    images = draw(IMAGES, 2)
    calls: dict[str, Any] = {"training": {"train": True}, "evaluation": {"train": False}}
    return Linen(model=model, variables=variables, images=images, source=source.logits(images), **calls)


CASES = tuple(Case(PACKAGES[library], name, partial(_convert, key)) for key, (library, name, _) in TWINS.items())
