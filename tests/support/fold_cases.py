"""Small networks that are built in Linen and in NNX from one description, and what of them can be folded."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

IMAGES, ROWS = (4, 8, 8, 3), (6, 3)


def conv(name, inputs, outputs, size=(3, 3), **options):
    return "Conv", name, (inputs, outputs, size), options


def up(name, inputs, outputs, size=(3, 3), **options):
    return "ConvTranspose", name, (inputs, outputs, size), options


def dense(name, inputs, outputs, **options):
    return "Dense", name, (inputs, outputs), options


def norm(name, features, **options):
    return "BatchNorm", name, (features,), options


class Net(NamedTuple):
    """One network in both libraries: ``body(call, x)`` calls layers by ``call(layer, x)``."""

    body: Any
    pairs: tuple[tuple[str, str], ...]
    kept: tuple[str, ...] = ()
    x: tuple[int, ...] = IMAGES
    theirs: bool = True  # whether Flax's norm can do it


def chain(*steps):
    def body(call, x):
        for step in steps:
            x = step(x) if callable(step) else call(step, x)
        return x

    return body


def twice(call, x):
    y = call(conv("a", 3, 4), x)
    return call(norm("n", 4), y) + y


def returned(call, x):
    y = call(conv("a", 3, 4), x)
    return call(norm("n", 4), y), y


def shared_layer(call, x):
    y = call(norm("n", 3), call(conv("a", 3, 3), x))
    return call(norm("m", 3), call(conv("a", 3, 3), y))


def shared_norm(call, x):
    y = call(norm("n", 3), call(conv("a", 3, 3), x))
    return call(norm("n", 3), call(conv("b", 3, 3), y))


def block(call, x):
    y = call(norm("n1", 6, activation=nn.relu), call(conv("c1", 3, 6, use_bias=False), x))
    y = call(conv("c2", 6, 6, use_bias=False), y)
    x = call(norm("n0", 6), call(conv("c0", 3, 6, (1, 1)), x))
    return call(norm("n2", 6, activation=nn.relu), y, residual=x)


def masked(call, x):
    y = call(conv("a", 3, 4), x)
    return call(norm("n", 4, activation=nn.silu), y, mask=jnp.arange(4)[:, None, None, None] < 3)


def standardized(x, kernel, *args, **kwargs):
    return jax.lax.conv_general_dilated(x, kernel - kernel.mean((0, 1, 2), keepdims=True), *args, **kwargs)


HALF = np.arange(27 * 4).reshape(3, 3, 3, 4) % 2
AN = (("a", "n"),)
NETS = {
    "conv, norm, relu": Net(chain(conv("a", 3, 4), norm("n", 4), nn.relu), AN),
    "no bias": Net(chain(conv("a", 3, 4, use_bias=False), norm("n", 4)), AN),
    "no scale": Net(chain(conv("a", 3, 4), norm("n", 4, use_scale=False)), AN),
    "neither scale nor bias": Net(chain(conv("a", 3, 4), norm("n", 4, use_scale=False, use_bias=False)), AN),
    "another epsilon": Net(chain(conv("a", 3, 4), norm("n", 4, epsilon=0.1)), AN),
    "strides, dilation, groups": Net(
        chain(conv("a", 3, 4, strides=(2, 1)), conv("b", 4, 6, kernel_dilation=2, feature_group_count=2), norm("n", 6)),
        (("b", "n"),),
    ),
    "depthwise": Net(chain(conv("a", 3, 6, feature_group_count=3), norm("n", 6)), AN),
    "1-D": Net(chain(lambda x: x[:, 0], conv("a", 3, 4, (3,)), norm("n", 4)), AN),
    "3-D": Net(chain(lambda x: x[:, None], conv("a", 3, 4, (1, 3, 2)), norm("n", 4)), AN),
    "transposed": Net(chain(up("a", 3, 4, strides=(2, 2)), norm("n", 4)), AN),
    "transposed, kernel too": Net(
        chain(up("a", 3, 4, strides=(2, 2), transpose_kernel=True, use_bias=False), norm("n", 4)), AN
    ),
    "dense": Net(chain(dense("a", 3, 5), norm("n", 5), jnp.tanh), AN, x=ROWS),
    "dense on images": Net(chain(dense("a", 3, 5, use_bias=False), norm("n", 5)), AN),
    "two in a row": Net(chain(dense("a", 3, 5), norm("n", 5), norm("m", 5)), AN, ("m",), x=ROWS),
    "norm, dense": Net(chain(norm("n", 3), dense("a", 3, 5)), (("n", "a"),), x=ROWS),
    "norm, conv without padding": Net(chain(norm("n", 3), conv("a", 3, 4, padding="VALID")), (("n", "a"),)),
    "norm, conv around": Net(chain(norm("n", 3), conv("a", 3, 4, padding="CIRCULAR")), (("n", "a"),)),
    "norm, conv 1×1": Net(chain(norm("n", 3), conv("a", 3, 4, (1, 1), use_bias=False)), (("n", "a"),)),
    "norm, conv padded with zeros": Net(chain(norm("n", 3), conv("a", 3, 4)), (), ("n",)),
    "norm, transposed": Net(chain(norm("n", 3), up("a", 3, 4, (1, 1))), (), ("n",)),
    "norm, relu, dense": Net(chain(norm("n", 3), nn.relu, dense("a", 3, 5)), (), ("n",), x=ROWS),
    "norm with relu, dense": Net(chain(norm("n", 3, activation=nn.relu), dense("a", 3, 5)), (), ("n",), ROWS, False),
    "norms on both sides": Net(chain(norm("m", 3), dense("a", 3, 5), norm("n", 5)), (*AN, ("m", "a")), x=ROWS),
    "a norm between two": Net(chain(dense("a", 3, 5), norm("n", 5), dense("b", 5, 4)), AN, x=ROWS),
    "relu between": Net(chain(conv("a", 3, 4), nn.relu, norm("n", 4)), (), ("n",)),
    "norm over another axis, dense": Net(chain(norm("n", 8, axis=1), dense("a", 8, 5)), (), ("n",), (4, 8, 8, 8)),
    "norm, conv that dilates x": Net(
        chain(norm("n", 3), conv("a", 3, 4, padding=((0, 0), (0, 0)), input_dilation=2)), (), ("n",)
    ),
    "conv of a masked kernel": Net(
        chain(norm("n", 3), conv("a", 3, 4, padding="VALID", mask=jnp.asarray(HALF)), norm("m", 4)), (), ("n", "m")
    ),
    "conv of a standardized kernel": Net(
        chain(conv("a", 3, 4, conv_general_dilated=standardized), norm("n", 4)), (), ("n",)
    ),
    "a kernel size of one number": Net(
        chain(lambda x: x[:, 0], norm("n", 3), conv("a", 3, 4, 3, padding="VALID")), (("n", "a"),)
    ),
    "a sum beside it": Net(twice, (), ("n",)),
    "returned beside it": Net(returned, (), ("n",)),
    "a layer called twice": Net(shared_layer, (), ("n", "m")),
    "a norm called twice": Net(shared_norm, (), ("n",)),
    "features on another axis": Net(chain(conv("a", 3, 4), norm("n", 8, axis=1)), (), ("n",)),
    "features on the last axis, counted": Net(chain(conv("a", 3, 4), norm("n", 4, axis=3)), AN),
    "a residual block": Net(block, (("c1", "n1"), ("c0", "n0"), ("c2", "n2")), theirs=False),
    "a mask": Net(masked, AN, theirs=False),
    "no norm": Net(chain(conv("a", 3, 4)), ()),
}


class OfLinen(nn.Module):
    body: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        layers: dict[str, Any] = {}

        def call(layer, x, **options):
            kind, name, sizes, given = layer
            if name not in layers:
                sizes = sizes[1:] if kind != "BatchNorm" else (True,)
                layers[name] = (self.norm if kind == "BatchNorm" else getattr(nn, kind))(*sizes, name=name, **given)
            return layers[name](x, **options)

        return self.body(call, x)


class OfNNX(nnx.Module):
    def __init__(self, body, norm, x):
        self.body, self.norm = body, norm
        self(x)  # makes the layers

    def __call__(self, x):
        def call(layer, x, **options):
            kind, name, sizes, given = layer
            if not hasattr(self, name):
                make = self.norm if kind == "BatchNorm" else getattr(nnx, {"Dense": "Linear"}.get(kind, kind))
                setattr(self, name, make(*sizes, rngs=nnx.Rngs(0), **given))
            return getattr(self, name)(x, **options)

        return self.body(call, x)


def numbers(tree):
    """Fill a tree with what a trained network might hold."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten_with_path(tree)

    def leaf(path, value):
        name = "".join(map(str, path[-2:]))
        noise = rng.standard_normal(value.shape)
        return jnp.asarray(np.abs(noise) + 0.5 if "var" in name else noise, value.dtype)

    return structure.unflatten(leaf(path, value) for path, value in leaves)
