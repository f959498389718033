"""record: models of PyTorch and Keras beside their ports to Flax; the models stay as they are."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jbn
import jbn.linen

# What a library calls although it is deprecated is not for this library to mend.
pytestmark = [pytest.mark.filterwarnings(f"default::{kind}Warning") for kind in ("Deprecation", "Future", "User")]
X = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
NAMES = {"conv1": "Conv_0", "bn1": "BatchNorm_0", "conv2": "Conv_1", "bn2": "BatchNorm_1", "fc": "Dense_0"}


class Port(nn.Module):
    padding: object = ((1, 1), (1, 1))
    activate: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train, epsilon=self.epsilon)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.Conv(8, (3, 3), 2, padding=self.padding, use_bias=False)(x)
        x = nn.BatchNorm(not train, epsilon=self.epsilon)(x)
        x = nn.relu(x) if self.activate else x
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")  # takes seconds


@pytest.fixture(scope="module")
def theirs(torch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(8)
            self.relu = torch.nn.ReLU(inplace=True)  # writes into what the norm returned
            self.conv2 = torch.nn.Conv2d(8, 8, 3, 2, padding=1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(8)
            self.fc = torch.nn.Linear(8, 5)

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return self.fc(self.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def variables(theirs):
    like = jax.eval_shape(Port().init, jax.random.key(0), X)
    return jbn.convert(theirs.state_dict(), "torch", "linen", names=NAMES, like=like)


def record(torch, model, training=False):
    model.train(training)
    return jbn.record(model, torch.from_numpy(np.moveaxis(X, -1, 1).copy()))


def test_a_port_of_a_pytorch_model_in_evaluation_and_training(torch, theirs, variables):
    state = {name: array.clone() for name, array in theirs.state_dict().items()}
    for training, call in ((False, {}), (True, {"train": True, "mutable": ["batch_stats"]})):
        a, b = record(torch, theirs, training), jbn.linen.record(Port(), variables, X, **call)
        found = jbn.compare(a, b)
        assert found.first is None, found
        assert [match.paths for match in found.matches] == [*NAMES.items(), ("", "")]
        assert found.alone == (("relu", "relu (2)"), ())
        assert jbn.compare(b, a).first is None
    theirs.load_state_dict(state)
    assert not any("forward" in vars(layer) for layer in theirs.modules())


def test_statistics_that_a_record_moves_are_warned_of(torch, recwarn):
    norm = torch.nn.BatchNorm1d(3)
    for layer in (norm.eval(), torch.nn.BatchNorm1d(3, track_running_stats=False), torch.nn.Linear(3, 3)):
        jbn.record(torch.nn.Sequential(layer), torch.ones(4, 3))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"The model is in training: .* statistics move .*Call model\.eval\(\) first"):
        jbn.record(torch.nn.Sequential(norm.train()).eval().append(norm.train()), torch.ones(4, 3))


@pytest.mark.parametrize("names", [None, {**NAMES, "relu*": None}, lambda path: NAMES.get(path)])
def test_what_ports_do_otherwise_is_found(torch, theirs, variables, names):
    a = record(torch, theirs)
    for port, at, message in (
        (Port(padding="SAME"), ("conv2", "Conv_1"), "windows that begin elsewhere"),
        (
            Port(activate=False),
            ("fc", "Dense_0"),
            "a is the mean over positions of relu and b the mean over positions of itself",
        ),
        (Port(epsilon=1e-3), ("bn1", "BatchNorm_0"), "another epsilon"),
    ):
        found = jbn.compare(a, jbn.linen.record(port, variables, X), names=names)
        assert found.first.paths == at, found
        assert message in found.message
        assert [match.paths for match in found.matches][:-1] == [*NAMES.items()][: len(found.matches) - 1]


class Fused(nn.Module):
    """A port whose norms do the activation and the addition; the second is pooled, the last is flattened."""

    activation: object = nn.relu
    features_first: bool = True

    @nn.compact
    def __call__(self, x):
        def norm(**options):
            return jbn.linen.BatchNorm(True, activation=self.activation, **options)

        y = norm(name="bn1")(nn.Conv(8, (3, 3), padding=1, name="conv1")(x))
        x = nn.max_pool(norm(name="bn2")(nn.Conv(8, (3, 3), padding=1, name="conv2")(y)), (2, 2), (2, 2))
        y = norm(name="bn3")(nn.Conv(8, (3, 3), padding=1, name="conv3")(x), residual=x)
        y = norm(name="bn4")(nn.Conv(8, (3, 3), padding=1, name="conv4")(y), residual=y)
        y = y.transpose(0, 3, 1, 2) if self.features_first else y
        return nn.Dense(5, name="fc")(y.reshape(len(y), -1))


@pytest.fixture(scope="module")
def functional(torch):
    """A model whose activations are functions: between a norm and what comes next nothing is recorded."""

    class Net(torch.nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.activation = activation
            for i in range(1, 5):
                setattr(self, f"conv{i}", torch.nn.Conv2d(3 if i == 1 else 8, 8, 3, padding=1))
                setattr(self, f"bn{i}", torch.nn.BatchNorm2d(8))
            self.fc = torch.nn.Linear(8 * 8 * 8, 5)

        def forward(self, x):
            y = self.activation(self.bn1(self.conv1(x)))
            x = torch.nn.functional.max_pool2d(self.activation(self.bn2(self.conv2(y))), 2)
            y = self.activation(self.bn3(self.conv3(x)) + x)
            return self.fc(self.activation(self.bn4(self.conv4(y)) + y).flatten(1))

    def build(activation):
        torch.manual_seed(0)
        net = Net(activation)
        for name, value in net.named_buffers():
            if value.ndim:
                value.copy_(torch.rand(8) + 0.5 if name.endswith("var") else torch.randn(8) / 8)
        return net

    return build


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_an_activation_inside_of_a_norm_is_that_which_a_function_computes(torch, functional, name):
    ours, theirs = getattr(nn, name), functional(getattr(torch.nn.functional, name))
    variables, a = jbn.convert(theirs, "torch", "linen", flattened={}), record(torch, theirs)
    for port, at in (
        (Fused(ours), None),
        (Fused(ours, features_first=False), ("fc", "fc")),
        (Fused(lambda x: x), ("conv2", "conv2")),  # the activation is missing
    ):
        b = jbn.linen.record(port, variables, X)
        for found in (jbn.compare(a, b), jbn.compare(b, a)):
            assert (found.first and found.first.paths) == at, found


def test_models_that_return_the_same_part_nowhere(torch, functional):
    """The pooled activation is none that is known by its numbers, and nothing takes what the norm returned."""
    theirs = functional(torch.nn.functional.softplus)
    variables, a = jbn.convert(theirs, "torch", "linen", flattened={}), record(torch, theirs)
    b = jbn.linen.record(Fused(nn.softplus), variables, X)
    assert jbn.compare(a, b).first is None
    assert jbn.compare(a, b, names=lambda path: path or None).first is None
    del a[""]
    assert jbn.compare(a, b).first.paths == ("bn2", "bn2")


def test_an_activation_inside_of_a_norm_beside_none_is_missing(torch, functional):
    theirs = functional(torch.nn.Identity())
    variables, a = jbn.convert(theirs, "torch", "linen", flattened={}), record(torch, theirs)
    found = jbn.compare(a, jbn.linen.record(Fused(), variables, X))
    assert found.first.paths == ("bn1", "bn1"), found
    assert "b equals relu(a): a lacks an activation" in found.message


def test_what_replace_calls_has_the_kind_of_the_layer():
    layer, x = nn.BatchNorm(True), np.ones((4, 3), np.float32)
    variables = layer.init(jax.random.key(0), x)
    with jbn.linen.replace():
        assert [call.kind for call in jbn.linen.record(layer, variables, x).values()] == ["BatchNorm"]


def test_names_that_pair_nothing_are_refused(torch, theirs):
    a = record(torch, theirs)
    with pytest.raises(ValueError, match=r"names pairs none of the 8 calls of a \('conv1', .*; expected paths of a"):
        jbn.compare(a, a, names=lambda path: path + "?")
    with pytest.raises(ValueError, match="expected as many stars on both sides"):
        jbn.compare(a, a, names={"conv*": "conv"})
    with pytest.raises(TypeError, match=r"a is of type int; expected what jbn\.linen\.record"):
        jbn.compare(3, a)
    with pytest.raises(ValueError, match="tolerance is 2; expected a relative error between 0 and 1"):
        jbn.compare(a, a, tolerance=2)
    with pytest.raises(TypeError, match="tolerance is of type str; expected a number"):
        jbn.compare(a, a, tolerance="tight")
    with pytest.raises(TypeError, match="a has the path 0; expected text"):
        jbn.compare({0: np.ones(3)}, a)


def test_a_model_that_raises_is_put_right(torch, theirs):
    with pytest.raises(RuntimeError):
        jbn.record(theirs, torch.zeros(3))
    assert not any("forward" in vars(layer) for layer in theirs.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["the transformed function", "apply"])
def test_a_haiku_model_and_its_port(part):
    hk = pytest.importorskip("haiku")

    def net(x, train):
        for i, stride in enumerate((1, 2), 1):
            x = hk.Conv2D(8, 3, stride, with_bias=False, name=f"conv{i}")(x)
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, eps=1e-5, name=f"bn{i}")(x, train))
        return hk.Linear(5, name="fc")(x.mean((1, 2)))

    model = hk.transform_with_state(net)
    with jax.numpy_rank_promotion("allow"):
        params, state = model.init(jax.random.key(0), X, True)
        called = model if part == "the transformed function" else model.apply
        a = {train: jbn.record(called, params, state, None, X, train) for train in (False, True)}
    variables = jbn.convert((params, state), "haiku", "linen", names=NAMES)
    for train, epsilon, first in ((False, 1e-5, None), (True, 1e-5, None), (False, 1e-3, ("bn1", "BatchNorm_0"))):
        call = {"train": True, "mutable": ["batch_stats"]} if train else {}
        found = jbn.compare(a[train], jbn.linen.record(Port("SAME", epsilon=epsilon), variables, X, **call))
        assert (found.first and found.first.paths) == first, found
        assert [match.paths for match in found.matches] == [*NAMES.items()]


def test_a_port_of_a_keras_model(keras):
    layers = keras.layers
    with jax.numpy_rank_promotion("allow"):
        inputs = keras.Input(X.shape[1:])
        y = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(inputs)
        y = layers.ReLU()(layers.BatchNormalization(name="bn1")(y))
        y = layers.Conv2D(8, 3, 2, padding="same", use_bias=False, name="conv2")(y)
        y = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.BatchNormalization(name="bn2")(y)))
        model = keras.Model(inputs, layers.Dense(5, name="fc")(y), name="net")
        a = jbn.record(model, X, training=False)
        assert not any("call" in vars(layer) for layer in model._flatten_layers())
        weights = {v.path: v.numpy() for v in model.weights}
    variables = jbn.convert(weights, "keras", "linen", names=NAMES)
    for epsilon, first in ((1e-3, None), (1e-5, ("bn1", "BatchNorm_0"))):
        found = jbn.compare(a, jbn.linen.record(Port("SAME", epsilon=epsilon), variables, X))
        assert (found.first and found.first.paths) == first, found
        assert [match.paths for match in found.matches][:5] == [*NAMES.items()]
