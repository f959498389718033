"""``convert_options``: what a batch norm is made with, in the words and conventions of another library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from jbn.arguments import read_choice
from jbn.converting.convert import Library
from jbn.core.numbers import is_schedule, read_number
from jbn.momentum import Debiased, cumulative

_OURS = ("jbn", "linen", "nnx")
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


# What else the layers of Keras have, which changes no number of an evaluation, and what it must be for training too.
_KERAS = (
    *("name", "trainable", "dtype", "axis", "synchronized", "renorm", "renorm_clipping", "renorm_momentum"),
    *(f"{name}_initializer" for name in ("beta", "gamma", "moving_mean", "moving_variance")),
    *(f"{name}_{kind}" for name in ("beta", "gamma") for kind in ("regularizer", "constraint")),
)


LayerOptions: TypeAlias = Mapping[str, Any] | object
"""What a batch norm is made with: names to values as its constructor takes them, or the layer itself."""


class _Norm(NamedTuple):
    """A batch norm in the words of jbn."""

    epsilon: float
    momentum: Any  # a number, or a function of the number of updates
    use_scale: bool
    use_bias: bool
    unbiased: bool = False


def convert_options(options: LayerOptions, source: Library, target: Library) -> dict[str, Any]:
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

    PyTorch's ``momentum=None`` is ``jbn.cumulative``. The averages of Haiku and Equinox are those of ``jbn.debiased``
    of their number; from there comes the number alone, which is the same after many updates.

    An epsilon of 0, such as that of torchvision's detectors, goes along; with it jbn evaluates and does not train.
    jbn and its modules have ``unbiased`` too: True from PyTorch, whose running variance is that of a sample, and left
    out where a library has one convention; see ``count`` of ``jbn.convert``.

    Args:
        options: some of the options above, as the constructor takes them; for PyTorch ``track_running_stats`` and for
            Equinox ``mode`` too. Or the layer, but for Haiku; or ``layer.get_config()`` of Keras, of which names,
            initializers and the like are skipped: what starts, freezes or synchronizes a layer goes along with arrays,
            ``jbn.freeze`` and axis names.
        source: the library that they come from.
        target: the library that they are for.

    Returns:
        All options of the target that are above, for Equinox with ``mode="batch"``; ``bias`` for PyTorch where it is
        False only, because older ones lack it. From a layer of Keras to a Flax module also ``axis``, if not the last,
        and ``dtype``, if not float32.

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
    known = DEFAULTS[read_choice("source", source, DEFAULTS)]
    read_choice("target", target, DEFAULTS)
    options, more = _read_layer(options, source, target)
    if strange := [name for name in options if name not in known]:
        raise ValueError(
            f"options of {source}: {', '.join(map(str, strange))} cannot be mapped; expected {', '.join(known)}."
        )
    if lacking := [name for name, value in known.items() if value is None and name not in options]:
        raise ValueError(f"options of {source} lack {', '.join(lacking)}; expected them, for there is no default.")
    for name, value in options.items():
        fits, expected = _CHECKS.get(name, _FLAG)
        special = value is None if source == "torch" else source in _OURS and is_schedule(value)
        if not (fits(value) or (name == "momentum" and special)):
            raise ValueError(f"options of {source}: {name} is {value!r}; expected {expected}.")
    numbers = {name: number for name in _NUMBERS if (number := read_number(options.get(name))) is not None}
    return {**_WRITTEN[target](_READ[source]({**known, **options, **numbers})), **more}


def _read_layer(options: Any, source: str, target: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the options of a layer or of its configuration, and what a Flax module takes beside them."""
    config = options.get_config() if source == "keras" and hasattr(options, "get_config") else options
    if not isinstance(config, Mapping):
        found = {name: getattr(config, name) for name in DEFAULTS[source] if hasattr(config, name)}
        if source == "haiku" or not {"eps", "epsilon"} & found.keys():
            raise TypeError(
                f"options is of type {type(options).__name__}; expected a mapping of the options of {source}"
                f"{'' if source == 'haiku' else ', or such a layer'}."
            )
        if source == "torch":  # there it is the array
            found["bias"] = found.get("bias") is not None or not found["affine"]
        return found, {}
    if source != "keras":
        return config, {}
    if refused := [
        name for name in _KERAS if name.endswith(("renorm", "regularizer", "constraint")) and config.get(name)
    ]:
        raise ValueError(
            f"options of keras: {refused[0]} is {config[refused[0]]!r}, which other libraries lack and training needs; "
            "expected none: leave it out if evaluation is all you need, and put regularizers into the loss."
        )
    return {name: value for name, value in config.items() if name not in _KERAS}, _read_module(config, target)


