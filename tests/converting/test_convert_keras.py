"""convert and Keras: the layers of its package, on its JAX backend, evaluate alike, and train alike for ten steps."""

import jax
import numpy as np
import pytest

import jbn
from tests.support import nets
from tests.support.nets import EPSILON, EVALUATED, MOMENTUM, TRAINED, gap

# What a library calls although it is deprecated is not for this library to mend.
pytestmark = [
    pytest.mark.usefixtures("foreign"),
    *(pytest.mark.filterwarnings(f"default::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
UNDER = {"": "net"}  # the name of the model is part of its paths


@pytest.fixture(scope="module")
def model(keras):
    layers, options = keras.layers, {"momentum": MOMENTUM, "epsilon": EPSILON}
    return keras.Sequential(
        [
            keras.Input(nets.SHAPE[1:]),
            layers.Conv2D(8, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(name="bn1", **options),
            layers.Activation("silu"),
            layers.Conv2D(8, 3, groups=4, name="grouped"),
            layers.DepthwiseConv2D(2, depth_multiplier=2, name="channelwise"),
            layers.BatchNormalization(name="bn2", **options),
            layers.Activation("silu"),
            layers.Conv2DTranspose(6, 3, strides=2, name="up"),
            layers.BatchNormalization(name="bn3", **options),
            layers.Activation("silu"),
            layers.Flatten(),
            layers.Dense(nets.LABELS, name="fc"),
        ],
        name="net",
    )


def arrays(model):
    return {v.path: v.numpy() for v in model.weights}


def filled(model, found):
    for variable in model.weights:
        variable.assign(found[variable.path])


def kinds(kind="transposed", under=""):
    return {f"{under}up": kind, f"{under}channelwise": "depthwise"}


@pytest.mark.parametrize("kind", ["transposed", "transpose_kernel"])
def test_a_model_evaluates_alike(model, kind):
    net = nets.Net(transpose_kernel=kind == "transpose_kernel")
    variables, (x, _) = nets.linen_variables(net), nets.batch(0)
    like = {v.path: v for v in model.weights}
    filled(model, jbn.convert(variables, "linen", "keras", like=like, names=UNDER, kinds=kinds(kind)))
    assert gap(model(x, training=False), nets.evaluate(net, variables, x)) <= EVALUATED
    tree, options = arrays(model), {"names": {"net": ""}, "kinds": kinds(kind, "net/")}
    back = jbn.convert(tree, "keras", "linen", like=variables, **options)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (back, variables)), strict=True))


def test_a_model_tells_its_kinds(model):
    """No mapping, no kinds: both are read from the model, as what is converted and as what is wanted."""
    net = nets.Net()
    variables, (x, _) = nets.linen_variables(net), nets.batch(0)
    filled(model, jbn.convert(variables, "linen", "keras", like=model, names=UNDER))
    assert gap(model(x, training=False), nets.evaluate(net, variables, x)) <= EVALUATED
    back = jbn.convert(model, "keras", "linen", like=variables, names={"net": ""})
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (back, variables)), strict=True))


def test_what_no_other_library_has_is_named(keras):
    layers = [
        keras.Input((3,)),
        keras.layers.Normalization(name="scaled"),
        keras.layers.Dense(2, name="dense"),  # of itself it would be numbered after those of other tests
        keras.layers.Dropout(0.5),
    ]
    model = keras.Sequential(layers, name="net")
    with pytest.raises(ValueError, match=r"net/scaled of tree has count, mean, .* by names .* or None, which leaves"):
        jbn.convert(model, "keras", "linen")
    found = jbn.convert(model, "keras", "linen", names={"net/scaled": None})
    assert set(found["params"]["net"]) == {"dense"}
    norm = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(renorm=True, name="norm")], name="net")
    with pytest.raises(
        ValueError, match="net/norm of tree has moving_stddev, renorm_mean, renorm_stddev, which may be"
    ):
        jbn.convert(norm, "keras", "linen")


