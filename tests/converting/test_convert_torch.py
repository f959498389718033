"""convert and PyTorch: the layers of its package evaluate alike, and train alike for ten steps."""

from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
from tests.support import nets
from tests.support.nets import EPSILON, EVALUATED, FLAT, MOMENTUM, TRAINED, gap


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")  # takes seconds


@pytest.fixture(scope="module")
def model(torch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            options = {"eps": EPSILON, "momentum": 1 - MOMENTUM}
            self.conv = torch.nn.Conv2d(3, 8, 3, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(8, **options)
            self.grouped = torch.nn.Conv2d(8, 8, 3, groups=4)
            self.channelwise = torch.nn.Conv2d(8, 16, 2, groups=8)
            self.bn2 = torch.nn.BatchNorm2d(16, **options)
            self.up = torch.nn.ConvTranspose2d(16, 6, 3, 2)
            self.bn3 = torch.nn.BatchNorm2d(6, **options)
            self.fc = torch.nn.Linear(150, nets.LABELS)

        def forward(self, x):
            x = torch.nn.functional.silu(self.bn1(self.conv(x)))
            x = torch.nn.functional.silu(self.bn2(self.channelwise(self.grouped(x))))
            x = torch.nn.functional.silu(self.bn3(self.up(x)))
            return self.fc(x.flatten(1))

    return Net()


def evaluate(torch, model, x):
    model.eval()
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def images(x):
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def test_a_model_tells_its_kinds(torch, model):
    variables = nets.linen_variables(nets.Net())
    found = jbn.convert(variables, "linen", "torch", like=model, flattened={"fc": FLAT})
    assert isinstance(found["up.weight"], torch.Tensor)
    told = {"like": model.state_dict(), "kinds": {"up": "transposed"}, "flattened": {"fc": FLAT}}
    want = jbn.convert(variables, "linen", "torch", **told)
    np.testing.assert_array_equal(found["up.weight"], want["up.weight"])
    model.load_state_dict(found)
    back = jbn.convert(model, "torch", "linen", like=variables, flattened={"fc": FLAT})
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (back, variables)), strict=True))
    assert "embedding" in jbn.convert(torch.nn.Sequential(torch.nn.Embedding(5, 3)), "torch", "linen")["params"]["0"]


@pytest.mark.parametrize("kind", ["transposed", "transpose_kernel"])
def test_a_model_evaluates_alike(torch, model, kind):
    net = nets.Net(transpose_kernel=kind == "transpose_kernel")
    variables, (x, _) = nets.linen_variables(net), nets.batch(0)
    options = {"kinds": {"up": kind}, "flattened": {"fc": FLAT}}
    state_dict = jbn.convert(variables, "linen", "torch", like=model.state_dict(), **options)
    assert all(isinstance(value, torch.Tensor) for value in state_dict.values())
    model.load_state_dict(state_dict)
    assert gap(evaluate(torch, model, images(x)), nets.evaluate(net, variables, x)) <= EVALUATED
    back = jbn.convert(model.state_dict(), "torch", "linen", like=variables, **options)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (back, variables)), strict=True))


def test_a_residual_network_by_names(torch):
    """The names of torchvision, to those of modules in modules, and back."""

    def norm_after(*conv, **options):
        return torch.nn.Conv2d(*conv, bias=False, **options), torch.nn.BatchNorm2d(conv[1])

    class Block(torch.nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.conv1, self.bn1 = norm_after(before, after, 3, padding=1)
            self.conv2, self.bn2 = norm_after(after, after, 3, padding=1)
            self.downsample = torch.nn.Sequential(*norm_after(before, after, 1)) if before != after else None

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Stage(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            def norm_after(window, name, x):
                y = nn.Conv(self.features, (window, window), use_bias=False, name=f"{name}conv")(x)
                return jbn.linen.BatchNorm(True, name=f"{name}norm")(y)

            y = norm_after(3, "second_", nn.relu(norm_after(3, "first_", x)))
            return nn.relu(y + (norm_after(1, "short_", x) if x.shape[-1] != self.features else x))

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(jbn.linen.BatchNorm(True, name="stem_norm")(nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)))
            return Stage(6, name="stage2_block1")(Stage(6, name="stage2_block0")(Stage(4, name="stage1_block0")(x)))

    stem = norm_after(3, 4, 3, padding=1)
    names = ("conv1", "bn1", "relu", "layer1", "layer2")
    parts = *stem, torch.nn.ReLU(), torch.nn.Sequential(Block(4, 4)), torch.nn.Sequential(Block(4, 6), Block(6, 6))
    theirs = torch.nn.Sequential(OrderedDict(zip(names, parts, strict=True)))
    torch.manual_seed(0)
    for value in theirs.state_dict().values():
        value.copy_(torch.rand(value.shape) - 0.3 * (value.ndim > 1)) if value.ndim else None
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 3), np.float32)
    like = jax.eval_shape(Ours().init, jax.random.key(0), x)
    ways = {
        "layer*.*.conv1": "stage*_block*/first_conv",
        "layer*.*.bn1": "stage*_block*/first_norm",
        "layer*.*.conv2": "stage*_block*/second_conv",
        "layer*.*.bn2": "stage*_block*/second_norm",
        "layer*.*.downsample.0": "stage*_block*/short_conv",
        "layer*.*.downsample.1": "stage*_block*/short_norm",
        "conv1": "stem",
        "bn1": "stem_norm",
    }
    variables = jbn.convert(theirs.state_dict(), "torch", "linen", like=like, names=ways)
    assert (
        gap(jax.jit(Ours().apply)(variables, x), evaluate(torch, theirs, images(x)).transpose(0, 2, 3, 1)) <= EVALUATED
    )
    there = {new: old for old, new in ways.items()}
    back = jbn.convert(variables, "linen", "torch", like=theirs.state_dict(), names=there)
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_ten_steps_stay_together(torch, model):
    net = nets.Net(unbiased=True)  # or the running variance would go another way
    options = {"kinds": nets.KINDS, "flattened": {"fc": FLAT}}
    variables = nets.linen_variables(net)
    model.load_state_dict(jbn.convert(variables, "linen", "torch", like=model.state_dict(), **options))
    losses, variables = nets.train_linen(net, variables)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), nets.RATE)
    for step, ours in enumerate(losses):
        x, labels = nets.batch(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(images(x))), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - ours) <= TRAINED * abs(ours)
    theirs = jbn.convert(model.state_dict(), "torch", "linen", like=variables, **options)
    assert gap(theirs, variables) <= TRAINED
    x, _ = nets.batch(nets.STEPS)
    assert gap(evaluate(torch, model, images(x)), nets.evaluate(net, variables, x)) <= TRAINED


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
def test_a_layer(torch, affine, bias, unbiased):
    """Options and arrays of one layer; then ten steps of its running statistics."""
    options = {"eps": 1e-3, "momentum": 0.3, "affine": affine, "bias": bias}
    theirs = torch.nn.BatchNorm1d(5, **options)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.5) if value.ndim else None
    ours = jbn.convert_options(options, "torch", "jbn")
    assert ours.pop("unbiased")
    params, state = jbn.convert(theirs.state_dict(), "torch", "jbn")
    assert (params.scale is None, params.bias is None) == (not ours.pop("use_scale"), not ours.pop("use_bias"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 5), np.float32)
    assert gap(jbn.bn_forward(params, state, x, False, **ours)[0], evaluate(torch, theirs, x)) <= EVALUATED
    theirs.train()
    step = jax.jit(lambda state, x: jbn.bn_forward(params, state, x, True, unbiased=unbiased, **ours))
    for _ in range(10):
        x = rng.standard_normal((16, 5), np.float32) + 1
        y, state = step(state, x)
        assert gap(y, theirs(torch.from_numpy(x)).detach().numpy()) <= 1e-5
    assert gap(state.mean, theirs.running_mean.numpy()) <= EVALUATED
    # As the other kind of variance would be: after ten steps almost all of it is from batches of 16.
    other = 1 if unbiased else 16 / 15
    assert gap(state.var * other, theirs.running_var.numpy()) <= (EVALUATED if unbiased else 3e-3)
    if not unbiased:
        assert gap(state.var, theirs.running_var.numpy()) > 0.05


