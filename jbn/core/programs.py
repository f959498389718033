"""What a function of the user computes, as a program: equal programs do the same, whatever the functions hold."""

import inspect
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
MAPPED = "custom_vmap_call"
# How deep rules are followed, as one can have another inside without an end: the next decides the sixth derivative.
MOST_ORDERS = 4


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
    inexact = tuple(map(_is_inexact, f.consts))
    n = len(types)
    # Nothing differentiates the value, so that it needs no rules.
    value = jax.make_jaxpr(lambda *all: inline(f.jaxpr, all[n:], *all[:n], also=WITH_RULE))(*types, *f.consts)

    def run(*all: Array) -> list[Array]:
        return eval_jaxpr(f.jaxpr, all[n:], *all[:n])

    given = (*types, *f.consts)
    rough = _find_slope(run, given)
    slope = jax.make_jaxpr(lambda *all: inline(rough.jaxpr, rough.consts, *all))(*rough.in_avals)
    _check_rules(name, traced, f, slope)
    programs = [value, slope]
    if _is_transposed(slope):
        programs.append(_find_transpose(run, given, f.out_avals))
        if programs[-1].consts or holds_inside(programs[-1]):
            raise TypeError(checks.HELD_BY_VJP.format(name=name))
    programs += _find_rules(name, *programs)
    settings = (*find_settings(*programs), *(_digest(array) for rule in programs[2:] for array in rule.consts))
    text = "\n".join(map(write, programs))
    return Program(text, settings, inexact, value.jaxpr, slope.jaxpr), (*f.consts, *slope.consts)


def _find_slope(run: Callable[..., list[Array]], given: Sequence[Any]) -> Any:
    """Return f'(x) dx as a program of x and of the tangents of what has some in it."""

    def differentiate(*all: Array) -> list[Array]:
        primals, tangents = all[: len(given)], iter(all[len(given) :])
        dargs = tuple(next(tangents) if _is_inexact(a) else np.zeros(a.shape, float0) for a in primals)
        return jax.jvp(run, primals, dargs)[1]  # type: ignore[no-any-return]

    return jax.make_jaxpr(differentiate)(*given, *filter(_is_inexact, given))


