"""Contexts that ``jax.jit`` knows of: what is traced under one is not used outside of it, nor the other way round."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import jax

from jbn.replacing import Found

RuleT = TypeVar("RuleT", bound=Hashable)


class Scope(Generic[RuleT]):
    """The rules of the contexts of one kind that are entered, the innermost last.

    The rules are a part of the keys of JAX's caches, so that a function is traced anew where others hold. A context
    meets layers while they are traced, and so none where all was compiled under the same rules before.
    """

    def __init__(self) -> None:
        self._rules = jax.make_user_context(())
        self._found: ContextVar[tuple[Found, ...]] = ContextVar("found", default=())
        self._met: set[tuple[RuleT, ...]] = set()

    def active(self) -> Iterator[tuple[RuleT, Found]]:
        """Yield the rules that hold, each with the layers that its context has met so far."""
        return zip(self._rules.value, self._found.get(), strict=False)

    @contextmanager
    def enter(self, rule: RuleT) -> Iterator[Found]:
        """Let a rule hold inside a ``with`` block; yields the layers that it meets."""
        rules, found = (*self._rules.value, rule), Found()
        token = self._found.set((*self._found.get(), found))
        try:
            with self._rules(rules):
                yield found
        finally:
            self._found.reset(token)
            if found.paths or found.skipped:
                self._met.add(rules)

    def has_met(self, rule: RuleT) -> bool:
        """Say whether a rule has met layers here, now or before, so that compiled functions may hold them."""
        return (*self._rules.value, rule) in self._met
