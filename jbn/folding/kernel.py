"""A normalization by running statistics as a multiply-add, ``affine``, and inside one kernel beside it, ``fold``."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn.core import checks
from jbn.core.forward import Params
from jbn.core.layout import Layout

Padding = str | int | Sequence[int | tuple[int, int]]

# Paddings of Flax that put no zeros beside x.
_WITHOUT_ZEROS = ("VALID", "CIRCULAR", "REFLECT")


def affine(params: Any, state: Any, *, epsilon: float = 1e-5) -> Params:
    r"""Return the scale a and the bias b of normalization by running statistics, :math:`y = a x + b`.

    .. math:: a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}, \qquad b = \beta - \mu a

    The form loses the digits that x and μ share: in float32 y is off by about :math:`2^{-24} |a \mu|`, 6e-8 at mean/std
    1, 6e-6 at 10², 6e-4 at 10⁴. ``bn_forward`` subtracts before it multiplies, and loses none of them.

    Args:
        params: ``Params`` or a mapping with ``scale`` and ``bias``, (features,), either or both absent.
        state: ``State`` or a mapping with ``mean`` and ``var``, (features,).
        epsilon: ε > 0, that of the layer.

    Returns:
        ``Params(scale=a, bias=b)``, (features,), at least float32.

    Raises:
        ValueError: for shapes and ranges that do not fit.
        TypeError: for dtypes and kinds that do not fit.

    >>> import jax.numpy as jnp, jbn
    >>> a, b = jbn.affine({"scale": jnp.array([3.0])}, jbn.State(jnp.array([2.0]), jnp.array([3.0])), epsilon=1.0)
    >>> a.item(), b.item()
    (1.5, -3.0)

    Source: Ioffe and Szegedy 2015, algorithm 2, line 11. Elsewhere: PyTorch on CPU and Keras evaluate in this form.
    """
    a, mean, bias = _read_evaluation(params, state, epsilon)
    return Params(a, bias - mean * a)


def fold(
    params: Any,
    state: Any,
    kernel: Array | np.ndarray[Any, Any],
    bias: Array | np.ndarray[Any, Any] | None = None,
    *,
    layout: str,
    into: Literal["previous", "next"] = "previous",
    groups: int = 1,
    padding: Padding | None = None,
    epsilon: float = 1e-5,
) -> tuple[Array, Array]:
    r"""Return kernel and bias of a convolution or dense layer that does the work of the normalization beside it too.

    .. math::
        \text{previous:}\quad W'_{o} = a_o W_{o},\ b'_o = a_o (b_o - \mu_o) + \beta_o \qquad
        \text{next:}\quad W'_{i} = W_{i} a_i,\ b' = b + \textstyle\sum_i W_{i} (\beta_i - \mu_i a_i)

    with :math:`a = \gamma\,(\sigma^2 + \epsilon)^{-1/2}`. Both are exact but for rounding. At a large mean the layer's
    own sum has rounded off what ``affine`` loses.

    Args:
        params: ``Params`` or a mapping with ``scale`` and ``bias``, (features,), either or both absent.
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
        epsilon: ε > 0, that of the normalization.

    Returns:
        Kernel and bias in the dtype of the kernel.

    Raises:
        ValueError: for shapes and ranges that do not fit, and for padding with zeros.
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
    before, kernel = _read_into(into), checks.read_array("kernel", kernel)
    inputs, outputs = _read_axes(layout, kernel, groups)
    if not before:
        _check_padding(padding, [n for i, n in enumerate(kernel.shape) if i not in (inputs, outputs)])
    a, mean, beta = _read_evaluation(params, state, epsilon)
    if mean.ndim != 1:
        raise ValueError(f"state.mean has shape {mean.shape}; expected one axis of features.")
    given = checks.read_array("bias", bias)
    outside = jax.eval_shape(partial(_compute, before, inputs, outputs, groups), a, mean, beta, kernel, None)[1].shape
    if given is not None and given.shape != outside:
        raise ValueError(
            f"bias has shape {given.shape}; expected {outside}, the outputs of the kernel of shape {kernel.shape} "
            f"in layout {layout!r} with groups={groups}."
        )
    return _compute(before, inputs, outputs, groups, a, mean, beta, kernel, given)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compute(
    before: bool,
    inputs: int,
    outputs: int,
    groups: int,
    a: Array,
    mean: Array,
    beta: Array,
    kernel: Array,
    bias: Array | None,
) -> tuple[Array, Array]:
    axis, other = (outputs, inputs) if before else (inputs, outputs)
    weights = kernel.astype(checks.arithmetic_dtype(kernel.dtype, a.dtype))
    spread = partial(_spread, letter="O" if before else "I", shape=kernel.shape, axis=axis, other=other, groups=groups)
    if before:
        added = a * ((0 if bias is None else bias.astype(weights.dtype)) - mean) + beta
    else:
        shares = weights * spread(beta - mean * a)
        table = jnp.moveaxis(shares, (inputs, outputs), (0, 1)).sum(tuple(range(2, kernel.ndim)))
        # Where the axis of inputs has them all, each group of them belongs to outputs of its own.
        apart = groups if kernel.shape[inputs] == len(mean) else 1
        added = table.reshape(apart, -1, table.shape[1]).sum(1).ravel()
        added = added if bias is None else added + bias.astype(weights.dtype)
    return (weights * spread(a)).astype(kernel.dtype), added.astype(kernel.dtype)