def test_count_is_the_way_between_the_variances(torch):
    """A batch of 16 once, with momentum 1: PyTorch keeps the variance of a sample, count makes the biased one of it."""
    theirs = torch.nn.BatchNorm1d(5, momentum=1.0)
    x = np.random.default_rng(0).standard_normal((16, 5), np.float32)
    theirs(torch.from_numpy(x))
    state = jbn.convert(theirs.state_dict(), "torch", "jbn", count=16)[1]
    np.testing.assert_allclose(state.var, x.astype(np.float64).var(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(torch, dtype):
    theirs = torch.nn.BatchNorm1d(5, dtype=getattr(torch, dtype))
    torch.nn.init.uniform_(theirs.weight)
    tree = jbn.convert(theirs.state_dict(), "torch", "torch")
    assert tree["weight"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(tree["weight"].astype("float64"), theirs.weight.detach().double().numpy())
    like = theirs.state_dict()
    back = jbn.convert(tree, "torch", "torch", like=like)
    assert all(back[name].dtype == like[name].dtype and (back[name] == like[name]).all() for name in like)


def test_tensors_of_many_kinds(torch):
    """Parameters that require gradients, without num_batches_tracked; shapes without values; other groups."""
    theirs = torch.nn.Sequential(torch.nn.ConvTranspose1d(4, 6, 3, groups=2), torch.nn.BatchNorm1d(6))
    tree = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    del tree["1.num_batches_tracked"]
    params, state = jbn.convert(tree, "torch", "jbn")
    assert params["0"]["kernel"].shape == (3, 3, 4)
    with torch.device("meta"):
        like = torch.nn.Sequential(torch.nn.ConvTranspose1d(4, 6, 3, groups=2), torch.nn.BatchNorm1d(6)).state_dict()
    back = jbn.convert((params, state), "jbn", "torch", like=like, kinds={"0": "transpose_kernel"})
    assert all(np.array_equal(back[name], tree[name].detach()) for name in tree)
    assert back["1.num_batches_tracked"] == 0
    with pytest.raises(TypeError, match=r"^0 of tree has a Tensor without values"):
        jbn.convert(like, "torch", "jbn")


def test_files_of_pytorch(torch, tmp_path, model):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    tree = {name: value.bfloat16() for name, value in model.state_dict().items()}
    safetensors.save_file(tree, theirs)
    jbn.save_arrays(ours, jbn.load_arrays(theirs))
    found = safetensors.load_file(ours)
    assert all(torch.equal(found[name], value) for name, value in tree.items())


def test_an_embedding(torch):
    theirs = torch.nn.Embedding(7, 3)
    params = jbn.convert({"e.weight": theirs.weight}, "torch", "linen", kinds={"e": "embedding"})["params"]
    np.testing.assert_array_equal(params["e"]["embedding"][4], theirs(torch.tensor(4)).detach())


def test_defaults_are_those_of_the_package(torch):
    found = jbn.convert_options({}, "torch", "jbn")
    theirs = torch.nn.BatchNorm2d(3)
    assert (found["epsilon"], found["momentum"]) == (theirs.eps, 1 - theirs.momentum)
    assert (found["use_scale"], found["use_bias"]) == (theirs.affine, theirs.bias is not None)
