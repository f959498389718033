"""What a function of the user computes, as a program: equal programs do the same, whatever the functions hold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer, eval_jaxpr
from jax.dtypes import float0

from jbn.core import checks

# What can stand where it is called; a function of the user is computed again in the backward pass without being told to
# by ``jax.checkpoint``. The second kind has a rule for its derivative, which is lost by that.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
WITH_RULE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclass(frozen=True)
class Program:
    """A function, traced for arrays of some types; two are equal if they compute the same.

    Attributes:
        text: what it computes, and its derivative, in words.
        settings: what its operations are told, such as a mesh: the words of two can be the same.
        inexact: for each array that f holds, whether it has tangents.
        value: f(x), of its arguments x and the arrays that f holds.
        slope: f'(x) dx, of x, the arrays that f holds, the tangents of both, and the arrays that its rule alone holds.
    """

    text: str
    settings: tuple[Any, ...]
    inexact: tuple[bool, ...]
    value: Any = field(compare=False, repr=False)
    slope: Any = field(compare=False, repr=False)

    def __call__(self, args: Sequence[Array], arrays: Sequence[Array]) -> list[Array]:
        """Return f(x)."""
        return eval_jaxpr(self.value, (), *args, *arrays[: len(self.inexact)])

    def differentiate(
        self, args: Sequence[Array], arrays: Sequence[Array], dargs: Sequence[Array], darrays: Sequence[Array]
    ) -> list[Array]:
        """Return f'(x) dx, and what the tangents of the arrays that f holds add to it."""
        held, of_rule = arrays[: len(self.inexact)], arrays[len(self.inexact) :]
        tangents = [d for d, has in zip(darrays, self.inexact, strict=False) if has]
        return eval_jaxpr(self.slope, of_rule, *args, *held, *dargs, *tangents)


def trace(name: str, function: Callable[..., Any], *types: Any) -> Any:
    """Trace a function of the user, of arrays of these types, which is the argument ``name``."""
    # What is traced is a new function at each call, because JAX keeps the program of a function that it knows.
    try:
        return jax.make_jaxpr(lambda *args: function(*args))(*types)
    except Exception as error:
        error.add_note(checks.IN_FUNCTION.format(name=name))
        raise


def read_program(name: str, traced: Any, *types: Any) -> tuple[Program, tuple[Array, ...]]:
    """Return what was traced as a program, and the arrays that it holds."""
    # Calls stand where they are made from here on, because an inner ``jit`` has constants of its own.
    f = jax.make_jaxpr(lambda *args: inline(traced.jaxpr, traced.consts, *args))(*types)
    inexact = tuple(bool(jnp.issubdtype(array.dtype, jnp.inexact)) for array in f.consts)
    n = len(types)
    # Nothing differentiates the value, so that it needs no rules.
    value = jax.make_jaxpr(lambda *all: inline(f.jaxpr, all[n:], *all[:n], also=WITH_RULE))(*types, *f.consts)

    def differentiate(*given: Array) -> list[Array]:
        primals, dargs, rest = given[: n + len(inexact)], given[n + len(inexact) :][:n], given[2 * n + len(inexact) :]
        tangents = iter(rest)
        none = (np.zeros(array.shape, float0) for array in primals[n:])
        dheld = (next(tangents) if has else zero for zero, has in zip(none, inexact, strict=True))
        return jax.jvp(lambda *all: eval_jaxpr(f.jaxpr, all[n:], *all[:n]), primals, (*dargs, *dheld))[1]  # type: ignore[no-any-return]

    tangents = [array for array, has in zip(f.consts, inexact, strict=True) if has]
    rough = jax.make_jaxpr(differentiate)(*types, *f.consts, *types, *tangents)
    slope = jax.make_jaxpr(lambda *all: inline(rough.jaxpr, rough.consts, *all))(*types, *f.consts, *types, *tangents)
    programs = (value, slope, *_check_rules(name, traced, f, slope, inexact, *types))
    text, settings = "\n".join(map(write, programs)), tuple(find_settings(*programs))
    return Program(text, settings, inexact, value.jaxpr, slope.jaxpr), (*f.consts, *slope.consts)


def _check_rules(name: str, traced: Any, f: Any, slope: Any, inexact: tuple[bool, ...], *types: Any) -> list[Any]:
    """Refuse rules of derivatives whose arrays cannot be arguments; return what else decides the derivative."""
    rules = (eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name in WITH_RULE)
    if any(isinstance(array, Tracer) for array in f.consts) and any(rule.params.get("num_consts") for rule in rules):
        raise TypeError(checks.HELD_BY_RULE.format(name=name))
    if holds_inside(f) or holds_inside(slope):
        raise TypeError(checks.HELD_INSIDE.format(name=name))
    if not any(eqn.primitive.name == "custom_lin" for eqn in equations(slope.jaxpr)):
        return []

    def transpose(args: Any, held: Any, gs: Any) -> Any:
        def f_of(args: Any, floats: Any) -> Any:
            floats = iter(floats)
            return eval_jaxpr(
                f.jaxpr, [next(floats) if has else v for v, has in zip(held, inexact, strict=True)], *args
            )

        return jax.vjp(f_of, args, [v for v, has in zip(held, inexact, strict=True) if has])[1](gs)

    back = jax.make_jaxpr(transpose)(types, f.consts, f.out_avals)
    if back.consts or holds_inside(back):
        raise TypeError(checks.HELD_BY_VJP.format(name=name))
    return [back]


def find_types(function: Callable[..., Any], *types: Any) -> Any:
    """Return the types of what a function returns, with their shardings: ``jax.eval_shape`` leaves some of them out."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*types)
    return jax.tree.unflatten(jax.tree.structure(shapes), program.out_avals)


def inline(jaxpr: Any, consts: Sequence[Any], *args: Any, also: Sequence[str] = ()) -> list[Any]:
    """Evaluate a program, with the bodies of calls in their places; ``also`` of calls of these kinds."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in (*CALLS, *also):
            ((body, held),) = bodies(eqn)
            found = inline(body, held, *map(read, eqn.invars), also=also)
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
    for body, _ in bodies(eqn):
        yield from body.outvars


def equations(jaxpr: Any) -> Iterator[Any]:
    """Return the equations of a program, and those of the programs inside them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body, _ in bodies(eqn):
            yield from equations(body)


def holds_inside(program: Any) -> bool:
    """Say whether a program inside of this one holds arrays."""
    return any(held for eqn in equations(program.jaxpr) for _, held in bodies(eqn))


def bodies(eqn: Any) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Return the programs inside an equation, and the arrays that each holds: those of ``shard_map`` can hold none."""
    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if hasattr(body, "jaxpr") and hasattr(body, "consts"):
                yield body.jaxpr, body.consts
            elif hasattr(body, "eqns") and hasattr(body, "outvars"):
                yield body, ()
