"""The variables of a Linen model, as tools take them."""

from collections.abc import Mapping

from flax.core.scope import CollectionFilter, in_filter
from flax.errors import InvalidFilterError

from jbn.arguments import refuse
from jbn.paths import name_few


def check_variables(variables: object) -> None:
    """Refuse what are no variables, such as one collection of them."""
    if not isinstance(variables, Mapping):
        fix = ": one mapping of both" if isinstance(variables, tuple | list) else ""
        raise TypeError(
            f"variables is of type {type(variables).__name__}; expected those of model.init, "
            f"{{'params': ..., 'batch_stats': ...}}{fix}."
        )
    inner = [name for name, collection in variables.items() if not isinstance(collection, Mapping)]
    if inner or (variables and not {"params", "batch_stats"} & variables.keys()):
        raise ValueError(
            f"variables holds {name_few(map(str, inner or variables))}; expected batch_stats beside params, as "
            "model.init returns them: {'params': params, 'batch_stats': batch_stats}."
        )


def check_mutable(mutable: CollectionFilter) -> None:
    """Refuse collections without statistics, which a call in training changes."""
    try:
        fits = in_filter(mutable, "batch_stats")
    except (InvalidFilterError, TypeError) as error:
        raise refuse("mutable", mutable, "a list of collections, as in model.apply, such as ['batch_stats']") from error
    if not fits:
        raise ValueError(f"mutable is {mutable!r}; expected batch_stats among them, which a call in training changes.")
