"""A normalization by running statistics as a multiply-add, ``affine``, and inside one kernel beside it, ``fold``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jbn.arguments import read_choice
from jbn.converting.trees import AnyArray, as_numpy, narrow
from jbn.core import checks
from jbn.core.layout import Layout
from jbn.core.numbers import read_epsilon
from jbn.core.prepare import ParamsLike, StateLike
from jbn.core.state import Params
from jbn.paths import count_of

Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]
"""The padding of a convolution as Flax spells it: a name, a number, or a number or (before, after) for each axis."""

# Paddings of Flax that put no zeros beside x.
_WITHOUT_ZEROS = ("VALID", "CIRCULAR", "REFLECT")
_PLACES = ("previous", "next")


def affine(params: ParamsLike, state: StateLike, *, epsilon: float = 1e-5) -> Params:
    r"""Return the scale a and the bias b of normalization by running statistics, :math:`y = a x + b`.

    .. math:: a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}, \qquad b = \beta - \mu a

    The form loses the digits that x and μ share: in float32 y is off by about :math:`2^{-24} |a \mu|`, 6e-8 at mean/std
    1, 6e-6 at 10², 6e-4 at 10⁴. ``bn_forward`` subtracts before it multiplies, and loses none of them.

    Args:
        params: ``Params`` or a mapping with ``scale`` and ``bias``, (features,), either or both absent; arrays of
            NumPy, jax or PyTorch.
        state: ``State`` or a mapping with ``mean`` and ``var``, (features,), likewise.
        epsilon: ε ≥ 0, that of the layer; it may be 0 where no variance is.

    Returns:
        ``Params(scale=a, bias=b)``, (features,), at least float32, of jax. It is computed on the host, in float64; of
        traced arrays by jax, in the dtype of the result.

    Raises:
        ValueError: for shapes and ranges that do not fit, and where values are known for statistics that are not finite
            and variances that are negative, or 0 with an epsilon of 0; traced ones give inf or NaN.
        TypeError: for dtypes and kinds that do not fit.

    >>> import jax.numpy as jnp, jbn
    >>> a, b = jbn.affine({"scale": jnp.array([3.0])}, jbn.State(jnp.array([2.0]), jnp.array([3.0])), epsilon=1.0)
    >>> a.item(), b.item()
    (1.5, -3.0)

    Source: Ioffe and Szegedy 2015, algorithm 2, line 11. Elsewhere: PyTorch on CPU and Keras evaluate in this form.
    """
    norm = _read_norm(params, state, epsilon)
    xp, (mean, var, scale, bias) = _place(norm)
    a, mean, bias = _evaluate(xp, norm.epsilon, mean, var, scale, bias)
    with np.errstate(over="ignore"):
        b = bias - mean * a
    given = (value for value in (norm.mean, norm.var, norm.scale, norm.bias) if value is not None)
    wide = checks.arithmetic_dtype(*(value.dtype for value in given))
    return Params(_give("The scale", a, wide, norm.mean), _give("The bias", b, wide, norm.mean))


def fold(
    params: ParamsLike,
    state: StateLike,
    kernel: AnyArray,
    bias: AnyArray | None = None,
    *,
    layout: str,
    into: Literal["previous", "next"] = "previous",
    groups: int = 1,
    padding: Padding | None = None,
    epsilon: float = 1e-5,
) -> tuple[Array, Array]:
    r"""Return kernel and bias of a convolution or dense layer that does the work of the normalization beside it too.

    .. math::
        \text{previous:}\quad W'_{o} = a_o W_{o},\ b'_o = a_o (b_o - \mu_o) + \beta_o

    .. math::
        \text{next:}\quad W'_{i} = W_{i} a_i,\ b' = b + \textstyle\sum_i W_{i} (\beta_i - \mu_i a_i)

    with :math:`a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}`. Both are exact but for rounding. At a large mean the layer's
    own sum has rounded off what ``affine`` loses.

    Args:
        params: ``Params`` or a mapping with ``scale`` and ``bias``, (features,), either or both absent; arrays of
            NumPy, jax or PyTorch, like all others here.
        state: ``State`` or a mapping with ``mean`` and ``var``, (features,).
        kernel: of any rank, strides and dilation.
        bias: that of the layer, (outputs,), or None.
        layout: a letter for each axis of the kernel: O for outputs, I for inputs, any others for positions: "HWIO" and
            "IO" in Flax and Keras, "OIHW" and "OI" in PyTorch. Transposed convolutions: "HWIO" in Flax, "HWOI" in Keras
            and with Flax's ``transpose_kernel``, "IOHW" in PyTorch.
        into: "previous" where the layer's output is normalized, "next" where its input is.
        groups: those of a grouped or depthwise convolution. One of the kernel's axes has the features of a group alone,
            "IOHW" with groups being (inputs, outputs of a group, h, w).
        padding: with "next" and a kernel of more than one position, that of the convolution, as Flax spells it. Zeros
            beside x are not normalized, so "SAME" and the like have no exact answer. Nor has a transposed convolution,
            or one that dilates x, which no argument tells apart.
        epsilon: ε ≥ 0, that of the normalization; it may be 0 where no variance is.

    Returns:
        Kernel and bias, arrays of jax in the dtypes that they had; a bias that is new in that of the normalization's,
        or else of its mean. They are computed on the host, in float64, and put where they were; traced arrays, and
        those that other processes hold parts of, are left to jax.

    Raises:
        ValueError: for shapes and ranges that do not fit, for padding with zeros, for what does not fit into its dtype,
            and for the statistics that ``affine`` refuses.
        TypeError: for dtypes and kinds that do not fit.

    >>> import jax, jax.numpy as jnp, jbn
    >>> x, kernel = jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones((3, 2))
    >>> params, state = jbn.Params(jnp.array([1.0, 2.0]), None), jbn.State(jnp.ones(2), jnp.full(2, 4.0))
    >>> folded, bias = jbn.fold(params, state, kernel, layout="IO")
    >>> y, _ = jbn.bn_forward(params, state, x @ kernel, False)
    >>> bool(jnp.allclose(x @ folded + bias[None], y, atol=1e-6))
    True

    Source: B. Jacob et al., "Quantization and Training of Neural Networks", 2018, section 3.2, for "previous".
    Elsewhere: ``torch.nn.utils.fusion`` knows "previous" alone, and no transposed convolution with groups.
    """
    before, kernel, bias = _read_into(into), _read_array("kernel", kernel), _read_array("bias", bias)
    _check_float("kernel", kernel)
    if bias is not None:
        _check_float("bias", bias)
    inputs, outputs = _read_axes(layout, kernel, groups)
    if not before:
        _check_padding(padding, [n for i, n in enumerate(kernel.shape) if i not in (inputs, outputs)])
    norm = _read_norm(params, state, epsilon)
    if norm.mean.ndim != 1:
        raise ValueError(f"state.mean has shape {norm.mean.shape}; expected one axis of features.")
    xp, arrays = _place(norm, kernel, bias)
    compute = partial(_compute, np) if xp is np else _compute_traced
    with np.errstate(all="ignore"):  # of a kernel that holds inf or NaN
        weights, shift = compute(before, (inputs, outputs), layout, groups, norm.epsilon, *arrays)
    new = norm.mean if norm.bias is None else norm.bias
    return (
        _give("The folded kernel", weights, kernel.dtype, kernel),
        _give("The folded bias", shift, (new if bias is None else bias).dtype, bias),
    )


def _compute(
    xp: Any,
    before: bool,
    axes: tuple[int, int],
    layout: str,
    groups: int,
    epsilon: float,
    mean: Any,
    var: Any,
    scale: Any,
    beta: Any,
    kernel: Any,
    bias: Any,
) -> tuple[Any, Any]:
    """Return kernel and bias in the dtype of the arithmetic, by NumPy or by jax."""
    inputs, outputs = axes
    axis, other = (outputs, inputs) if before else (inputs, outputs)
    spread = partial(
        _spread, xp, letter="O" if before else "I", shape=kernel.shape, axis=axis, other=other, groups=groups
    )
    spread(mean)  # says what does not fit
    # Where the axis of inputs has them all, each group of them belongs to outputs of its own.
    apart = groups if kernel.shape[inputs] == len(mean) else 1
    outside = (len(mean) if before else apart * kernel.shape[outputs],)
    if bias is not None and bias.shape != outside:
        raise ValueError(
            f"bias has shape {bias.shape}; expected {outside}, the outputs of the kernel of shape {kernel.shape} "
            f"in layout {layout!r} with groups={groups}."
        )
    a, mean, beta = _evaluate(xp, epsilon, mean, var, scale, beta)
    if before:
        return kernel * spread(a), a * ((0 if bias is None else bias) - mean) + beta
    shares = kernel * spread(beta - mean * a)
    table = xp.moveaxis(shares, (inputs, outputs), (0, 1)).sum(tuple(range(2, kernel.ndim)))
    added = table.reshape(apart, -1, table.shape[1]).sum(1).ravel()
    return kernel * spread(a), added if bias is None else added + bias


# As jbn.core.lax: what an exporter puts into jax.numpy while the first call is traced would stay in this program.
_JAX_NUMPY: Any = SimpleNamespace(**vars(jnp))
_compute_traced = jax.jit(partial(_compute, _JAX_NUMPY), static_argnums=range(5))


def _evaluate(xp: Any, epsilon: float, mean: Any, var: Any, scale: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Return a, μ and β."""
    r = 1 / xp.sqrt(var + epsilon)
    return r if scale is None else r * scale, mean, xp.zeros_like(r) if bias is None else bias