def _find_transpose(run: Callable[..., list[Array]], given: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Return the cotangents of x as a program of x and of those of f(x)."""

    def transpose(all: Any, gs: Any) -> Any:
        def run_of(inexact: Any) -> Any:
            floats = iter(inexact)
            found = run(*(next(floats) if _is_inexact(a) else a for a in all))
            return [a for a in found if _is_inexact(a)]

        return jax.vjp(run_of, list(filter(_is_inexact, all)))[1](gs)

    return jax.make_jaxpr(transpose)(list(given), list(filter(_is_inexact, outputs)))


def _is_inexact(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def _is_transposed(slope: Any) -> bool:
    """Say whether a slope is that of a ``jax.custom_vjp``, of which the transpose alone can be computed."""
    return any(eqn.primitive.name == "custom_lin" for eqn in equations(slope.jaxpr))


def _check_rules(name: str, traced: Any, f: Any, slope: Any) -> None:
    """Refuse rules of derivatives whose arrays cannot be arguments."""
    rules = (eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name in WITH_RULE)
    if any(isinstance(array, Tracer) for array in f.consts) and any(rule.params.get("num_consts") for rule in rules):
        raise TypeError(checks.HELD_BY_RULE.format(name=name))
    if holds_inside(f) or holds_inside(slope):
        raise TypeError(checks.HELD_INSIDE.format(name=name))


def _find_rules(name: str, value: Any, *derivatives: Any) -> list[Any]:
    """Return what the rules inside of derivatives compute, and those inside of these, and how functions are mapped.

    Equal programs can have such rules that differ, because the text of a program has none of them. Equal ones are all
    returned: which equation has which rule, and what is inside of it, follows from their order alone.
    """
    level = [(program.jaxpr, eqn) for program in derivatives for eqn in _live(program.jaxpr)]
    level += [(value.jaxpr, eqn) for eqn in equations(value.jaxpr) if eqn.primitive.name == MAPPED]
    found = list[Any]()
    for _ in range(MOST_ORDERS):
        rules = [rule for jaxpr, eqn in level if (rule := _read_rule(jaxpr, eqn)) is not None]
        if any(isinstance(array, Tracer) for rule in rules for array in rule.consts):
            raise TypeError(checks.HELD_BY_INNER_RULE.format(name=name))
        level = [(rule.jaxpr, eqn) for rule in rules for eqn in _live(rule.jaxpr)]
        found += rules
    return found


def _live(jaxpr: Any) -> Iterator[Any]:
    """Return the equations with rules, also inside of others, on which what a program returns depends."""
    needed = {atom for atom in jaxpr.outvars if not hasattr(atom, "val")}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not hasattr(atom, "val"))
            inside = (inner for body, _ in bodies(eqn) for inner in equations(body))
            yield from (each for each in (eqn, *inside) if each.primitive.name in (*WITH_RULE, MAPPED))


def _read_rule(jaxpr: Any, eqn: Any) -> Any:
    """Return what the rule of an equation computes: a derivative, or two of a kind at once; None if it refuses that."""
    program, taken = _take_out(jaxpr, eqn)

    def run(*args: Array) -> list[Array]:
        return eval_jaxpr(program, (), *args)

    if eqn.primitive.name == MAPPED:
        # JAX maps no array that the function reads from outside.
        held = eqn.invars[: eqn.params["in_tree"].children()[0].num_leaves]
        try:
            return _map(run, [atom.aval for atom in taken], [None if atom in held else 0 for atom in taken])
        except Exception:  # Not every rule is for all arguments, and nobody maps this one yet.
            return None
    given = [atom.aval for atom in taken]
    slope = _find_slope(run, given)
    return _find_transpose(run, given, [atom.aval for atom in eqn.outvars]) if _is_transposed(slope) else slope


def _map(run: Callable[..., list[Array]], given: Sequence[Any], axes: Sequence[int | None]) -> Any:
    """Return what a function computes of two of each of what is mapped."""
    shapes = [a.shape if axis is None else (2, *a.shape) for a, axis in zip(given, axes, strict=True)]
    both = [jax.ShapeDtypeStruct(shape, a.dtype) for shape, a in zip(shapes, given, strict=True)]
    return jax.make_jaxpr(jax.vmap(run, in_axes=tuple(axes), axis_size=2))(*both)


def _digest(array: Any) -> str:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return sha256(np.asarray(array).tobytes()).hexdigest()


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
            alone, taken = _take_out(jaxpr, eqn)
            found = eval_jaxpr(alone, (), *map(read, taken))
        values.update(zip(eqn.outvars, found, strict=True))
    return list(map(read, jaxpr.outvars))


def _take_out(jaxpr: Any, eqn: Any) -> tuple[Any, list[Any]]:
    """Return a program of one equation alone, and what it takes: how one is bound differs between versions of JAX."""
    taken = list(dict.fromkeys(atom for atom in eqn.invars if not hasattr(atom, "val")))
    return jaxpr.replace(constvars=[], invars=taken, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects), taken


def write(program: Any) -> str:
    """Return what a program computes, in words; arrays that JAX wrote into it, which its text leaves out, in bytes."""
    atoms = (atom for eqn in equations(program.jaxpr) for atom in (*eqn.invars, *returned(eqn)))
    arrays = (atom.val for atom in (*atoms, *program.jaxpr.outvars) if np.ndim(getattr(atom, "val", 0)))
    return "\n".join([str(program), *map(_digest, arrays)])


def find_settings(*programs: Any) -> Iterator[Any]:
    """Find what operations are told and that is equal by value; what is so by identity is new at each trace."""
    for program in programs:
        for eqn in equations(program.jaxpr):
            if eqn.primitive.name not in (*WITH_RULE, "custom_lin"):
                yield from (part for value in eqn.params.values() for part in _flatten(value))
            if eqn.primitive.name == MAPPED:
                yield inspect.unwrap(eqn.params["rule"])


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
