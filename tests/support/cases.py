"""One table of cases, and the doors through which each of them is run."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.linen
import jbn.nnx


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: str = "float32"
    mask: tuple[int, ...] | None = None  # its shape
    activation: Any = None
    residual: bool = False
    use_scale: bool = True
    use_bias: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    affine: tuple[int, ...] | None = None  # the shape of scale and bias, where they come from outside

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(sorted(i % len(self.shape) for i in np.atleast_1d(self.axis)))

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.axes)

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape)) // int(np.prod(self.features))

    def __str__(self) -> str:
        changed = [
            f"{k}={getattr(v, '__name__', v)}"
            for k, v in self._asdict().items()
            if k != "shape" and v != Case._field_defaults[k]
        ]
        return " ".join([str(self.shape), *changed])


CASES = [
    Case((64, 5)),
    Case((7, 3), use_scale=False),
    Case((7, 3), use_bias=False),
    Case((9, 2), use_scale=False, use_bias=False, momentum=0.0),
    Case((4, 6, 5, 3), activation=jax.nn.relu),
    Case((4, 6, 5, 3), activation=jax.nn.relu, residual=True, epsilon=1e-3),
    Case((4, 3, 6, 5), axis=1, activation=jax.nn.silu, residual=True),
    Case((5, 4, 3), axis=-2, momentum=1.0),
    Case((5, 4, 3), axis=0),
    Case((2, 3, 4, 5), axis=(1, 3)),
    Case((2, 3, 4, 5), axis=(-1, 1), mask=(2, 1, 4, 1)),
    Case((2, 3, 2, 2, 3, 4), activation=jax.nn.silu),
    Case((12, 4), mask=(12, 1)),
    Case((12, 4), mask=(12, 4), activation=jax.nn.relu, residual=True),
    Case((12, 4), mask=(1, 4)),
    Case((3, 7, 4), mask=(3, 7, 1), residual=True),
    Case((3, 4, 7), axis=1, mask=(1, 1, 7), activation=jax.nn.silu),
    *(Case((16, 6, 4), dtype=dtype) for dtype in ("float16", "bfloat16", "float64")),
    *(
        Case((16, 6, 4), dtype=dtype, mask=(16, 6, 1), activation=jax.nn.relu, residual=True)
        for dtype in ("float16", "bfloat16", "float64")
    ),
    Case((7, 3), unbiased=True),
    Case((12, 4), mask=(12, 4), unbiased=True),
    Case((4, 6, 5, 3), activation=jax.nn.relu, residual=True, affine=(4, 1, 1, 3)),
    Case((4, 3, 6, 5), axis=1, mask=(4, 1, 6, 1), activation=jax.nn.silu, affine=(4, 3, 1, 1)),
    Case((3, 7, 4), mask=(3, 7, 1), affine=(3, 7, 1)),
    Case((2, 3, 4, 5), axis=(1, 3), affine=(2, 3, 1, 5)),
    Case((12, 4), use_bias=False, affine=(12, 4)),
    Case((7, 3), use_scale=False, affine=(7, 1)),
    *(Case((16, 6, 4), dtype=dtype, mask=(16, 1, 1), affine=(16, 1, 4)) for dtype in ("float64", "bfloat16")),
]


class Data(NamedTuple):
    x: Any
    scale: Any
    bias: Any
    mean: Any
    var: Any
    mask: Any
    residual: Any


def data(case: Case, seed: int = 0) -> Data:
    """Draw arrays for a case; x and residual in its dtype, the rest in float32."""
    rng = np.random.default_rng([seed, *case.shape])

    def normal(*shape, dtype="float32"):
        return rng.standard_normal(shape).astype(jax.numpy.dtype(dtype))

    mask = None if case.mask is None else rng.random(case.mask) < 0.7
    return Data(
        (2 * normal(*case.shape) + 3).astype(jax.numpy.dtype(case.dtype)),
        normal(*(case.affine or case.features)) + 2 if case.use_scale else None,
        normal(*(case.affine or case.features)) if case.use_bias else None,
        normal(*case.features) + 3,
        np.abs(normal(*case.features)) + 1,
        mask,
        normal(*case.shape, dtype=case.dtype) if case.residual else None,
    )


def by_function(case: Case, d: Data, train: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
    params = {k: v for k, v in (("scale", d.scale), ("bias", d.bias)) if v is not None}
    return jbn.bn_forward(
        params, {"mean": d.mean, "var": d.var}, d.x, train, axis=case.axis, momentum=case.momentum,
        epsilon=case.epsilon, mask=d.mask, activation=case.activation, residual=d.residual,
        unbiased=case.unbiased, **options,
    )  # fmt: skip


def by_linen(case: Case, d: Data, train: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
    new = {"activation": case.activation, "unbiased": case.unbiased}
    layer = jbn.linen.BatchNorm(not train, **new, **module_options(case), **options)
    y, new = layer.apply(linen_variables(case, d), d.x, **call_options(case, d), mutable=["batch_stats"])
    return y, new["batch_stats"]


def by_nnx(case: Case, d: Data, train: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
    new = {"activation": case.activation, "unbiased": case.unbiased}
    layer = nnx_layer(jbn.nnx.BatchNorm, case, d, train, **new, **options)
    return layer(d.x, **call_options(case, d)), {"mean": layer.mean[...], "var": layer.var[...]}


def by_flax(case: Case, d: Data, train: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Run the peer; what it lacks, the activation and the residual, is added in float32 after it."""
    layer = nn.BatchNorm(not train, **module_options(case), **options)
    y, new = layer.apply(linen_variables(case, d), d.x, mask=d.mask, mutable=["batch_stats"])
    return added(case, d, y), new["batch_stats"]


def by_flax_nnx(case: Case, d: Data, train: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
    layer = nnx_layer(nnx.BatchNorm, case, d, train, **options)
    return added(case, d, layer(d.x, mask=d.mask)), {"mean": layer.mean[...], "var": layer.var[...]}


def added(case: Case, d: Data, y: Any) -> Any:
    y = y if d.residual is None else y + d.residual
    return y if case.activation is None else case.activation(y)


def module_options(case: Case) -> dict[str, Any]:
    learns = {name: getattr(case, name) and case.affine is None for name in ("use_scale", "use_bias")}
    return {name: getattr(case, name) for name in ("axis", "momentum", "epsilon")} | learns


def call_options(case: Case, d: Data) -> dict[str, Any]:
    """Return what the call of a module takes beside x."""
    given = {} if case.affine is None else {"scale": d.scale, "bias": d.bias}
    return {"mask": d.mask, "residual": d.residual} | given


def linen_variables(case: Case, d: Data) -> dict[str, Any]:
    learned = (("scale", d.scale), ("bias", d.bias)) if case.affine is None else ()
    params = {k: v for k, v in learned if v is not None}
    return {"params": params, "batch_stats": {"mean": d.mean, "var": d.var}}


def nnx_layer(norm: Any, case: Case, d: Data, train: bool, **options: Any) -> Any:
    """Return a layer that holds the arrays of ``d``; with several feature axes they have more than one axis."""
    layer = norm(case.features[0], use_running_average=not train, rngs=nnx.Rngs(0), **module_options(case), **options)
    learned = ("scale", "bias") if case.affine is None else ()
    held = {name: getattr(d, name) for name in (*learned, "mean", "var")}
    nnx.update(layer, {name: jax.numpy.asarray(value) for name, value in held.items() if value is not None})
    return layer


DOORS = {"function": by_function, "linen": by_linen, "nnx": by_nnx}
