"""The activation as a program: what it does decides whether it is the one of before, not what can be found in it.

An activation may take arrays from anywhere: a closure, a default argument, a global, an attribute of an object, the
rule of its own derivative. When it is traced, all of them become constants of a program. Here they become arguments of
the derivative rule instead, so that they are differentiated and seen at every call. What is left is a program without
arrays. That can be static: equal programs share what was compiled, and nothing is kept alive by it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer, eval_jaxpr
from jax.dtypes import float0

from jbn.core import checks
from jbn.core.axes import vary_as

Activation: TypeAlias = Callable[[Array], Array]

# What can stand where it is called. The second kind has a rule for its derivative, which is lost by that.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_WITH_RULE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclass(frozen=True)
class Program:
    """An activation, traced for one shape and dtype of z; two are equal if they compute the same.

    Attributes:
        text: what it computes, and its derivative, in words.
        settings: what its operations are told, such as a mesh: the words of two can be the same.
        inexact: for each array that f holds, whether it has tangents.
        selects: whether the derivative passes each number of dz on or puts 0 in its place, as that of ReLU does.
        value: f(z), of z and the arrays that f holds.
        slope: f'(z) dz, of z, the arrays that f holds, the tangents of both, and the arrays that its rule alone holds.
    """

    text: str
    settings: tuple[Any, ...]
    inexact: tuple[bool, ...]
    selects: bool
    value: Any = field(compare=False, repr=False)
    slope: Any = field(compare=False, repr=False)

    def __call__(self, z: Array, arrays: Sequence[Array]) -> Array:
        """Return f(z)."""
        return eval_jaxpr(self.value, (), z, *arrays[: len(self.inexact)])[0]

    def differentiate(self, z: Array, arrays: Sequence[Array], dz: Array, darrays: Sequence[Array]) -> Array:
        """Return f'(z) dz, and what the tangents of the arrays that f holds add to it."""
        held, of_rule = arrays[: len(self.inexact)], arrays[len(self.inexact) :]
        tangents = [d for d, has in zip(darrays, self.inexact, strict=False) if has]
        return eval_jaxpr(self.slope, of_rule, z, *held, dz, *tangents)[0]


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
    checks.check_activation(activation)
    typed = _find_type(z.dtype, *map(jax.typeof, others))
    return (_trace_once if _is_of_jax(activation) else _trace)(activation, typed)


# An eager call that has nothing new must trace nothing.
@lru_cache(maxsize=1024)
def _find_type(dtype: np.dtype[Any], *others: Any) -> jax.ShapeDtypeStruct:
    """Return the type of z, which varies over the mesh axes over which one of the others does."""
    return jax.eval_shape(lambda x, *more: vary_as(x.astype(dtype), *more), *others)


# As they were when this was imported: what somebody puts in their places later may do another thing at every call.
_OF_JAX = {id(function): function for room in (jax.nn, jnp, lax) for function in vars(room).values()}


def _is_of_jax(activation: Any) -> bool:
    """Say whether a function is one that JAX itself has, by identity: such a one does the same at every call."""
    return _OF_JAX.get(id(activation)) is activation


def _trace(activation: Activation, z: jax.ShapeDtypeStruct) -> tuple[Program, tuple[Array, ...]]:
    # What is traced is a new function at each call, because JAX keeps the program of a function that it knows.
    try:
        traced = jax.make_jaxpr(lambda z: activation(z))(z)
    except Exception as error:
        error.add_note(checks.IN_ACTIVATION)
        raise
    checks.check_activation_output(traced.out_avals, z)
    # Calls stand where they are made from here on, because an inner ``jit`` has constants of its own.
    f = jax.make_jaxpr(lambda z: _evaluate(traced.jaxpr, traced.consts, z))(z)
    inexact = tuple(bool(jnp.issubdtype(array.dtype, jnp.inexact)) for array in f.consts)
    # Nothing differentiates the value, so that it needs no rules.
    value = jax.make_jaxpr(lambda z, *held: _evaluate(f.jaxpr, held, z, also=_WITH_RULE))(z, *f.consts)

    def differentiate(z: Array, *others: Array) -> Array:
        held, (dz, *given) = others[: len(inexact)], others[len(inexact) :]
        tangents = iter(given)
        dheld = (next(tangents) if has else np.zeros(h.shape, float0) for h, has in zip(held, inexact, strict=True))
        _, dy = jax.jvp(lambda z, *held: eval_jaxpr(f.jaxpr, held, z)[0], (z, *held), (dz, *dheld))
        return dy

    tangents = [array for array, has in zip(f.consts, inexact, strict=True) if has]
    rough = jax.make_jaxpr(differentiate)(z, *f.consts, z, *tangents)
    slope = jax.make_jaxpr(lambda *args: _evaluate(rough.jaxpr, rough.consts, *args))(z, *f.consts, z, *tangents)
    text = "\n".join([*map(_write, (value, slope)), _check_rules(traced, f, slope, z)])
    selects = _selects(slope.jaxpr, len(f.consts) + 1)
    settings = tuple(_find_settings(value, slope))
    return Program(text, settings, inexact, selects, value.jaxpr, slope.jaxpr), (*f.consts, *slope.consts)


