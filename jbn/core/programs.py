"""What a function of the user computes, as a program: equal programs do the same, whatever the functions hold."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr

from jbn.core.axes import vary_as

# What can stand where it is called. The second kind has a rule for its derivative, which is lost by that.
CALLS = ("jit", "pjit", "closed_call", "core_call")
WITH_RULE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


# An eager call that has nothing new must trace nothing.
@lru_cache(maxsize=1024)
def find_type(dtype: np.dtype[Any], *others: Any) -> jax.ShapeDtypeStruct:
    """Return the type of z, which varies over the mesh axes over which one of the others does."""
    return jax.eval_shape(lambda x, *more: vary_as(x.astype(dtype), *more), *others)


def inline(jaxpr: Any, consts: Sequence[Any], *args: Any, also: Sequence[str] = ()) -> list[Any]:
    """Evaluate a program, with the bodies of calls in their places; ``also`` of calls of these kinds."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        body = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        if body is not None and eqn.primitive.name in (*CALLS, *also):
            found = inline(body.jaxpr, body.consts, *map(read, eqn.invars), also=also)
        else:
            # A program of this equation alone, because how an equation is bound differs between versions of JAX.
            taken = list(dict.fromkeys(atom for atom in eqn.invars if not hasattr(atom, "val")))
            alone = jaxpr.replace(constvars=[], invars=taken, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
            found = eval_jaxpr(alone, (), *map(read, taken))
        values.update(zip(eqn.outvars, found, strict=True))
    return list(map(read, jaxpr.outvars))


def write(program: Any) -> str:
    """Return what a program computes, in words; arrays that JAX wrote into it, which its text leaves out, in bytes."""
    atoms = (atom for eqn in equations(program.jaxpr) for atom in (*eqn.invars, *returned(eqn)))
    arrays = (np.asarray(atom.val) for atom in (*atoms, *program.jaxpr.outvars) if np.ndim(getattr(atom, "val", 0)))
    return "\n".join([str(program), *(sha256(array.tobytes()).hexdigest() for array in arrays)])


def find_settings(*programs: Any) -> Iterator[Any]:
    """Find what operations are told and that is equal by value; what is so by identity is new at each trace."""
    for program in programs:
        for eqn in equations(program.jaxpr):
            if eqn.primitive.name not in (*WITH_RULE, "custom_lin"):
                yield from (part for value in eqn.params.values() for part in _flatten(value))


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flatten(part)
    else:
        kind: Any = type(value)
        if kind.__eq__ is not object.__eq__ and kind.__hash__ is not None:
            yield value


def returned(eqn: Any) -> Iterator[Any]:
    """Return what the programs inside an equation return."""
    for body in bodies(eqn):
        yield from body.jaxpr.outvars


def equations(jaxpr: Any) -> Iterator[Any]:
    """Return the equations of a program, and those of the programs inside them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body.jaxpr)


def bodies(eqn: Any) -> Iterator[Any]:
    """Return the programs inside an equation."""
    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if hasattr(body, "jaxpr") and hasattr(body, "consts"):
                yield body
