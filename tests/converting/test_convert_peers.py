"""convert and Haiku, Equinox and NNX: their layers evaluate alike, and train alike for ten steps."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
from tests.support import nets
from tests.support.nets import EPSILON, EVALUATED, FLAT, MOMENTUM, TRAINED, gap

# What a library calls although it is deprecated is not for this library to mend.
pytestmark = [
    pytest.mark.usefixtures("foreign"),
    *(pytest.mark.filterwarnings(f"default::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
NET = nets.Net()


@pytest.fixture(scope="module")
def variables():
    return nets.linen_variables(NET)


@pytest.fixture(scope="module")
def trained(variables):
    """Return the losses of ten steps in Linen, and what they end with."""
    return nets.train_linen(NET, variables)


def stepped(loss, params, grads):
    return loss, jax.tree.map(lambda p, g: p - nets.RATE * g, params, grads)


def back(tree, source, variables, **options):
    return jbn.convert(tree, source, "linen", like=variables, **options)


def check_bits(tree, source, variables, **options):
    pairs = zip(*map(jax.tree.leaves, (back(tree, source, variables, **options), variables)), strict=True)
    assert all((a == b).all() for a, b in pairs)


def check_ten_steps(step, tree, source, trained, **options):
    losses, variables = trained
    for number, ours in enumerate(losses):
        loss, tree = step(tree, *nets.batch(number))
        assert abs(loss - ours) <= TRAINED * abs(ours)
    assert gap(back(tree, source, variables, **options), variables) <= TRAINED
    return tree


# Haiku


@pytest.fixture(scope="module")
def hk():
    return pytest.importorskip("haiku")


@pytest.fixture(scope="module")
def haiku(hk):
    def net(x, train):
        def norm(x, name):
            return jax.nn.silu(hk.BatchNorm(True, True, MOMENTUM, eps=EPSILON, name=name)(x, train))

        x = norm(hk.Conv2D(8, 3, padding="VALID", with_bias=False, name="conv")(x), "bn1")
        x = hk.Conv2D(8, 3, padding="VALID", feature_group_count=4, name="grouped")(x)
        x = norm(hk.DepthwiseConv2D(2, 2, padding="VALID", name="channelwise")(x), "bn2")
        x = norm(hk.Conv2DTranspose(6, 3, 2, padding="VALID", name="up")(x), "bn3")
        return hk.Linear(nets.LABELS, name="fc")(hk.Flatten()(x))

    made = hk.transform_with_state(net)
    like = jax.eval_shape(lambda: made.init(jax.random.key(0), jnp.zeros(nets.SHAPE), True))
    apply = jax.jit(lambda tree, x, train: made.apply(*tree, None, x, train), static_argnums=2)

    @jax.jit
    def step(tree, x, labels):
        def of(params):
            logits, state = apply((params, tree[1]), x, True)
            return nets.loss_of(logits, labels), state

        (loss, state), grads = jax.value_and_grad(of, has_aux=True)(tree[0])
        loss, params = stepped(loss, tree[0], grads)
        return loss, (params, state)

    return like, lambda tree, x: apply(tree, x, False)[0], step


def test_haiku(haiku, variables, trained):
    like, evaluate, step = haiku
    tree = jbn.convert(variables, "linen", "haiku", like=like, kinds=nets.KINDS)
    x, _ = nets.batch(0)
    assert gap(evaluate(tree, x), nets.evaluate(NET, variables, x)) <= EVALUATED
    check_bits(tree, "haiku", variables, kinds=nets.KINDS)
    tree = check_ten_steps(step, tree, "haiku", trained, kinds=nets.KINDS)
    assert gap(evaluate(tree, x), nets.evaluate(NET, trained[1], x)) <= TRAINED


def test_haiku_after_few_updates(haiku, variables):
    """Its averages are debiased; those that it evaluates with arrive."""
    like, evaluate, step = haiku
    x, labels = nets.batch(0)
    _, tree = step(nets.drawn(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)), x, labels)
    found = back(tree, "haiku", variables, kinds=nets.KINDS)
    assert gap(nets.evaluate(NET, found, x), evaluate(tree, x)) <= EVALUATED


@pytest.mark.parametrize("separator", ["/", ":", "//"])
def test_flat_files_of_haiku(haiku, variables, separator, tmp_path):
    """One mapping of parameters and state, or one each; the last key is the name of the array."""
    like, _, _ = haiku
    tree = jbn.convert(variables, "linen", "haiku", like=like, kinds=nets.KINDS)
    flat = [
        {f"{module}{separator}{name}": leaf for module, layer in part.items() for name, leaf in layer.items()}
        for part in tree
    ]
    jbn.save_arrays(tmp_path / "m.npz", flat[0] | flat[1])
    check_bits(jbn.load_arrays(tmp_path / "m.npz"), "haiku", variables, kinds=nets.KINDS)
    check_bits(tuple(flat), "haiku", variables, kinds=nets.KINDS)
    jbn.save_arrays(tmp_path / "m.npz", tree)
    check_bits(jbn.load_arrays(tmp_path / "m.npz"), "haiku", variables, kinds=nets.KINDS)


def test_modules_of_haiku_in_modules(hk):
    def net(x):
        return hk.nets.MLP([4], name="mlp")(hk.BatchNorm(True, False, 0.9, name="norm")(x, True))

    tree = hk.transform_with_state(net).init(jax.random.key(0), jnp.ones((2, 3)))
    names = {"mlp/~/linear_*": "mlp/layers_*"}
    found = jbn.convert(tree, "haiku", "linen", names=names)
    assert found["params"]["mlp"]["layers_0"]["kernel"].shape == (3, 4)
    assert set(found["params"]["norm"]) == {"scale"}
    assert found["params"]["norm"]["scale"].shape == found["batch_stats"]["norm"]["var"].shape == (3,)
    again = jbn.convert(found, "linen", "haiku", like=tree, names={new: old for old, new in names.items()})
    assert jax.tree.structure(again) == jax.tree.structure(tree)


def test_a_layer_of_haiku_called_as_an_average_of_its_norms(hk):
    class Net(hk.Module):
        def __init__(self):
            super().__init__("net")
            self.dense, self.norm = hk.Linear(3, name="mean_ema"), hk.BatchNorm(True, True, 0.9, name="var_ema")

        def __call__(self, x):
            return self.norm(self.dense(x), True)

    tree = hk.transform_with_state(lambda x: Net()(x)).init(jax.random.key(0), jnp.ones((2, 2)))
    found = jbn.convert(tree, "haiku", "linen", names={"net/~": ""})
    assert {name: {*layer} for name, layer in found["params"].items()} == {
        "mean_ema": {"kernel", "bias"},
        "var_ema": {"scale", "bias"},
    }
    again = jbn.convert(found, "linen", "haiku", like=tree, names={"": "net/~"})
    assert jax.tree.structure(again) == jax.tree.structure(tree)


# Equinox


@pytest.fixture(scope="module")
def eqx():
    return pytest.importorskip("equinox")


@pytest.fixture(scope="module")
def equinox(eqx):
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        bn1: eqx.nn.BatchNorm
        grouped: eqx.nn.Conv2d
        channelwise: eqx.nn.Conv2d
        bn2: eqx.nn.BatchNorm
        up: eqx.nn.ConvTranspose2d
        bn3: eqx.nn.BatchNorm
        fc: eqx.nn.Linear

        def __init__(self, mode):
            key = jax.random.key(0)
            norm = functools.partial(eqx.nn.BatchNorm, axis_name="batch", eps=EPSILON, momentum=MOMENTUM, mode=mode)
            self.conv = eqx.nn.Conv2d(3, 8, 3, use_bias=False, key=key)
            self.bn1 = norm(8)
            self.grouped = eqx.nn.Conv2d(8, 8, 3, groups=4, key=key)
            self.channelwise = eqx.nn.Conv2d(8, 16, 2, groups=8, key=key)
            self.bn2 = norm(16)
            self.up = eqx.nn.ConvTranspose2d(16, 6, 3, 2, key=key)
            self.bn3 = norm(6)
            self.fc = eqx.nn.Linear(150, nets.LABELS, key=key)

        def __call__(self, x, state, inference):
            x, state = self.bn1(self.conv(x), state, inference=inference)
            x = self.channelwise(self.grouped(jax.nn.silu(x)))
            x, state = self.bn2(x, state, inference=inference)
            x, state = self.bn3(self.up(jax.nn.silu(x)), state, inference=inference)
            return self.fc(jax.nn.silu(x).ravel()), state

    @eqx.filter_jit
    def apply(tree, x, inference):
        model, state = tree
        over = jax.vmap(lambda x: model(x, state, inference), axis_name="batch", out_axes=(0, None))
        return over(jnp.moveaxis(x, -1, 1))

    @eqx.filter_jit
    def step(tree, x, labels):
        model, state = tree

        def of(model):
            logits, new = apply((model, state), x, False)
            return nets.loss_of(logits, labels), new

        (loss, state), grads = eqx.filter_value_and_grad(of, has_aux=True)(model)
        return loss, (eqx.apply_updates(model, jax.tree.map(lambda g: -nets.RATE * g, grads)), state)

    def like(mode):
        return eqx.filter_eval_shape(eqx.nn.make_with_state(Net), mode)

    return like, lambda tree, x: apply(tree, x, True)[0], step


OF_EQUINOX = {"kinds": {"up": "transposed"}, "flattened": {"fc": FLAT}}


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox(equinox, variables, trained, mode):
    """Mode "ema" trains by running statistics, which nothing else does: only its evaluation can be the same."""
    like, evaluate, step = equinox
    tree = jbn.convert(variables, "linen", "equinox", like=like(mode), **OF_EQUINOX)
    x, _ = nets.batch(0)
    assert gap(evaluate(tree, x), nets.evaluate(NET, variables, x)) <= EVALUATED
    check_bits(tree, "equinox", variables, **OF_EQUINOX)
    if mode == "batch":
        tree = check_ten_steps(step, tree, "equinox", trained, **OF_EQUINOX)
        assert gap(evaluate(tree, x), nets.evaluate(NET, trained[1], x)) <= TRAINED


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("updates", [1, 3])
def test_equinox_after_few_updates(equinox, eqx, variables, mode, updates):
    """Averages are divided by 1 - momentum**count, and variances begin with 1; what it evaluates with arrives."""
    like, evaluate, step = equinox
    tree = jbn.convert(variables, "linen", "equinox", like=like(mode), **OF_EQUINOX)
    fresh = eqx.nn.make_with_state(eqx.nn.BatchNorm)  # for the values that a state begins with
    starts = [leaf for norm in (8, 16, 6) for leaf in jax.tree.leaves(fresh(norm, "batch", mode=mode)[1])]
    tree = tree[0], jax.tree.unflatten(jax.tree.structure(tree[1]), starts)
    for number in range(updates):
        _, tree = step(tree, *nets.batch(number))
    x, _ = nets.batch(9)
    found = back(tree, "equinox", variables, **OF_EQUINOX)
    assert gap(nets.evaluate(NET, found, x), evaluate(tree, x)) <= EVALUATED


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_the_next_update_of_equinox(eqx, mode):
    """It moves what was converted by 1 - momentum, as any other, and does not begin anew."""
    params, state = jbn.bn_init(3)
    like = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", momentum=0.75, mode=mode)
    norm, kept = jbn.convert((params, state._replace(mean=jnp.full(3, 4.0))), "jbn", "equinox", like=like)
    _, kept = jax.vmap(norm, (0, None), (0, None), axis_name="batch")(jnp.zeros((5, 3)), kept)
    _, new = jbn.convert((norm, kept), "equinox", "jbn")
    np.testing.assert_allclose(new.mean, 3.0)
    np.testing.assert_allclose(new.var, 0.75)


def test_norms_without_their_state(eqx):
    norm, _ = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    other = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")[1]
    for wrong in (None, other):
        with pytest.raises(TypeError, match=r"tree has norms without a state; expected \(model, state\) of eqx"):
            jbn.convert((norm, wrong), "equinox", "jbn")


def test_a_bias_has_one_axis(eqx):
    theirs = eqx.nn.Conv2d(3, 4, 2, key=jax.random.key(0))
    found = jbn.convert((theirs, None), "equinox", "torch")
    assert {name: value.shape for name, value in found.items()} == {"weight": (4, 3, 2, 2), "bias": (4,)}


def test_groups_of_a_transposed_convolution_of_equinox(eqx):
    """To PyTorch's kernel and back; the groups are those of ``like``."""
    theirs = eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=jax.random.key(0))
    like = {"weight": np.zeros((4, 3, 3, 3), np.float32), "bias": np.zeros(6, np.float32)}
    tree = jbn.convert((theirs, None), "equinox", "torch", like=like, kinds={"": "transposed"})
    found, _ = jbn.convert(tree, "torch", "equinox", like=(theirs, None), kinds={"": "transposed"})
    assert eqx.tree_equal(found, theirs)
    torch = pytest.importorskip("torch")
    up = torch.nn.ConvTranspose2d(4, 6, 3, groups=2)
    up.load_state_dict({name: torch.from_numpy(value) for name, value in tree.items()})
    x = np.random.default_rng(0).standard_normal((4, 5, 5), np.float32)
    assert gap(theirs(x), up(torch.from_numpy(x)).detach().numpy()) <= EVALUATED
    with pytest.raises(ValueError, match=r"^the layer of tree is a transposed convolution; expected like"):
        jbn.convert((theirs, None), "equinox", "torch", kinds={"": "transposed"})


