"""The batch norms of the field behind one interface, for measurements.

All get images in the layout of the library, the same epsilon, the same momentum in each one's convention, and float32
parameters and running statistics. Every other setting is the library's default, with these exceptions:

- Flax, Linen and NNX: ``dtype`` is that of x. Without it, y of bfloat16 x is float32.
- Haiku and Equinox compute in the dtype of x, and the statistics of bfloat16 x would be bfloat16. So x becomes
  float32 before and y bfloat16 after, as a maintainer of Haiku advises (dm-haiku issue 396).
- Equinox: ``mode="batch"``, which normalizes by the statistics of the batch as the others do, and which its warning
  advises; the default, "ema", normalizes by the running ones. It sees one image (C, H, W) under `jax.vmap`.
- Keras: the JAX backend, by ``stateless_call``; the dtype policy of bfloat16 x is ``mixed_bfloat16``.
- PyTorch: on CPU, in both memory formats: contiguous, the default, and ``channels_last``, which is NHWC.

A library is imported when it is asked for, and none of them is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jbn
from benchmarks.layers import EPSILON, MOMENTUM, Jitted, Layer, Norm, Torch
from jbn.version import install

Activation = Callable[[Any], Any]
Groups = Sequence[Sequence[int]] | int
"""Groups of shards by their indices, or the number of examples in a group."""


class Lacking(ValueError):
    """The library has no such argument."""


class Peer(NamedTuple):
    """One library.

    Attributes:
        name: as it stands in tables.
        package: the distribution that is installed.
        module: what is imported.
        make: the adapter; None for PyTorch, which has no `Layer`.
        channels_last: whether PyTorch gets x in the memory format of that name.
        axis: that of the features in an array of four axes.
        debiased: whether the running mean is divided by one minus the weight of the initial one.
        prior: what the initial variance of 1 adds to the running one in the first step.
        across_shards: whether it can share statistics under `jax.shard_map`.
    """

    name: str
    package: str
    module: str
    make: Callable[[int, Any, Any, Activation | None, Groups | None], Layer] | None
    axis: int = -1
    debiased: bool = False
    prior: float = MOMENTUM
    across_shards: bool = True
    channels_last: bool = False

    def missing(self) -> str | None:
        """Say why this environment lacks the library; None where it has it."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.name} is left out: {self.package} is not installed: {install('peers')}"
        if self.module == "keras" and os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
            return f"{self.name} is left out: KERAS_BACKEND is {os.environ['KERAS_BACKEND']}, not jax"
        return None

    @property
    def version(self) -> str:
        """Its version, without the local part."""
        return importlib.metadata.version(self.package).partition("+")[0]

    def layer(
        self,
        features: int,
        dtype: Any = jnp.float32,
        axis_name: str | None = None,
        activation: Activation | None = None,
        groups: Groups | None = None,
    ) -> Layer:
        """Return a layer that is pure; `Lacking` where the library has no argument for it.

        Args:
            features: the number of features.
            dtype: that of x and y.
            axis_name: the axis of `jax.shard_map` that makes one batch of all shards.
            activation: inside jbn's rule, after every other norm.
            groups: which shards, or how many examples, share statistics; all of them unless given.
        """
        if self.make is None:
            raise TypeError(f"{self.name} has no pure functions; use norm()")
        return self.make(features, dtype, axis_name, activation, groups)

    def images(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Return what the layer gets for images of shape (N, H, W, C)."""
        n, h, w, c = x.shape
        struct: Any = jax.ShapeDtypeStruct
        return struct((n, c, h, w) if self.axis == 1 else (n, h, w, c), x.dtype, sharding=x.sharding)

    def norm(self, features: int) -> Norm:
        """Return a float32 layer that takes and returns NumPy arrays."""
        return Torch(features, self.channels_last) if self.make is None else Jitted(self.layer(features), self.axis)


def _activated(y: Any, activation: Activation | None) -> Any:
    return y if activation is None else activation(y)


def _pair(params: Any, state: Any, apply: Callable[..., tuple[Any, Any]]) -> Layer:
    """Return a layer whose state has two leaves, mean and var, in this order."""
    tree = jax.tree.structure(state)

    def running(state: Any) -> tuple[Any, Any]:
        mean, var = jax.tree.leaves(state)
        return mean, var

    return Layer(params, state, apply, running, lambda mean, var: jax.tree.unflatten(tree, (mean, var)))


def _jbn(features: int, dtype: Any, axis_name: Any, activation: Activation | None, groups: Groups | None) -> Layer:
    options: Any = {"momentum": MOMENTUM, "epsilon": EPSILON, "axis_name": axis_name, "activation": activation}
    options |= {"group_size" if isinstance(groups, int) else "axis_index_groups": groups}

    def apply(params: Any, state: Any, x: Any, train: bool, mask: Any = None) -> tuple[Any, Any]:
        return jbn.bn_forward(params, state, x, train, mask=mask, **options)

    params, state = jbn.bn_init(features)
    return _pair(params, state, apply)


def _linen(features: int, dtype: Any, axis_name: Any, activation: Activation | None, groups: Groups | None) -> Layer:
    import flax.linen as nn

    options: Any = {"momentum": MOMENTUM, "epsilon": EPSILON, "dtype": dtype, "axis_name": axis_name}
    options["axis_index_groups"] = _of_shards(groups)

    def apply(params: Any, state: Any, x: Any, train: bool, mask: Any = None) -> tuple[Any, Any]:
        norm = nn.BatchNorm(not train, **options)
        y, new = norm.apply({"params": params, "batch_stats": state}, x, mask=mask, mutable=["batch_stats"])
        return _activated(y, activation), new["batch_stats"]

    variables: Any = nn.BatchNorm(True).init(jax.random.key(0), jnp.zeros((1, 1, 1, features)))
    return _pair(variables["params"], variables["batch_stats"], apply)


def _nnx(features: int, dtype: Any, axis_name: Any, activation: Activation | None, groups: Groups | None) -> Layer:
    from flax import nnx

    options: Any = {"momentum": MOMENTUM, "epsilon": EPSILON, "dtype": dtype, "axis_name": axis_name}
    options["axis_index_groups"] = _of_shards(groups)
    parts: Any = nnx.split(nnx.BatchNorm(features, **options, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    graph, params, state = parts

    def apply(params: Any, state: Any, x: Any, train: bool, mask: Any = None) -> tuple[Any, Any]:
        norm = nnx.merge(graph, params, state, copy=True)  # or it writes into state
        y = norm(x, use_running_average=not train, mask=mask)
        return _activated(y, activation), nnx.state(norm, nnx.BatchStat)

    return _pair(params, state, apply)


def _of_shards(groups: Groups | None) -> Sequence[Sequence[int]] | None:
    if isinstance(groups, int):
        raise Lacking("groups are groups of shards, not of examples")
    return groups


def _unmasked(mask: Any) -> None:
    if mask is not None:
        raise Lacking("there is no mask")


def _haiku(features: int, dtype: Any, axis_name: Any, activation: Activation | None, groups: Groups | None) -> Layer:
    import haiku as hk

    across = {"cross_replica_axis": axis_name, "cross_replica_axis_index_groups": _of_shards(groups)}

    def norm(**across: Any) -> Any:
        options: Any = {"eps": EPSILON, "name": "norm", **across}
        return hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, MOMENTUM, **options)(x, train))

    def apply(params: Any, state: Any, x: Any, train: bool, mask: Any = None) -> tuple[Any, Any]:
        _unmasked(mask)
        y, state = norm(**across).apply(params, state, None, x.astype(jnp.float32), train)
        return _activated(y.astype(dtype), activation), state

    # Outside an axis it cannot synchronize, and what it makes then is the same.
    params, fresh = norm().init(None, jnp.zeros((1, 1, 1, features)), True)
    names = "norm/~/mean_ema", "norm/~/var_ema"

    def running(state: Any) -> tuple[Any, Any]:
        mean, var = (state[name]["average"].ravel() for name in names)
        return mean, var

    def at(*statistics: Any) -> Any:
        pairs = zip(names, statistics, strict=True)
        return {name: {**fresh[name], "average": jnp.reshape(value, (1, 1, 1, features))} for name, value in pairs}

    return Layer(params, fresh, apply, running, at)


def _equinox(features: int, dtype: Any, axis_name: Any, activation: Activation | None, groups: Groups | None) -> Layer:
    import equinox as eqx

    if groups is not None:
        raise Lacking("there are no groups")
    axes = "batch" if axis_name is None else ("batch", axis_name)
    options: Any = {"eps": EPSILON, "momentum": MOMENTUM, "mode": "batch"}
    norm, fresh = eqx.nn.make_with_state(eqx.nn.BatchNorm)(features, axes, **options)
    params, static = eqx.partition(norm, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(fresh)  # a State may be used once: every call unflattens its own

    def apply(params: Any, state: Any, x: Any, train: bool, mask: Any = None) -> tuple[Any, Any]:
        _unmasked(mask)
        norm = eqx.combine(params, static)

        def one(image: Any, state: Any) -> Any:
            return norm(image, state, inference=not train)

        over = jax.vmap(one, (0, None), (0, None), axis_name="batch")
        y, state = over(x.astype(jnp.float32), jax.tree.unflatten(tree, state))
        return _activated(y.astype(dtype), activation), jax.tree.leaves(state)

    def running(state: Any) -> tuple[Any, Any]:
        state = jax.tree.unflatten(tree, state)
        left = 1 - MOMENTUM ** state.get(norm.batch_counter)
        mean, var = state.get(norm.batch_state_index)
        return mean / left, var / left

    def at(mean: Any, var: Any) -> Any:
        state = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(state.set(norm.batch_state_index, (jnp.asarray(mean), jnp.asarray(var))))

    return Layer(params, leaves, apply, running, at)


def _keras(features: int, dtype: Any, axis_name: Any, activation: Activation | None, groups: Groups | None) -> Layer:
    if axis_name is not None or groups is not None:
        raise Lacking("Keras synchronizes statistics on TensorFlow only")
    import keras

    policy = "mixed_bfloat16" if dtype == jnp.bfloat16 else "float32"
    norm = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
    norm.build((None, None, None, features))

    def apply(params: Any, state: Any, x: Any, train: bool, mask: Any = None) -> tuple[Any, Any]:
        valid = None if mask is None else mask[..., 0]
        y, state = norm.stateless_call(params, state, x, training=train, mask=valid)
        return _activated(y, activation), state

    params, state = ([v.value for v in vs] for vs in (norm.trainable_variables, norm.non_trainable_variables))
    return _pair(params, state, apply)


PEERS = (
    Peer("jbn", "jbn", "jbn", _jbn),
    Peer("Flax Linen", "flax", "flax", _linen),
    Peer("Flax NNX", "flax", "flax", _nnx),
    Peer("Haiku", "dm-haiku", "haiku", _haiku, debiased=True, prior=0.0),
    Peer("Equinox", "equinox", "equinox", _equinox, axis=1, debiased=True, prior=MOMENTUM / (1 - MOMENTUM)),
    Peer("Keras", "keras", "keras", _keras, across_shards=False),
    Peer("PyTorch", "torch", "torch", None, axis=1, across_shards=False),
    Peer("PyTorch NHWC", "torch", "torch", None, axis=1, across_shards=False, channels_last=True),
)


def installed(report: Callable[[str], Any] = print) -> list[Peer]:
    """Return the libraries that are here, and say in one line each which are not."""
    for reason in filter(None, (peer.missing() for peer in PEERS)):
        report(reason)
    return [peer for peer in PEERS if peer.missing() is None]
