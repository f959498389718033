"""Contexts that ``jax.jit`` knows of: what is traced under one is not used outside of it, nor the other way round."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax

from jbn.replacing import Found

RuleT = TypeVar("RuleT", bound=Hashable)


@dataclass(eq=False)
class _Entered:
    """A context that is entered: of which scope, with which rule, what it has met, and whether another crosses it."""

    scope: Any
    rule: Any
    found: Found = field(default_factory=Found)
    crossed: bool = False


class _Stack(threading.local):
    """What is entered on this thread, the innermost last; JAX and Flax, too, hold contexts by thread."""

    def __init__(self) -> None:
        self.entered = list[_Entered]()


_STACK = _Stack()


class Scope(Generic[RuleT]):
    """The rules of the contexts of one kind that are entered, the innermost last.

    The rules are a part of the keys of JAX's caches, so that a function is traced anew where others hold. A context
    meets layers while they are traced, and so none where all was compiled under the same rules before.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rules = jax.make_user_context(())
        self._met: set[tuple[RuleT, ...]] = set()

    def active(self) -> Iterator[tuple[RuleT, Found]]:
        """Yield the rules that hold, each with the layers that its context has met so far."""
        return ((context.rule, context.found) for context in _STACK.entered if context.scope is self)

    @contextmanager
    def enter(self, rule: RuleT) -> Iterator[Found]:
        """Let a rule hold inside a ``with`` block; yields the layers that it meets."""
        context, rules = _Entered(self, rule), (*self._rules.value, rule)
        _STACK.entered.append(context)
        try:
            with self._rules(rules):
                yield context.found
        finally:
            self._leave(context)
            if context.found.paths or context.found.skipped:
                self._met.add(rules)

    def _leave(self, context: _Entered) -> None:
        """Take a context from the stack; where it is not the innermost, JAX has restored what no longer holds."""
        entered = _STACK.entered
        inside = entered[entered.index(context) + 1 :] if context in entered else []
        _STACK.entered = [other for other in entered if other is not context]
        rules = tuple(rule for rule, _ in self.active())
        if self._rules.value != rules:
            self._rules(rules).__enter__()
        for other in inside:
            other.crossed = True
        if inside or context.crossed:
            raise RuntimeError(
                f"{self._name}() ends while a context that was entered inside of it, or around it, does not: tasks or "
                "generators that run in turns have entered contexts, which JAX and Flax hold by thread. Expected "
                "blocks inside one another, without await or yield: enter the context inside the step."
            ) from None

    def has_met(self, rule: RuleT) -> bool:
        """Say whether a rule has met layers here, now or before, so that compiled functions may hold them."""
        return (*self._rules.value, rule) in self._met
