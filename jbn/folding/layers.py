"""What folding asks of a layer or a norm of Flax, be it Linen's or NNX's: both have the same fields."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jbn.core.checks import arithmetic_dtype, cast_mask, check_mask
from jbn.core.layout import Layout
from jbn.folding.kernel import fold, pads_nothing
from jbn.folding.links import mark, place_x_first

TRAINS = (
    "{} normalizes by the batch, whose statistics cannot be folded; expected a call in evaluation, "
    "use_running_average=True or what the model calls it, such as train=False."
)


def call_marked(
    call: Callable[..., Any], layer: Any, path: str, args: Any, kwargs: Any, *, is_norm: bool, is_whole: bool
) -> Any:
    """Call a layer or a norm, and mark what it takes and returns where something could be folded there.

    Args:
        call: of the arguments.
        layer: what is called.
        path: its path.
        args: the positional arguments; x may be among the keyword arguments instead.
        kwargs: the keyword arguments.
        is_norm: whether it is a norm.
        is_whole: whether what it holds has the rank that its variables have in the model. Under a ``vmap`` of Flax it
            sees one of a stack, which cannot be folded.
    """
    args, kwargs = place_x_first(args, kwargs)
    folds = is_whole and (is_norm or _multiplies_as_it_is(layer))
    outside = any(kwargs.get(name) is not None for name in ("scale", "bias"))  # known at the call only: nothing to fold
    last = is_norm and layer.axis in (-1, jnp.ndim(args[0]) - 1) and not outside
    takes = folds and (last or (not is_norm and takes_norm(layer)))
    y = call(mark(args[0], "in", path) if takes else args[0], *args[1:], **kwargs)
    plain = last and getattr(layer, "activation", None) is None and not kwargs.keys() & {"residual", "mask"}
    return mark(y, "out", path) if folds and (plain or not is_norm) else y


# What a layer of Flax may be given in the place of its product: it may round, clip or square what it multiplies.
_PRODUCTS = ("dot_general", "dot_general_cls", "conv_general_dilated", "promote_dtype")


def _multiplies_as_it_is(layer: Any) -> bool:
    """Say whether a layer has the product that layers of its class have unless they are told otherwise."""
    fields = signature(type(layer).__init__).parameters
    return all(
        getattr(layer, name, fields[name].default) is fields[name].default for name in _PRODUCTS if name in fields
    )


def takes_norm(layer: Any) -> bool:
    """Say whether the norm before a layer can be folded into it."""
    if hasattr(layer, "transpose_kernel"):
        return False
    return not hasattr(layer, "padding") or pads_nothing(layer.padding, layer.kernel_size, layer.input_dilation)


def fold_layer(
    layer: Any,
    kernel: Array,
    bias: Array | None,
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    into: Literal["previous", "next"],
    epsilon: float,
) -> tuple[Array, Array]:
    """Return kernel and bias of a layer that does the work of a norm too; see ``jbn.fold``."""
    return fold(
        params,
        state,
        kernel,
        bias,
        layout="." * (kernel.ndim - 2) + ("OI" if getattr(layer, "transpose_kernel", False) else "IO"),
        into=into,
        groups=getattr(layer, "feature_group_count", 1),
        padding=getattr(layer, "padding", None),
        epsilon=epsilon,
    )


def check_folded_call(name: str, *affine: object) -> None:
    """Refuse to call a folded norm with a scale or bias, which is inside the layer beside it."""
    if any(value is not None for value in affine):
        raise ValueError(
            f"{name} is folded into the layer beside it, and is called with a scale or bias; expected none, as when it "
            "was folded. Fold with a call that has them: the norm is kept then."
        )


def do_the_rest(
    x: Array, *, activation: Callable[[Array], Array] | None, residual: Array | None, mask: ArrayLike | None, dtype: Any
) -> Array:
    """Return what a norm that is folded still does: the residual, the activation, the mask, the dtype of y."""
    mask = check_mask(cast_mask(mask), Layout(x.shape, (x.ndim - 1,)))
    wide = arithmetic_dtype(x.dtype, dtype)
    z = x if residual is None else x.astype(wide) + residual.astype(wide)
    y = z if activation is None else activation(z.astype(wide))
    return (y if mask is None else jnp.where(mask, y, 0)).astype(dtype)
