"""The activation as a program: what it does decides whether it is the one of before, not what can be found in it.

An activation may take arrays from anywhere: a closure, a default argument, a global, an attribute of an object, the
rule of its own derivative. When it is traced, all of them become constants of a program. Here they become arguments of
the derivative rule instead, so that they are differentiated and seen at every call. What is left is a program without
arrays. That can be static: equal programs share what was compiled, and nothing is kept alive by it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core import checks
from jbn.core.axes import vary_as
from jbn.core.lax import lax
from jbn.core.programs import Program, find_types, read_program, trace

Activation: TypeAlias = Callable[[Array], Array]
"""A function of one array that returns one of its shape, such as ``jax.nn.relu``."""


def trace_activation(
    activation: Activation | None, z: jax.ShapeDtypeStruct, *others: Array
) -> tuple[Program | None, tuple[Array, ...]]:
    """Return an activation as a program, and the arrays that it holds.

    Args:
        activation: a function of one array, or None.
        z: the shape and dtype of that array.
        others: the arrays that z will be made of: over which mesh axes z varies follows from theirs.
    """
    if activation is None:
        return None, ()
    checks.check_callable("activation", activation, "of one array, for instance jax.nn.relu")
    mesh = jax.sharding.get_abstract_mesh()
    typed = _find_type(z.dtype, mesh, *map(jax.typeof, others))
    if _is_of_jax(activation):
        return _trace_once(activation, typed, mesh)
    return _trace(activation, typed)


# An eager call that has nothing new must trace nothing, and what is traced is of the mesh on which it was.
@lru_cache(maxsize=1024)
def _find_type(dtype: np.dtype[Any], mesh: Any, *others: Any) -> Any:
    """Return the type of z, which varies over the mesh axes over which one of the others does."""
    return find_types(lambda x, *more: vary_as(x.astype(dtype), *more), *others)


# As they were when this was imported: what somebody puts in their places later may do another thing at every call.
_OF_JAX = {id(function): function for room in (jax.nn, jnp, lax) for function in vars(room).values()}


def _is_of_jax(activation: Any) -> bool:
    """Say whether a function is one that JAX itself has, by identity: such a one does the same at every call."""
    return _OF_JAX.get(id(activation)) is activation


def _trace(activation: Activation, z: jax.ShapeDtypeStruct) -> tuple[Program, tuple[Array, ...]]:
    traced = trace("activation", activation, z)
    checks.check_activation_output(traced.out_avals, z)
    return read_program("activation", traced, z)


@lru_cache(maxsize=1024)
def _trace_once(activation: Activation, z: jax.ShapeDtypeStruct, mesh: Any) -> tuple[Program, tuple[Array, ...]]:
    return _trace(activation, z)


def selects(program: Program) -> bool:
    """Say whether the derivative passes each number of dz on or puts 0 in its place, as that of ReLU does."""
    return _selects(program.slope, len(program.inexact) + 1)


def _selects(jaxpr: Any, tangent: int) -> bool:
    """Say whether a program returns its argument number ``tangent`` with zeros in the place of some numbers."""
    passed, zero = {jaxpr.invars[tangent]}, set[Any]()

    def is_zero(atom: Any) -> bool:
        return bool(np.all(atom.val == 0)) if hasattr(atom, "val") else atom in zero

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        data = eqn.invars[1:] if name == "select_n" else eqn.invars
        known = [is_zero(atom) or (not hasattr(atom, "val") and atom in passed) for atom in data]
        if name in ("broadcast_in_dim", "convert_element_type") and is_zero(data[0]):
            zero.update(eqn.outvars)
        elif name == "select_n" and all(known):
            (zero if all(map(is_zero, data)) else passed).update(eqn.outvars)
    (returned,) = jaxpr.outvars
    return not hasattr(returned, "val") and returned in passed
