"""Programs that JAX has traced: of a call with arguments of any kind, and those inside of an operation."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def trace(call: Callable[..., Any], *arguments: Any) -> tuple[Any, list[int]]:
    """Trace ``call(*arguments)``; arrays and shapes alone are traced, all else goes along as it is.

    Returns:
        The program, which returns the arrays among what the call returns; and for each of its inputs the index of it
        among the leaves of ``arguments``.
    """
    leaves, structure = jax.tree.flatten(arguments)
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def run(arrays: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        returned = jax.tree.leaves(call(*jax.tree.unflatten(structure, filled)))
        return [leaf for leaf in returned if isinstance(leaf, jax.Array)]

    return jax.make_jaxpr(run)([leaves[i] for i in traced]).jaxpr, traced


def find_inner(eqn: Any) -> Iterator[Any]:
    """Yield the programs inside of an operation, such as the body of a loop."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            body = getattr(inner, "jaxpr", inner)
            if hasattr(body, "eqns"):
                yield body