_trace_once = lru_cache(maxsize=1024)(_trace)


def _evaluate(jaxpr: Any, consts: Sequence[Any], *args: Any, also: Sequence[str] = ()) -> list[Any]:
    """Evaluate a program, with the bodies of calls in their places; ``also`` of calls of these kinds."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        body = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        if body is not None and eqn.primitive.name in (*_CALLS, *also):
            found = _evaluate(body.jaxpr, body.consts, *map(read, eqn.invars), also=also)
        else:
            # A program of this equation alone, because how an equation is bound differs between versions of JAX.
            taken = list(dict.fromkeys(atom for atom in eqn.invars if not hasattr(atom, "val")))
            alone = jaxpr.replace(constvars=[], invars=taken, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
            found = eval_jaxpr(alone, (), *map(read, taken))
        values.update(zip(eqn.outvars, found, strict=True))
    return list(map(read, jaxpr.outvars))


def _check_rules(traced: Any, f: Any, slope: Any, z: jax.ShapeDtypeStruct) -> str:
    """Refuse rules of derivatives whose arrays cannot be arguments; return what else decides the derivative."""
    rules = (eqn for eqn in _equations(traced.jaxpr) if eqn.primitive.name in _WITH_RULE)
    if any(isinstance(array, Tracer) for array in f.consts) and any(rule.params.get("num_consts") for rule in rules):
        raise TypeError(checks.HELD_BY_RULE)
    if any(body.consts for program in (f, slope) for eqn in _equations(program.jaxpr) for body in _bodies(eqn)):
        raise TypeError(checks.HELD_INSIDE)
    if not any(eqn.primitive.name == "custom_lin" for eqn in _equations(slope.jaxpr)):
        return ""

    def transpose(z: Array, g: Array, *held: Array) -> Any:
        return jax.vjp(lambda z: eval_jaxpr(f.jaxpr, held, z)[0], z)[1](g)

    back = jax.make_jaxpr(transpose)(z, z, *f.consts)
    if back.consts:
        raise TypeError(checks.HELD_BY_VJP)
    return _write(back)


def _write(program: Any) -> str:
    """Return what a program computes, in words; arrays that JAX wrote into it, which its text leaves out, in bytes."""
    atoms = (atom for eqn in _equations(program.jaxpr) for atom in (*eqn.invars, *_returned(eqn)))
    arrays = (np.asarray(atom.val) for atom in (*atoms, *program.jaxpr.outvars) if np.ndim(getattr(atom, "val", 0)))
    return "\n".join([str(program), *(sha256(array.tobytes()).hexdigest() for array in arrays)])


def _find_settings(*programs: Any) -> Iterator[Any]:
    """Find what operations are told and that is equal by value; what is so by identity is new at each trace."""
    for program in programs:
        for eqn in _equations(program.jaxpr):
            if eqn.primitive.name not in (*_WITH_RULE, "custom_lin"):
                yield from (part for value in eqn.params.values() for part in _flatten(value))


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flatten(part)
    else:
        kind: Any = type(value)
        if kind.__eq__ is not object.__eq__ and kind.__hash__ is not None:
            yield value


def _returned(eqn: Any) -> Iterator[Any]:
    for body in _bodies(eqn):
        yield from body.jaxpr.outvars


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for body in _bodies(eqn):
            yield from _equations(body.jaxpr)


def _bodies(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if hasattr(body, "jaxpr") and hasattr(body, "consts"):
                yield body


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