def test_what_else_equinox_remembers_is_not_lost(eqx):
    norm = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        eqx.nn.Linear(3, 4, key=jax.random.key(0)), "weight", key=jax.random.key(1)
    )
    with pytest.raises(ValueError, match=r"2 are left over: 'eqx.nn.State.0' from 'eqx.nn.State'"):
        jbn.convert(norm, "equinox", "torch", like={"layer.weight": np.ones((4, 3)), "layer.bias": np.ones(4)})


# NNX


def test_nnx(variables, trained):
    model = nnx.eval_shape(nets.NNXNet)
    model.eval()
    nnx.update(model, jbn.convert(variables, "linen", "nnx", like=nnx.state(model)))
    x, _ = nets.batch(0)
    graph, _ = nnx.split(model)
    evaluate = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert gap(evaluate(nnx.state(model), x), nets.evaluate(NET, variables, x)) <= EVALUATED
    model.train()
    graph, _ = nnx.split(model)

    @jax.jit
    def step(state, x, labels):
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def of(params):
            model = nnx.merge(graph, params, rest, copy=True)  # or it writes into rest
            loss = nets.loss_of(model(x), labels)
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, stats), grads = jax.value_and_grad(of, has_aux=True)(params)
        loss, params = stepped(loss, params, grads)
        return loss, nnx.merge_state(params, stats)

    check_ten_steps(step, nnx.state(model), "nnx", trained)