@dataclass(frozen=True)
class _Norm:
    """The arrays of a normalization, as they were given, and its epsilon."""

    mean: Any
    var: Any
    scale: Any
    bias: Any
    epsilon: float


def _read_norm(params: Any, state: Any, epsilon: float) -> _Norm:
    mean, var, _ = checks.read_fields("state", state, ("mean", "var"), required=True, also=("count",))
    given = (mean, var, *checks.read_fields("params", params, ("scale", "bias")))
    mean, var, scale, bias = map(_read_array, ("mean", "var", "scale", "bias"), given)
    layout = Layout(tuple(mean.shape), tuple(range(mean.ndim)))
    for name, value in {"state.mean": mean, "state.var": var, "scale": scale, "bias": bias}.items():
        checks.check_vector(name, value, layout)
    return _Norm(mean, var, scale, bias, read_epsilon(epsilon))


def _read_array(name: str, value: Any) -> Any:
    """Read an array of any library; jax's own stay, for they may be traced or on other devices."""
    if value is None or isinstance(value, jax.Array):
        return value
    try:
        return as_numpy(value)
    except TypeError as error:
        raise TypeError(f"{name} {error}") from error


def _place(norm: _Norm, *others: Any) -> tuple[Any, list[Any]]:
    """Return NumPy and arrays in float64 where all values are at hand, else jax's and arrays in one dtype.

    On the host nothing is compiled: each size is another program, and a model has as many as norms.
    """
    arrays = [norm.mean, norm.var, norm.scale, norm.bias, *others]
    traced = [isinstance(value, jax.core.Tracer) or not _is_whole(value) for value in arrays]
    if any(traced):
        wide = checks.arithmetic_dtype(*(value.dtype for value in arrays if value is not None))
        wide = np.dtype(jax.dtypes.canonicalize_dtype(wide))
        return _JAX_NUMPY, [None if value is None else jnp.asarray(value).astype(wide) for value in arrays]
    found = [None if value is None else np.asarray(value).astype(np.float64) for value in arrays]
    _check_statistics(found[0], found[1], norm.epsilon)
    return np, found


