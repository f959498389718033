"""One small network in Flax, of every kind of layer that is converted; other libraries have it in their own tests.

Its activation is smooth: at the kink of a ReLU a rounding decides whether there is a gradient, and from there on two
libraries train apart.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jbn.linen
import jbn.nnx

SHAPE = (4, 7, 7, 3)  # of a batch, features last
LABELS = 5
MOMENTUM, EPSILON = 0.9, 1e-5
FLAT = (6, 5, 5)  # what is flattened before ``fc``, features first
KINDS = {"channelwise": "depthwise", "up": "transposed"}
RATE, STEPS = 0.1, 10

# Largest error over the largest value of an array, float32: nothing differs but rounding, which ten steps let grow.
EVALUATED, TRAINED = 1e-6, 1e-5


class Net(nn.Module):
    unbiased: bool = False
    transpose_kernel: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        def norm(name: str) -> Any:
            return jbn.linen.BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON, unbiased=self.unbiased, name=name)

        x = nn.Conv(8, (3, 3), padding="VALID", use_bias=False, name="conv")(x)
        x = nn.silu(norm("bn1")(x))
        x = nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4, name="grouped")(x)
        x = nn.Conv(16, (2, 2), padding="VALID", feature_group_count=8, name="channelwise")(x)
        x = nn.silu(norm("bn2")(x))
        x = nn.ConvTranspose(6, (3, 3), (2, 2), "VALID", transpose_kernel=self.transpose_kernel, name="up")(x)
        x = nn.silu(norm("bn3")(x))
        return nn.Dense(LABELS, name="fc")(x.reshape(len(x), -1))


class NNXNet(nnx.Module):
    def __init__(self, unbiased: bool = False, transpose_kernel: bool = False, rngs: Any = None) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        options: dict[str, Any] = {"momentum": MOMENTUM, "epsilon": EPSILON, "unbiased": unbiased, "rngs": rngs}
        valid: dict[str, Any] = {"padding": "VALID", "rngs": rngs}
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, **valid)
        self.bn1 = jbn.nnx.BatchNorm(8, **options)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=4, **valid)
        self.channelwise = nnx.Conv(8, 16, (2, 2), feature_group_count=8, **valid)
        self.bn2 = jbn.nnx.BatchNorm(16, **options)
        self.up = nnx.ConvTranspose(16, 6, (3, 3), (2, 2), transpose_kernel=transpose_kernel, **valid)
        self.bn3 = jbn.nnx.BatchNorm(6, **options)
        self.fc = nnx.Linear(150, LABELS, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.silu(self.bn1(self.conv(x)))
        x = nnx.silu(self.bn2(self.channelwise(self.grouped(x))))
        x = nnx.silu(self.bn3(self.up(x)))
        return self.fc(x.reshape(len(x), -1))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images, features last, and labels."""
    rng = np.random.default_rng([step, 7])
    return rng.standard_normal(SHAPE, np.float32) + 1, rng.integers(0, LABELS, len(rng.random(SHAPE[0])))


def drawn(tree: Any, seed: int = 0) -> Any:
    """Draw values in the place of those of a tree, none of them special; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(keys: Any, leaf: Any) -> Any:
        values = 0.3 * rng.standard_normal(leaf.shape) + 0.1
        positive = any(word in jax.tree_util.keystr(keys) for word in ("var", "scale", "gamma"))
        return jnp.asarray(np.abs(values) + 0.5 if positive else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def linen_variables(net: Net, seed: int = 0) -> Any:
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(SHAPE), True))
    return drawn(shapes, seed)


@partial(jax.jit, static_argnums=0)
def evaluate(net: Net, variables: Any, x: Any) -> Any:
    return net.apply(variables, x, False)


def loss_of(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_linen(net: Net, variables: Any) -> tuple[list[float], Any]:
    """Take ten steps; return the losses and the variables after them."""

    @jax.jit
    def step(variables: Any, x: Any, labels: Any) -> Any:
        def of(params: Any) -> Any:
            logits, new = net.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return loss_of(logits, labels), new

        (loss, new), grads = jax.value_and_grad(of, has_aux=True)(variables["params"])
        return loss, {"params": jax.tree.map(lambda p, g: p - RATE * g, variables["params"], grads), **new}

    losses = []
    for number in range(STEPS):
        loss, variables = step(variables, *batch(number))
        losses.append(float(loss))
    return losses, variables


def gap(got: Any, want: Any) -> float:
    """Return the largest difference over the largest value, the worst of all arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(
        float(np.abs(np.asarray(g, np.float64) - np.asarray(w, np.float64)).max() / np.abs(w).max()) for g, w in pairs
    )
