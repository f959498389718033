"""``convert_options``: what a batch norm is made with, in the words and conventions of another library."""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

_FLAX = {"epsilon": 1e-5, "momentum": 0.99, "use_scale": True, "use_bias": True, "unbiased": False}

# What each library takes, and what it takes where nothing is said; None where it asks.
DEFAULTS: dict[str, dict[str, Any]] = {
    "jbn": _FLAX,
    "linen": _FLAX,
    "nnx": _FLAX,
    "torch": {"eps": 1e-5, "momentum": 0.1, "affine": True, "bias": True, "track_running_stats": True},
    "keras": {"epsilon": 1e-3, "momentum": 0.99, "scale": True, "center": True},
    "haiku": {"eps": 1e-5, "decay_rate": None, "create_scale": None, "create_offset": None},
    "equinox": {"eps": 1e-5, "momentum": 0.99, "channelwise_affine": True, "mode": "ema"},
}


class _Norm(NamedTuple):
    """A batch norm in the words of jbn."""

    epsilon: float
    momentum: float
    use_scale: bool
    use_bias: bool
    unbiased: bool = False


def convert_options(options: Mapping[str, Any], source: str, target: str) -> dict[str, Any]:
    r"""Return the options of a batch norm as another library takes them, those that were not given included.

    .. math:: \text{momentum} = 1 - \text{momentum}_\text{PyTorch}

    ===================  =======================  ===================================  ========================
    library              epsilon                  momentum, and the default            scale, bias
    ===================  =======================  ===================================  ========================
    "jbn", "linen",      ``epsilon``, 1e-5        ``momentum``, weight of the old      ``use_scale``,
    "nnx"                                         value, 0.99                          ``use_bias``
    "torch"              ``eps``, 1e-5            ``momentum``, weight of the new      ``affine``, ``bias``
                                                  value, 0.1
    "keras"              ``epsilon``, 1e-3        ``momentum``, as in jbn, 0.99        ``scale``, ``center``
    "haiku"              ``eps``, 1e-5            ``decay_rate``, as in jbn, required  ``create_scale``,
                                                                                       ``create_offset``
    "equinox"            ``eps``, 1e-5            ``momentum``, as in jbn, 0.99        ``channelwise_affine``
    ===================  =======================  ===================================  ========================

    An epsilon of 0, such as that of torchvision's detectors, goes along; with it jbn evaluates and does not train.
    jbn and its modules have ``unbiased`` too: True from PyTorch, whose running variance is that of a sample, and left
    out where a library has one convention; see ``count`` of ``jbn.convert``.

    Args:
        options: some of the options above, as the constructor takes them; for PyTorch ``track_running_stats`` and for
            Equinox ``mode`` too.
        source: the library that they come from.
        target: the library that they are for.

    Returns:
        All options of the target that are above, for Equinox with ``mode="batch"``; ``bias`` for PyTorch where it is
        False only, because older ones lack it.

    Raises:
        ValueError: for options that are not above or lacking, values out of range, and what the target cannot express.

    >>> import jbn, jbn.linen
    >>> jbn.convert_options({"momentum": 0.99}, "keras", "torch")
    {'eps': 0.001, 'momentum': 0.01, 'affine': True}
    >>> layer = jbn.linen.BatchNorm(**jbn.convert_options({"eps": 1e-3}, "torch", "linen"))
    >>> layer.epsilon, layer.momentum, layer.unbiased
    (0.001, 0.9, True)

    Source: the constructors of PyTorch 2.13, Keras 3.15, Haiku 0.0.17, Equinox 0.13.8 and Flax 0.12.8.
    """
    for argument, name in (("source", source), ("target", target)):
        if name not in DEFAULTS:
            raise ValueError(f"{argument} is {name!r}; expected one of {', '.join(map(repr, DEFAULTS))}.")
    known = DEFAULTS[source]
    if strange := [name for name in options if name not in known]:
        raise ValueError(f"options of {source}: {', '.join(strange)} cannot be mapped; expected {', '.join(known)}.")
    if lacking := [name for name, value in known.items() if value is None and name not in options]:
        raise ValueError(f"options of {source} lack {', '.join(lacking)}; expected them, for there is no default.")
    for name, value in options.items():
        fits, expected = _CHECKS.get(name, _FLAG)
        if not fits(value) and (source, name, value) != ("torch", "momentum", None):
            raise ValueError(f"options of {source}: {name} is {value!r}; expected {expected}.")
    return _WRITTEN[target](_READ[source]({**known, **options}))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