def _check_statistics(mean: Any, var: Any, epsilon: float) -> None:
    """Refuse what makes y NaN or the bias, whatever x is."""
    least = "more than 0, as epsilon is 0" if epsilon == 0 else "0 or more"
    for name, value, fits in (("mean", mean, True), ("var", var, (var > 0) | ((var == 0) & (epsilon > 0)))):
        bad = ~(np.isfinite(value) & fits)
        if bad.any():
            expected = f"finite ones, {least}" if name == "var" else "finite ones"
            raise ValueError(
                f"state.{name} has {bad.sum()} of {count_of(bad.size, 'value')} such as {value[bad].flat[0]:g}; "
                f"expected {expected}. recalibrate measures them anew."
            )


def _is_whole(value: Any) -> bool:
    """Say whether this process can read all of an array."""
    return not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated


def _give(name: str, value: Any, dtype: DTypeLike, place: Any) -> Array:
    """Return an array of jax of a dtype, where another one is."""
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    cast, fits = narrow(value, dtype)
    if not fits:
        raise ValueError(
            f"{name} does not fit into {dtype.name}: it is up to {np.nanmax(np.abs(value)):.2g}. Expected a wider "
            "dtype, such as float32."
        )
    # Not jnp.asarray, which compiles a program for each shape.
    return jax.device_put(cast, place.sharding if getattr(place, "committed", False) else None)