# Options


def test_defaults_are_those_of_the_packages(hk, eqx):
    defaults = {
        "haiku": (hk.BatchNorm, ("eps", "decay_rate", "create_scale", "create_offset")),
        "equinox": (eqx.nn.BatchNorm, ("eps", "momentum", "channelwise_affine")),
        "nnx": (nnx.BatchNorm, ("epsilon", "momentum", "use_scale", "use_bias")),
    }
    from jbn.converting.options import DEFAULTS

    for library, (layer, names) in defaults.items():
        theirs = inspect.signature(layer.__init__).parameters
        for name in names:
            want = DEFAULTS[library][name]
            assert theirs[name].default == (inspect.Parameter.empty if want is None else want)


@pytest.mark.parametrize("library", ["haiku", "equinox"])
def test_a_layer(request, library):
    """One norm, with the options of another library, evaluates alike; the path is that of the module, or none."""
    params, state = jbn.bn_init(3)
    params, state = params._replace(scale=jnp.array([1.0, 2, 3])), jbn.State(jnp.ones(3), jnp.array([0.5, 1, 2]))
    options = jbn.convert_options({"eps": 2e-3, "momentum": 0.2}, "torch", library)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    if library == "haiku":
        hk = request.getfixturevalue("hk")
        made = hk.transform_with_state(lambda x: hk.BatchNorm(**options, name="norm")(x, False))
        names, back_again = {"": "norm"}, {"norm": ""}
        like = jax.eval_shape(
            hk.transform_with_state(lambda x: hk.BatchNorm(**options, name="norm")(x, True)).init, jax.random.key(0), x
        )
        tree = jbn.convert((params, state), "jbn", "haiku", like=like, names=names)
        y, _ = made.apply(*tree, None, x)
    else:
        eqx = request.getfixturevalue("eqx")
        like = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", **options)
        back_again = None
        norm, kept = tree = jbn.convert((params, state), "jbn", "equinox", like=like)
        y = jax.vmap(lambda x: norm(x, kept, inference=True)[0], axis_name="batch")(x)
    assert gap(jbn.bn_forward(params, state, x, False, epsilon=2e-3)[0], y) <= EVALUATED
    found = jbn.convert(tree, library, "jbn", names=back_again)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (found, (params, state))), strict=True))
