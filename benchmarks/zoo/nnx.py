"""A model of NNX, as `benchmarks.zoo.measure` needs it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn.nnx
from benchmarks.zoo.cases import Functions, Model, fill, widen
from jbn.folding.links import Folds
from jbn.observing.diagnose import Diagnosis


@dataclass(frozen=True, kw_only=True)
class NNX(Model):
    """A model of NNX, which stays as it is.

    Attributes:
        model: the module.
    """

    model: Any

    def count(self) -> int:
        return sum(path[-1] == "mean" for path, _ in nnx.to_flat_state(nnx.state(self.model, nnx.BatchStat)))

    def functions(self) -> Functions:
        return self._functions(nnx.clone(self.model))

    def widen(self) -> Functions:
        model = nnx.clone(self.model)
        for _, module in nnx.iter_graph(model):
            if isinstance(module, nnx.Module) and getattr(module, "dtype", None) is not None:
                setattr(module, "dtype", jnp.float64)  # noqa: B010
        functions = self._functions(model)
        return dataclasses.replace(functions, params=widen(functions.params), others=widen(functions.others))

    def replace(self) -> tuple[Functions, int]:
        model, found = jbn.nnx.replace(nnx.clone(self.model), also=tuple(self.also))
        return self._functions(model), len(found.paths)

    def fold(self, x: np.ndarray) -> tuple[Functions, Folds]:
        model, folds = jbn.nnx.fold(self.model, x, also=self.also, **self.evaluation)
        return self._functions(model), folds

    def diagnose(self, x: np.ndarray) -> Diagnosis:
        return jbn.nnx.diagnose(self._ours(), x, **self.training)

    def recalibrate(self, batches: Sequence[np.ndarray]) -> tuple[Any, Any]:
        model = jbn.nnx.recalibrate(self._ours(), batches, **self.training)
        return nnx.state(self.model, nnx.BatchStat), nnx.state(model, nnx.BatchStat)

    def freeze(self, x: np.ndarray) -> tuple[Any, int, Any, Any]:
        model, _ = jbn.nnx.replace(nnx.clone(self.model), also=tuple(self.also))
        model, frozen = jbn.nnx.freeze(model)
        model.train()
        y = nnx.jit(lambda model, x: model(x, **self.training))(model, x)
        before, after = (nnx.state(m, nnx.BatchStat) for m in (self.model, model))
        return self.logits(y), len(frozen), before, after

    def _ours(self) -> Any:
        """Return a copy as a user gives it to ``diagnose``."""
        model = nnx.clone(self.model)
        return jbn.nnx.replace(model, also=tuple(self.also))[0] if self.also else model

    def _functions(self, model: Any) -> Functions:
        def run(switch: Callable[[Any], Any], call: dict[str, Any]) -> Callable[[Any, Any, Any], Any]:
            def apply(params: Any, others: Any, x: Any) -> Any:
                new = nnx.merge(graph, params, others, copy=True)
                switch(new)
                return self.logits(new(x, **call))

            return apply

        split: Any = nnx.split(model, nnx.Param, ...)
        graph, params, others = split
        evaluate, train = run(lambda m: m.eval(), self.evaluation), run(lambda m: m.train(), self.training)
        return Functions(nnx.pure(params), nnx.pure(others), evaluate, train)


def draw_model(make: Callable[[], Any], seed: int = 0) -> Any:
    """Make a model with arrays that are drawn: nothing is compiled for it."""
    split: Any = nnx.split(nnx.eval_shape(make))
    graph, state = split
    rng = np.random.default_rng(seed)
    drawn = [(path, v.replace(jnp.asarray(fill(str(path[-1]), v.shape, rng)))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(drawn))
