"""Training steps with batch normalization of two libraries and without any, compiled, and what they keep."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from jbn import remat_policy
from jbn.lab.models import NETWORKS
from jbn.linen import BatchNorm

# Of the loss and of the norm of its gradient: float32 in another order through all layers.
AGREE = 1e-3


class InPlace(nn.Module):
    """What stands in the place of jbn's batch norm and is called as it is: a change of x, then addition, activation."""

    use_running_average: bool
    momentum: float
    activation: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, residual: Array | None = None, mask: Array | None = None) -> Array:
        """Return y."""
        y = self.change(x, mask)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)

    @nn.nowrap
    def change(self, x: Array, mask: Array | None) -> Array:
        """Return what comes before addition and activation."""
        raise NotImplementedError


class OfFlax(InPlace):
    """Flax's batch norm."""

    @nn.nowrap
    def change(self, x: Array, mask: Array | None) -> Array:
        """Return x, normalized."""
        return nn.BatchNorm(self.use_running_average, momentum=self.momentum, name="norm")(x, mask=mask)


class Bias(InPlace):
    """No norm: a bias."""

    @nn.nowrap
    def change(self, x: Array, mask: Array | None) -> Array:
        """Return x and the bias."""
        return x + self.param("bias", nn.initializers.zeros, x.shape[-1:]).reshape((1,) * (x.ndim - 1) + (-1,))


@dataclass(frozen=True)
class Arm:
    """A step: its name in the figure, what stands in the places of batch norm, and whether y is made twice."""

    label: str
    norm: Callable[..., Any]
    again: bool = False


# By their names in the table.
ARMS = {
    "none": Arm("none, a bias", Bias),
    "Flax": Arm("batch norm of Flax", OfFlax),
    "jbn": Arm("batch norm of jbn\n(this library)", BatchNorm),
    "jbn, remat": Arm("jbn with\nremat_policy", BatchNorm, again=True),
}
OURS, LEANER = "jbn", "jbn, remat"


class Step(NamedTuple):
    """A training step that is compiled."""

    call: Callable[[], Any]
    kept: int  # bytes between forward and backward
    temporaries: int  # bytes beside arguments and outputs, at the peak
    traffic: float  # bytes read and written, by the compiler of this machine
    flops: float


def kept_bytes(function: Callable[..., Any], varied: Any, *others: Any) -> int:
    """Return the bytes that ``jax.vjp`` holds for the backward pass, each array counted once.

    Args:
        function: of ``varied`` and ``others``; returns what is differentiated, and more.
        varied: what it is differentiated by.
        others: more of its arguments.
    """

    def residuals(varied: Any, *others: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda varied: function(varied, *others), varied, has_aux=True)[1])

    arrays = {id(variable): variable.aval for variable in jax.make_jaxpr(residuals)(varied, *others).jaxpr.outvars}
    return sum(array.size * array.dtype.itemsize for array in arrays.values())  # type: ignore[attr-defined]


@lru_cache(4)
def prepare(network: str, shape: tuple[int, int, int, int]) -> dict[str, Step]:
    """Return the step of each arm, compiled, after it was seen that all but the first compute the same."""
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.standard_normal(shape, np.float32)), jnp.arange(shape[0]) % 10
    steps = {name: _compile(network, arm, images, labels) for name, arm in ARMS.items()}
    found = {name: [float(value) for value in step.call()[0]] for name, step in steps.items()}
    for name in list(ARMS)[1:]:
        if not np.allclose(found[name], found[OURS], rtol=AGREE, atol=0):
            raise ArithmeticError(f"{network}: loss and gradient of {name} are {found[name]}, of {OURS} {found[OURS]}")
    return steps


def _compile(network: str, arm: Arm, images: Array, labels: Array) -> Step:
    model, tx = NETWORKS[network](batch_norm=True, norm=arm.norm), optax.sgd(0.1, momentum=0.9)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images[:2])
    params, stats = variables["params"], variables.get("batch_stats", {})

    def loss(params: Any, stats: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        logits, new = model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    of_params = jax.checkpoint(loss, policy=remat_policy()) if arm.again else loss

    def step(params: Any, moving: Any, stats: Any, images: Array, labels: Array) -> Any:
        (value, new), grads = jax.value_and_grad(of_params, has_aux=True)(params, stats, images, labels)
        updates, moving = tx.update(grads, moving)
        return (value, optax.tree.norm(grads)), optax.apply_updates(params, updates), moving, new

    args = (params, tx.init(params), stats, images, labels)
    program = jax.jit(step).lower(*args).compile()
    memory, told = program.memory_analysis(), program.cost_analysis() or {}
    return Step(
        lambda: program(*args),
        kept_bytes(of_params, params, stats, images, labels),
        memory.temp_size_in_bytes if memory else 0,
        told.get("bytes accessed", math.nan),
        told.get("flops", math.nan),
    )