def _read_into(into: object) -> bool:
    return bool(read_choice("into", into, _PLACES, ": the layer before or after the normalization") == _PLACES[0])


def _check_float(name: str, array: Any) -> None:
    if array is None or array.dtype.name not in checks.FLOATS:
        found = "None" if array is None else f"of dtype {array.dtype.name}"
        raise TypeError(f"{name} is {found}; expected an array of {', '.join(checks.FLOATS)}.")


def _read_axes(layout: object, kernel: Any, groups: object) -> tuple[int, int]:
    """Return the axes of inputs and outputs."""
    if not isinstance(layout, str) or len(layout) != kernel.ndim or [*map(layout.count, "IO")] != [1, 1]:
        raise ValueError(
            f"layout is {layout!r} for a kernel of shape {kernel.shape}; expected a string of {kernel.ndim} letters, "
            "one for each axis, with one I for inputs and one O for outputs, such as "
            f"{'IO' if kernel.ndim == 2 else 'DHW'[5 - kernel.ndim :] + 'IO'!r}."
        )
    if not isinstance(groups, int | np.integer) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"groups is {groups!r}; expected a positive integer.")
    return layout.index("I"), layout.index("O")


def _spread(xp: Any, vector: Any, letter: str, shape: tuple[int, ...], axis: int, other: int, groups: int) -> Any:
    """Give a per-feature vector the rank of the kernel."""
    features, size = len(vector), shape[axis]
    if size == features:
        return xp.expand_dims(vector, tuple(i for i in range(len(shape)) if i != axis))
    if size * groups != features or shape[other] % groups:
        raise ValueError(
            f"The normalization has {features} features, but the kernel of shape {shape} has {size} on axis {axis}, "
            f"the {letter} of its layout, with groups={groups}. Expected {features}, or {features} / groups with "
            f"the other axis, of size {shape[other]}, divided into groups: check layout=, groups= and into=."
        )
    # The axis has the features of one group, and the other one the groups.
    table = xp.repeat(vector.reshape(groups, size), shape[other] // groups, axis=0)
    table = table if other < axis else table.T
    return xp.expand_dims(table, tuple(i for i in range(len(shape)) if i not in (axis, other)))


def pads_nothing(padding: Padding | None, sizes: int | Sequence[int], dilation: int | Sequence[int] | None = 1) -> bool:
    """Say whether a convolution puts no zeros beside x or between its values: a normalization does not see them."""
    if np.any(np.asarray(dilation or 1) != 1):
        return False
    if padding is None or isinstance(padding, str):
        return bool(np.all(np.asarray(sizes) == 1)) or padding in _WITHOUT_ZEROS
    return not np.any(np.asarray(padding))


def _check_padding(padding: Padding | None, sizes: list[int]) -> None:
    if not pads_nothing(padding, sizes):
        raise ValueError(
            f"padding is {padding!r} for a kernel of {'×'.join(map(str, sizes))} positions; expected 'VALID', "
            "'CIRCULAR', 'REFLECT' or zeros: what is padded is not normalized, and no kernel and bias give the same at "
            "the borders. Keep the normalization, or fold it into the layer before it."
        )