def test_models_that_cannot_be_read_are_refused(keras):
    x = keras.Input((3,))
    first, second = (keras.Model(x, keras.layers.Dense(3, name="fc")(x), name=name) for name in ("a", "b"))
    twice = keras.Model(x, second(first(x)))
    with pytest.raises(ValueError, match=r"tree has several arrays at '.*fc/kernel', '.*fc/bias'; expected paths"):
        jbn.convert(twice, "keras", "linen")
    with pytest.raises(ValueError, match="like is a model without weights; expected a built one"):
        jbn.convert(first, "keras", "keras", like=keras.Sequential([keras.layers.Dense(3)]))


def test_ten_steps_stay_together(model):
    net = nets.Net()
    variables, like = nets.linen_variables(net), {v.path: v for v in model.weights}
    filled(model, jbn.convert(variables, "linen", "keras", like=like, names=UNDER, kinds=kinds()))
    options = {"like": variables, "names": {"net": ""}, "kinds": kinds(under="net/")}
    losses, variables = nets.train_linen(net, variables)

    @jax.jit
    def step(trained, rest, x, labels):
        def of(trained):
            logits, new = model.stateless_call(trained, rest, x, training=True)
            return nets.loss_of(logits, labels), new

        (loss, new), grads = jax.value_and_grad(of, has_aux=True)(trained)
        return loss, jax.tree.map(lambda p, g: p - nets.RATE * g, trained, grads), new

    trained, rest = ([v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables))
    for number, ours in enumerate(losses):
        loss, trained, rest = step(trained, rest, *nets.batch(number))
        assert abs(loss - ours) <= TRAINED * abs(ours)
    for variable, value in zip(model.trainable_variables + model.non_trainable_variables, trained + rest, strict=True):
        variable.assign(value)
    assert gap(jbn.convert(arrays(model), "keras", "linen", **options), variables) <= TRAINED
    x, _ = nets.batch(nets.STEPS)
    assert gap(model(x, training=False), nets.evaluate(net, variables, x)) <= TRAINED


@pytest.mark.parametrize(("scale", "center"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_layer(keras, scale, center):
    """Options and arrays of one layer; then ten steps of its running statistics, and the way back."""
    options = {"epsilon": 2e-3, "momentum": 0.7, "scale": scale, "center": center}
    theirs = keras.layers.BatchNormalization(**options)
    theirs.build((None, 5))
    rng = np.random.default_rng(0)
    for variable in theirs.weights:
        variable.assign(rng.random(5) + 0.5)
    ours = jbn.convert_options(options, "keras", "jbn")
    params, state = jbn.convert({v.name: v.numpy() for v in theirs.weights}, "keras", "jbn")
    assert (params.scale is not None, params.bias is not None) == (ours.pop("use_scale"), ours.pop("use_bias"))
    step = jax.jit(lambda state, x, train: jbn.bn_forward(params, state, x, train, **ours), static_argnums=2)
    x = rng.standard_normal((16, 5), np.float32)
    assert gap(step(state, x, False)[0], theirs(x)) <= EVALUATED
    for _ in range(10):
        x = rng.standard_normal((16, 5), np.float32) + 1
        y, state = step(state, x, True)
        assert gap(y, theirs(x, training=True)) <= TRAINED
    back = jbn.convert((params, state), "jbn", "keras", like={v.name: v for v in theirs.weights})
    for variable in theirs.weights:
        assert gap(back[variable.name], variable.numpy()) <= EVALUATED


def test_an_embedding(keras):
    theirs = keras.layers.Embedding(7, 3, name="e")
    theirs.build()
    params = jbn.convert(arrays(theirs), "keras", "linen")["params"]
    np.testing.assert_array_equal(params["e"]["embedding"][4], theirs(np.array(4)))


def test_a_separable_convolution_has_no_other_name(keras):
    theirs = keras.layers.SeparableConv2D(4, 3, name="s")
    theirs.build((None, 5, 5, 3))
    like = {"params": {"s": {"kernel": np.ones((3, 3, 3, 4)), "bias": np.ones(4)}}}
    with pytest.raises(ValueError, match=r"2 are left over: 's/depthwise_kernel' from 's'"):
        jbn.convert(arrays(theirs), "keras", "linen", like=like)


def test_defaults_are_those_of_the_package(keras):
    theirs = keras.layers.BatchNormalization()
    assert jbn.convert_options({}, "keras", "keras") == {
        name: getattr(theirs, name) for name in ("epsilon", "momentum", "scale", "center")
    }