def _read_module(config: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Return the axis and the dtype of a layer of Keras where a Flax module needs to be told."""
    policy, axis = config.get("dtype") or "float32", config.get("axis", -1)
    policy = policy["config"]["name"] if isinstance(policy, Mapping) else getattr(policy, "name", policy)
    dtype = str(policy).removeprefix("mixed_")
    if target not in ("linen", "nnx"):
        if dtype != "float32":
            raise ValueError(
                f"options of keras: dtype is {policy!r}, which is no option in {target}; expected float32: leave it "
                "out, and give the layer x of that dtype."
            )
        return {}
    return {**({} if axis == -1 else {"axis": axis}), **({} if dtype == "float32" else {"dtype": dtype})}


def _read_number(value: Any) -> float:
    known = read_number(value)
    return math.nan if known is None else known


_Check = tuple[Callable[[Any], bool], str]
_FLAG: _Check = (lambda value: isinstance(value, bool), "True or False")
_ADDEND: _Check = (lambda value: 0 <= _read_number(value) < math.inf, "a number, 0 or more")
_WEIGHT: _Check = (lambda value: 0 <= _read_number(value) <= 1, "a number from 0 to 1")
_NUMBERS = {"eps": _ADDEND, "epsilon": _ADDEND, "momentum": _WEIGHT, "decay_rate": _WEIGHT}
_CHECKS: dict[str, _Check] = {**_NUMBERS, "mode": (lambda value: isinstance(value, str), "'batch'")}


def _of_the_other(momentum: float) -> float:
    """Return the weight of the other value, in decimal: 1 - 0.99 is 0.01."""
    return float(1 - Decimal(repr(float(momentum))))


def _from_torch(given: Mapping[str, Any]) -> _Norm:
    if not given["track_running_stats"]:
        raise ValueError(
            "options of torch: track_running_stats=False evaluates by the statistics of the batch, which is no option "
            "of other libraries; expected True. In jbn it is the function jbn.batch_norm of x, scale and bias, which a "
            "module of a few lines calls."
        )
    bias = given["affine"] and given["bias"]
    momentum = cumulative if given["momentum"] is None else _of_the_other(given["momentum"])
    return _Norm(given["eps"], momentum, given["affine"], bias, unbiased=True)


def _to_torch(norm: _Norm) -> dict[str, Any]:
    if norm.use_bias and not norm.use_scale:
        raise ValueError("A bias without a scale cannot be expressed in torch: affine=False leaves out both.")
    only_scale = {"bias": False} if norm.use_scale and not norm.use_bias else {}
    momentum = None if norm.momentum is cumulative else _of_the_other(_number_of(norm, "torch"))
    return {"eps": norm.epsilon, "momentum": momentum, "affine": norm.use_scale, **only_scale}


def _number_of(norm: _Norm, target: str) -> float:
    """Return a momentum as a number, also that of which the average is debiased where the target debiases."""
    if isinstance(norm.momentum, Debiased) and target in ("haiku", "equinox"):
        return norm.momentum.momentum
    if is_schedule(norm.momentum):
        raise ValueError(
            f"momentum is the function {norm.momentum!r}, which cannot be expressed in {target}; expected a number"
            + {"torch": ", or jbn.cumulative", "keras": ""}.get(target, ", or jbn.debiased")
            + "."
        )
    return norm.momentum  # type: ignore[no-any-return]


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
    momentum = _number_of(norm, "equinox")
    options = {"eps": norm.epsilon, "momentum": momentum, "channelwise_affine": norm.use_scale}
    return {**options, "mode": "batch"}


_READ: dict[str, Callable[[Mapping[str, Any]], _Norm]] = {
    **dict.fromkeys(_OURS, lambda given: _Norm(**given)),
    "torch": _from_torch,
    "keras": lambda given: _Norm(given["epsilon"], given["momentum"], given["scale"], given["center"]),
    "haiku": lambda given: _Norm(given["eps"], given["decay_rate"], given["create_scale"], given["create_offset"]),
    "equinox": _from_equinox,
}

_WRITTEN: dict[str, Callable[[_Norm], dict[str, Any]]] = {
    **dict.fromkeys(_OURS, _Norm._asdict),
    "torch": _to_torch,
    "keras": lambda norm: {
        "epsilon": norm.epsilon,
        "momentum": _number_of(norm, "keras"),
        "scale": norm.use_scale,
        "center": norm.use_bias,
    },
    "haiku": lambda norm: {
        "eps": norm.epsilon,
        "decay_rate": _number_of(norm, "haiku"),
        "create_scale": norm.use_scale,
        "create_offset": norm.use_bias,
    },
    "equinox": _to_equinox,
}