def _read_evaluation(params: Any, state: Any, epsilon: float) -> tuple[Array, Array, Array]:
    """Return a, μ and β in the dtype of the arithmetic."""
    fields = {"state": ("mean", "var"), "params": ("scale", "bias")}
    given = [
        checks.read_array(field, value)
        for (name, names), tree in zip(fields.items(), (state, params), strict=True)
        for field, value in zip(names, checks.read_fields(name, tree, names, name == "state"), strict=True)
    ]
    mean, var, scale, bias = given
    vectors = {"state.mean": mean, "state.var": var, "scale": scale, "bias": bias}
    layout = Layout(tuple(mean.shape), tuple(range(mean.ndim)))
    for name, value in vectors.items():
        checks.check_vector(name, value, layout)
    wide = checks.arithmetic_dtype(*(value.dtype for value in vectors.values() if value is not None))
    r = lax.rsqrt(var.astype(wide) + checks.read_epsilon(epsilon))
    a = r if scale is None else r * scale.astype(wide)
    return a, mean.astype(wide), jnp.zeros_like(a) if bias is None else bias.astype(wide)


def _read_into(into: object) -> bool:
    if into not in ("previous", "next"):
        raise ValueError(
            f"into is {into!r}; expected 'previous' or 'next': the layer before or after the normalization."
        )
    return into == "previous"


def _read_axes(layout: object, kernel: Any, groups: object) -> tuple[int, int]:
    """Return the axes of inputs and outputs."""
    if kernel is None or kernel.dtype.name not in checks.FLOATS:
        found = "None" if kernel is None else f"of dtype {kernel.dtype.name}"
        raise TypeError(f"kernel is {found}; expected an array of {', '.join(checks.FLOATS)}.")
    if not isinstance(layout, str) or len(layout) != kernel.ndim or [*map(layout.count, "IO")] != [1, 1]:
        raise ValueError(
            f"layout is {layout!r} for a kernel of shape {kernel.shape}; expected a string of {kernel.ndim} letters, "
            "one for each axis, with one I for inputs and one O for outputs, such as "
            f"{'IO' if kernel.ndim == 2 else 'DHW'[5 - kernel.ndim :] + 'IO'!r}."
        )
    if not isinstance(groups, int | np.integer) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"groups is {groups!r}; expected a positive integer.")
    return layout.index("I"), layout.index("O")


def _spread(vector: Array, letter: str, shape: tuple[int, ...], axis: int, other: int, groups: int) -> Array:
    """Give a per-feature vector the rank of the kernel."""
    features, size = len(vector), shape[axis]
    if size == features:
        return jnp.expand_dims(vector, tuple(i for i in range(len(shape)) if i != axis))
    if size * groups != features or shape[other] % groups:
        raise ValueError(
            f"The normalization has {features} features, but the kernel of shape {shape} has {size} on axis {axis}, "
            f"the {letter} of its layout, with groups={groups}. Expected {features}, or {features} / groups with "
            f"the other axis, of size {shape[other]}, divided into groups: check layout=, groups= and into=."
        )
    # The axis has the features of one group, and the other one the groups.
    table = jnp.repeat(vector.reshape(groups, size), shape[other] // groups, axis=0)
    table = table if other < axis else table.T
    return jnp.expand_dims(table, tuple(i for i in range(len(shape)) if i not in (axis, other)))


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