_Check = tuple[Callable[[Any], bool], str]
_FLAG: _Check = (lambda value: isinstance(value, bool), "True or False")
_ADDEND: _Check = (lambda value: _is_number(value) and 0 <= value < math.inf, "a number, 0 or more")
_WEIGHT: _Check = (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(("eps", "epsilon"), _ADDEND),
    **dict.fromkeys(("momentum", "decay_rate"), _WEIGHT),
    "mode": (lambda value: isinstance(value, str), "'batch'"),
}


def _of_the_other(momentum: float) -> float:
    """Return the weight of the other value, in decimal: 1 - 0.99 is 0.01."""
    return float(1 - Decimal(repr(float(momentum))))


def _from_torch(given: Mapping[str, Any]) -> _Norm:
    if given["momentum"] is None:
        raise ValueError(
            "options of torch: momentum=None is the average over all batches, which no other library has; expected a "
            "number, and afterwards jbn.recalibrate, whose statistics are those of all rows."
        )
    if not given["track_running_stats"]:
        raise ValueError(
            "options of torch: track_running_stats=False evaluates by the statistics of the batch, which is no option "
            "of other libraries; expected True. In jbn it is bn_forward(..., train=True, update=False) or batch_norm."
        )
    bias = given["affine"] and given["bias"]
    return _Norm(given["eps"], _of_the_other(given["momentum"]), given["affine"], bias, unbiased=True)


def _to_torch(norm: _Norm) -> dict[str, Any]:
    if norm.use_bias and not norm.use_scale:
        raise ValueError("A bias without a scale cannot be expressed in torch: affine=False leaves out both.")
    only_scale = {"bias": False} if norm.use_scale and not norm.use_bias else {}
    return {"eps": norm.epsilon, "momentum": _of_the_other(norm.momentum), "affine": norm.use_scale, **only_scale}


def _from_equinox(given: Mapping[str, Any]) -> _Norm:
    if given["mode"] != "batch":
        raise ValueError(
            f"options of equinox: mode={given['mode']!r}, which is the default, trains by running statistics, and no "
            "other library does; expected mode='batch'. Evaluation is the same: say 'batch' if that is all you need."
        )
    return _Norm(given["eps"], given["momentum"], given["channelwise_affine"], given["channelwise_affine"])


def _to_equinox(norm: _Norm) -> dict[str, Any]:
    if norm.use_scale != norm.use_bias:
        raise ValueError("Of scale and bias one alone cannot be expressed in equinox: channelwise_affine is both.")
    options = {"eps": norm.epsilon, "momentum": norm.momentum, "channelwise_affine": norm.use_scale}
    return {**options, "mode": "batch"}


_READ: dict[str, Callable[[Mapping[str, Any]], _Norm]] = {
    **dict.fromkeys(("jbn", "linen", "nnx"), lambda given: _Norm(**given)),
    "torch": _from_torch,
    "keras": lambda given: _Norm(given["epsilon"], given["momentum"], given["scale"], given["center"]),
    "haiku": lambda given: _Norm(given["eps"], given["decay_rate"], given["create_scale"], given["create_offset"]),
    "equinox": _from_equinox,
}

_WRITTEN: dict[str, Callable[[_Norm], dict[str, Any]]] = {
    **dict.fromkeys(("jbn", "linen", "nnx"), _Norm._asdict),
    "torch": _to_torch,
    "keras": lambda norm: {
        "epsilon": norm.epsilon,
        "momentum": norm.momentum,
        "scale": norm.use_scale,
        "center": norm.use_bias,
    },
    "haiku": lambda norm: {
        "eps": norm.epsilon,
        "decay_rate": norm.momentum,
        "create_scale": norm.use_scale,
        "create_offset": norm.use_bias,
    },
    "equinox": _to_equinox,
}
