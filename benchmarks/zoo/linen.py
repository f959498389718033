"""A model of Linen, as `benchmarks.zoo.measure` needs it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jbn.linen
from benchmarks.zoo.cases import Functions, Model, fill, widen
from jbn.folding.links import Folds
from jbn.observing.diagnose import Diagnosis
from jbn.paths import flatten

Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Linen(Model):
    """A model of Linen.

    Attributes:
        model: the module.
        variables: its params and batch_stats.
        axis: the axis of a map that its norms name; the model as it came trains in a map over one batch.
    """

    model: nn.Module
    variables: Mapping[str, Any]
    axis: str | None = None

    def count(self) -> int:
        return sum(path[-1] == "mean" for path in flatten(self.variables["batch_stats"])[0])

    def functions(self) -> Functions:
        return self._functions(self.model.apply)

    def widen(self) -> Functions:
        wide = {"dtype": jnp.float64}
        # Not every module has a dtype. None is that of the arrays.
        model = self.model.clone(**wide) if getattr(self.model, "dtype", None) is not None else self.model
        functions = self._functions(_with_flax(model.apply, self.also, wide) if self.also else model.apply)
        return dataclasses.replace(functions, params=widen(functions.params), others=widen(functions.others))

    def replace(self) -> tuple[Functions, int]:
        found = list[str]()

        def apply(*args: Any, **kwargs: Any) -> Any:
            with self._replace() as replaced:
                y = self.model.apply(*args, **kwargs)
            found.extend(path for path in replaced.paths if path not in found)
            return y

        functions = dataclasses.replace(self, axis=None)._functions(apply)
        x = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        jax.eval_shape(functions.evaluate, functions.params, functions.others, x)
        return functions, len(found)

    def fold(self, x: np.ndarray) -> tuple[Functions, Folds]:
        apply, variables, folds = jbn.linen.fold(self.model, self.variables, x, also=self.also, **self.evaluation)
        return dataclasses.replace(self, variables=variables)._functions(apply), folds

    def diagnose(self, x: np.ndarray) -> Diagnosis:
        with self._around():
            return jbn.linen.diagnose(self.model, self.variables, x, **self.training)

    def recalibrate(self, batches: Sequence[np.ndarray]) -> tuple[Any, Any]:
        with self._around():
            found = jbn.linen.recalibrate(self.model, self.variables, batches, **self.training)
        return self.variables["batch_stats"], found["batch_stats"]

    def freeze(self, x: np.ndarray) -> tuple[Any, int, Any, Any]:
        before = self.variables["batch_stats"]

        @jax.jit
        def train(variables: Any, x: Any) -> Any:
            return self.model.apply(variables, x, mutable=["batch_stats"], **self.training)

        with self._replace(), jbn.linen.freeze() as frozen:
            y, new = train(self.variables, x)
        return self.logits(y), len(frozen.paths), before, new["batch_stats"]

    def _replace(self) -> Any:
        overrides: dict[str, Any] = {} if self.axis is None else {"axis_name": None}
        return jbn.linen.replace(also=tuple(self.also), **overrides)

    def _around(self) -> Any:
        """Return the context that a user needs around ``diagnose``."""
        return nullcontext() if self.axis is None and not self.also else self._replace()

    def _functions(self, apply: Call) -> Functions:
        def evaluate(params: Any, others: Any, x: Any) -> Any:
            return self.logits(apply({**others, "params": params}, x, **self.evaluation))

        def train(params: Any, others: Any, x: Any) -> Any:
            return self.logits(apply({**others, "params": params}, x, mutable=["batch_stats"], **self.training)[0])

        def mapped(params: Any, others: Any, x: Any) -> Any:
            return jax.vmap(lambda x: train(params, others, x), axis_name=self.axis)(x[None])[0]

        others = {name: tree for name, tree in self.variables.items() if name != "params"}
        return Functions(self.variables["params"], others, evaluate, mapped if self.axis else train)


def draw_variables(model: nn.Module, shape: Sequence[int], seed: int = 0, **call: Any) -> Any:
    """Draw the variables of a model: nothing is compiled for it."""
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **call), x)
    rng = np.random.default_rng(seed)
    paths, leaves, tree = flatten(dict(shapes))
    return jax.tree.unflatten(tree, [fill(path[-1], leaf.shape, rng) for path, leaf in zip(paths, leaves, strict=True)])


def _with_flax(apply: Call, also: Sequence[type], fields: dict[str, Any]) -> Call:
    """Return a call in which Flax's norm is in the place of its copies, which may compute in float32 whatever comes."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if type(layer) not in also or context.method_name != "__call__":
            return call(*args, **kwargs)
        known = {f.name: getattr(layer, f.name) for f in dataclasses.fields(nn.BatchNorm) if hasattr(layer, f.name)}
        return nn.BatchNorm(**known | fields | {"parent": layer.scope})(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return apply(*args, **kwargs)

    return call
