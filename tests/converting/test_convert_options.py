"""convert_options: names, conventions and defaults; what one library has and another lacks is refused."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen

JBN = {"epsilon": 2e-4, "momentum": 0.95, "use_scale": True, "use_bias": True, "unbiased": False}
THE_SAME = {
    "jbn": JBN,
    "linen": JBN,
    "nnx": JBN,
    "torch": {"eps": 2e-4, "momentum": 0.05, "affine": True},
    "keras": {"epsilon": 2e-4, "momentum": 0.95, "scale": True, "center": True},
    "haiku": {"eps": 2e-4, "decay_rate": 0.95, "create_scale": True, "create_offset": True},
    "equinox": {"eps": 2e-4, "momentum": 0.95, "channelwise_affine": True, "mode": "batch"},
}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(THE_SAME, repeat=2)))
def test_the_same_in_every_library(source, target):
    found = jbn.convert_options(THE_SAME[source], source, target)
    sample = source == "torch" and target in ("jbn", "linen", "nnx")
    assert found == THE_SAME[target] | ({"unbiased": True} if sample else {})


@pytest.mark.parametrize("kind", [np.float64, np.array, jnp.asarray], ids=["scalar", "array", "jax"])
def test_numbers_may_be_of_any_type(kind):
    found = jbn.convert_options({"eps": kind(2.0**-10), "momentum": kind(0.25)}, "torch", "jbn")
    assert [type(found[name]) for name in ("epsilon", "momentum")] == [float, float]
    assert (found["epsilon"], found["momentum"]) == (2.0**-10, 0.75)


def test_defaults_arrive():
    keras = jbn.convert_options({}, "keras", "linen")
    assert (keras["epsilon"], keras["momentum"], keras["unbiased"]) == (1e-3, 0.99, False)
    torch = jbn.convert_options({}, "torch", "jbn")
    assert (torch["epsilon"], torch["momentum"], torch["unbiased"]) == (1e-5, 0.9, True)
    assert jbn.convert_options({}, "jbn", "torch")["momentum"] == 0.01


@pytest.mark.parametrize(
    ("options", "source", "target", "want"),
    [
        ({"affine": False}, "torch", "keras", {"scale": False, "center": False}),
        ({"bias": False}, "torch", "keras", {"scale": True, "center": False}),
        ({"affine": False, "bias": True}, "torch", "jbn", {"use_scale": False, "use_bias": False}),
        ({"center": False}, "keras", "torch", {"affine": True, "bias": False}),
        ({"scale": False, "center": False}, "keras", "torch", {"affine": False}),
        ({"scale": False, "center": False}, "keras", "equinox", {"channelwise_affine": False}),
        ({"channelwise_affine": False, "mode": "batch"}, "equinox", "nnx", {"use_scale": False, "use_bias": False}),
        ({"use_scale": False}, "linen", "keras", {"scale": False, "center": True}),
        ({"unbiased": True}, "nnx", "linen", {"unbiased": True}),
        ({"momentum": None}, "torch", "linen", {"momentum": jbn.cumulative}),
        ({"momentum": jbn.cumulative}, "nnx", "torch", {"affine": True, "momentum": None}),
        ({"momentum": jbn.debiased(0.9)}, "jbn", "nnx", {"momentum": jbn.debiased(0.9)}),
        ({"momentum": jbn.debiased(0.9)}, "jbn", "haiku", {"decay_rate": 0.9}),
        ({"momentum": jbn.debiased(0.9)}, "jbn", "equinox", {"momentum": 0.9}),
    ],
)
def test_scale_and_bias(options, source, target, want):
    found = jbn.convert_options(options, source, target)
    assert {name: found[name] for name in want} == want
    assert target != "torch" or set(found) == {"eps", "momentum", *want}


@pytest.mark.parametrize(
    ("options", "source", "target", "message"),
    [
        ({}, "pytorch", "jbn", r"source is 'pytorch'; expected one of 'jbn'"),
        ({}, "jbn", "tensorflow", r"target is 'tensorflow'; expected one of"),
        ({"epsilon": 1e-3}, "torch", "jbn", r"options of torch: epsilon cannot be mapped; expected eps, momentum"),
        ({"fused": True}, "keras", "jbn", r"options of keras: fused cannot be mapped"),
        ({"eps": 1e-3}, "haiku", "jbn", r"options of haiku lack decay_rate, create_scale, create_offset"),
        ({"momentum": None}, "torch", "keras", r"momentum is the function .*cumulative.*cannot be expressed in keras"),
        ({"momentum": jbn.debiased(0.9)}, "jbn", "torch", r"cannot be expressed in torch; .* or jbn\.cumulative"),
        ({"momentum": jbn.cumulative}, "nnx", "haiku", r"cannot be expressed in haiku; .* or jbn\.debiased"),
        ({"momentum": jbn.cumulative}, "keras", "jbn", r"options of keras: momentum is <function cumulative"),
        ({"momentum": None}, "keras", "jbn", r"options of keras: momentum is None; expected a number from 0 to 1"),
        ({"momentum": 1.5}, "torch", "jbn", r"momentum is 1.5; expected a number from 0 to 1"),
        ({"eps": -1e-5}, "torch", "jbn", r"eps is -1e-05; expected a number, 0 or more"),
        ({"eps": float("nan")}, "torch", "jbn", r"eps is nan; expected a number"),
        ({"eps": float("inf")}, "torch", "jbn", r"eps is inf; expected a number"),
        ({"eps": "1e-5"}, "torch", "jbn", r"eps is '1e-5'; expected a number"),
        ({"eps": np.complex64(1e-5)}, "torch", "jbn", r"eps is .*; expected a number"),
        ({"eps": np.longdouble("1e4000")}, "torch", "jbn", r"eps is .*; expected a number"),
        ({"momentum": np.zeros((), [("a", "f4")])}, "torch", "jbn", r"momentum is .*; expected a number"),
        ({"momentum": jnp.float32(1.5)}, "torch", "jbn", r"momentum is .*; expected a number"),
        ({"affine": 1}, "torch", "jbn", r"affine is 1; expected True or False"),
        ({"track_running_stats": False}, "torch", "jbn", r"track_running_stats=False evaluates by .* expected True"),
        ({"use_scale": False}, "jbn", "torch", r"bias without a scale cannot be expressed in torch"),
        ({"use_bias": False}, "jbn", "equinox", r"one alone cannot be expressed in equinox"),
        ({}, "equinox", "jbn", r"mode='ema', which is the default.* expected mode='batch'"),
    ],
)
def test_refused(options, source, target, message):
    with pytest.raises(ValueError, match=message):
        jbn.convert_options(options, source, target)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(THE_SAME, repeat=2)))
def test_no_epsilon_goes_along(source, target):
    """The detectors of torchvision have none: running variances are not 0."""
    options = {name: 0.0 if name in ("eps", "epsilon") else value for name, value in THE_SAME[source].items()}
    found = jbn.convert_options(options, source, target)
    assert found.get("eps", found.get("epsilon")) == 0


def test_the_configuration_of_a_keras_layer(keras):
    """Whole as it is; what changes no number is skipped, what a Flax module must be told goes along."""
    made = {"momentum": 0.9, "epsilon": 2e-3, "scale": False, "name": "bn", "beta_initializer": "ones"}
    layer = keras.layers.BatchNormalization(**made, trainable=False)
    want = {"epsilon": 2e-3, "momentum": 0.9, "use_scale": False, "use_bias": True, "unbiased": False}
    for given in (layer, layer.get_config()):
        assert jbn.convert_options(given, "keras", "jbn") == jbn.convert_options(given, "keras", "linen") == want
        assert jbn.convert_options(given, "keras", "keras") == {
            "epsilon": 2e-3, "momentum": 0.9, "scale": False, "center": True,
        }  # fmt: skip
    images = keras.layers.BatchNormalization(axis=1, dtype="mixed_bfloat16")
    found = jbn.convert_options(images.get_config(), "keras", "linen")
    assert (found["axis"], found["dtype"]) == (1, "bfloat16")
    module = jbn.linen.BatchNorm(False, **found)
    y, _ = module.init_with_output(jax.random.key(0), jnp.ones((2, 3, 4)))
    assert y.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype is 'mixed_bfloat16', which is no option in torch; expected float32"):
        jbn.convert_options(images, "keras", "torch")
    for option, value in {"renorm": True, "gamma_regularizer": "l2", "beta_constraint": "non_neg"}.items():
        layer = keras.layers.BatchNormalization(**{option: value})
        with pytest.raises(ValueError, match=rf"options of keras: {option} is .* leave it out if evaluation is all"):
            jbn.convert_options(layer, "keras", "jbn")


def test_layers_of_other_libraries():
    torch, eqx = pytest.importorskip("torch"), pytest.importorskip("equinox")
    for made in ({"eps": 2e-3, "momentum": 0.3}, {"affine": False}, {"bias": False}):
        layer = torch.nn.BatchNorm2d(3, **made)
        assert jbn.convert_options(layer, "torch", "torch") == jbn.convert_options(made, "torch", "torch")
    made = {"eps": 2e-3, "momentum": 0.3, "channelwise_affine": False, "mode": "batch"}
    layer = eqx.nn.BatchNorm(3, "batch", **made)
    assert jbn.convert_options(layer, "equinox", "jbn") == jbn.convert_options(made, "equinox", "jbn")
    made = {"epsilon": 2e-3, "momentum": 0.3, "use_scale": False}
    assert jbn.convert_options(nn.BatchNorm(**made), "linen", "jbn") == jbn.convert_options(made, "linen", "jbn")
    for other, source in ((torch.nn.Linear(3, 3), "torch"), (3, "keras"), (object(), "haiku")):
        with pytest.raises(TypeError, match=rf"options is of type {type(other).__name__}; expected a mapping"):
            jbn.convert_options(other, source, "jbn")
