"""convert_options: names, conventions and defaults; what one library has and another lacks is refused."""

import itertools

import pytest

import jbn

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
        ({"renorm": True}, "keras", "jbn", r"options of keras: renorm cannot be mapped"),
        ({"eps": 1e-3}, "haiku", "jbn", r"options of haiku lack decay_rate, create_scale, create_offset"),
        ({"momentum": None}, "torch", "jbn", r"momentum=None is the average over all batches.*jbn.recalibrate"),
        ({"momentum": None}, "keras", "jbn", r"options of keras: momentum is None; expected a number from 0 to 1"),
        ({"momentum": 1.5}, "torch", "jbn", r"momentum is 1.5; expected a number from 0 to 1"),
        ({"eps": -1e-5}, "torch", "jbn", r"eps is -1e-05; expected a number, 0 or more"),
        ({"eps": float("nan")}, "torch", "jbn", r"eps is nan; expected a number"),
        ({"eps": float("inf")}, "torch", "jbn", r"eps is inf; expected a number"),
        ({"eps": "1e-5"}, "torch", "jbn", r"eps is '1e-5'; expected a number"),
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
