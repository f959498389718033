"""propose_names: all pairs of twins are right or marked, and the text is what a person pastes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")

import flax.linen as nn
from flax import nnx

import jbn
from benchmarks.twins import EFFICIENT, MOBILE, DenseNet, Mobile, ResNet, Truth, shapes

TWINS = {
    "ResNet of torchvision": lambda: ResNet(Truth("torch"), (2, 2), 8, 5),
    "ResNet of Keras": lambda: ResNet(Truth("keras"), (2, 2), 8, 5),
    "MobileNet": lambda: Mobile(Truth("torch"), False, MOBILE[:3]),
    "EfficientNet": lambda: Mobile(Truth("torch"), True, EFFICIENT[:3]),
    "DenseNet": lambda: DenseNet(Truth("torch"), (3, 2), 4, 5),
}


def random(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.random(a.shape, a.dtype), tree)


def twin(name, order=list):
    """Return a model of PyTorch, in an order of its layers, its twin in Flax and what is which."""
    model = TWINS[name]()
    like, x = shapes(model)
    truth = model.truth.names
    variables = random(like)
    back = {new: old for old, new in truth.items()}
    # Without points in the names of Keras they are those of PyTorch too.
    theirs = jbn.convert(variables, "linen", "torch", names=back.get)
    rank = {path: i for i, path in enumerate(order(truth))}
    theirs = {key: theirs[key] for key in sorted(theirs, key=lambda key: rank[key.rpartition(".")[0]])}
    return theirs, model, variables, like, x, truth


def propose(theirs, model, like, x):
    return jbn.propose_names(theirs, "torch", "linen", x, like=like, call=model.apply)


def check(proposal, truth):
    """Hold a proposal against what is right; return how many guesses are not."""
    assert {match.source for match in proposal.matches} == truth.keys()
    wrong = [match for match in proposal.certain if match.target != truth[match.source]]
    assert not wrong
    for match in proposal.ambiguous:
        assert truth[match.source] in (match.target, *match.rivals)
    return sum(match.target != truth[match.source] for match in proposal.ambiguous)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_found(name):
    theirs, model, variables, like, x, truth = twin(name)
    proposal = propose(theirs, model, like, x)
    assert check(proposal, truth) == 0
    # What can be exchanged are the ends of a branch and of a shortcut, no others.
    ends = ("0.conv3", "0.bn3", "downsample", "block1_3", "block1_0")
    assert all(any(end in match.source for end in ends) for match in proposal.ambiguous)
    assert len(proposal.certain) == {"ResNet of torchvision": 25, "ResNet of Keras": 25}.get(name, len(truth))
    got = jbn.convert(theirs, "torch", "linen", names=proposal.names, like=like)
    jax.tree.map(np.testing.assert_array_equal, got, variables)


def shortcut_first(truth):
    """Return layers as Keras has them: those of the shortcut before the last ones of the branch."""

    def rank(path):
        block, _, rest = path.partition("block")
        return (
            block,
            rest[:1],
            {"1_conv": 0, "1_bn": 1, "2_conv": 2, "2_bn": 3, "0_conv": 4, "3_conv": 5}.get(rest[2:], 6),
        )

    blocks = sorted((path for path in truth if "block" in path), key=rank)
    return [*(path for path in truth if path.startswith("conv1")), *blocks, "predictions"]


def test_an_order_of_layers_beside_one_another_decides_nothing():
    theirs, model, _, like, x, truth = twin("ResNet of Keras", shortcut_first)
    proposal = propose(theirs, model, like, x)
    check(proposal, truth)
    assert len(proposal.certain) == 25


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("order", [sorted, lambda truth: [*truth][::-1]], ids=["sorted", "backwards"])
def test_a_source_in_no_order_is_told_by_its_shapes_alone(name, order):
    theirs, model, _, like, x, truth = twin(name, order)
    proposal = propose(theirs, model, like, x)
    check(proposal, truth)
    assert {match.reason for match in proposal.certain} == {"shapes"}


def test_without_a_call_order_decides_nothing():
    theirs, _, _, like, _, truth = twin("MobileNet")
    proposal = jbn.propose_names(theirs, "torch", "linen", like=like)
    check(proposal, truth)
    assert {match.reason for match in proposal.certain} == {"shapes"}
    assert proposal.ambiguous


def test_the_text_is_python():
    theirs, model, _, like, x, _ = twin("ResNet of torchvision")
    proposal = propose(theirs, model, like, x)
    said = {}
    exec(repr(proposal), said)
    assert said["names"] == proposal.names
    assert list(said["names"]) == [match.source for match in proposal.matches]
    line = next(line for line in repr(proposal).splitlines() if "layer1.0.conv3" in line)
    assert line.endswith("# AMBIGUOUS, beside one another: or 'Bottleneck_0/Conv_3'")
    assert repr(proposal).endswith("# 31 layers: 25 certain, 6 ambiguous, 0 without a match; 0 lacking in the source")


def test_kinds_are_proposed():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (1, 1))(x)
            return nn.Conv(6, (3, 3), feature_group_count=6)(x)

    model, x = Net(), jnp.ones((1, 4, 4, 3))
    variables = random(jax.eval_shape(model.init, jax.random.key(0), x))
    kernels = {name: layer["kernel"] for name, layer in variables["params"].items()}
    theirs = {"point/kernel": kernels["Conv_0"], "point/bias": variables["params"]["Conv_0"]["bias"]}
    theirs |= {"deep/kernel": kernels["Conv_1"].reshape(3, 3, 6, 1), "deep/bias": variables["params"]["Conv_1"]["bias"]}
    proposal = jbn.propose_names(theirs, "keras", "linen", x, like=variables, call=model.apply)
    assert proposal.names == {"point": "Conv_0", "deep": "Conv_1"}
    assert proposal.kinds == {"deep": "depthwise"}
    got = jbn.convert(theirs, "keras", "linen", names=proposal.names, kinds=proposal.kinds, like=variables)
    jax.tree.map(np.testing.assert_array_equal, got, variables)
    said = {}
    exec(repr(proposal), said)
    assert said["kinds"] == proposal.kinds


def dense(size_in, size_out):
    return {"weight": np.ones((size_out, size_in), "float32"), "bias": np.ones(size_out, "float32")}


def state_dict(**layers):
    return {f"{path}.{name}": array for path, layer in layers.items() for name, array in layer.items()}


def chain(*sizes):
    model = nn.Sequential([nn.Dense(size) for size in sizes])
    x = jnp.ones((1, 3))
    return model, jax.eval_shape(model.init, jax.random.key(0), x), x


def test_what_is_left_over_and_what_is_lacking():
    model, like, x = chain(3, 4, 5)
    theirs = state_dict(stem=dense(3, 3), more=dense(7, 7), body=dense(3, 4))
    proposal = propose(theirs, model, like, x)
    assert proposal.names == {"stem": "layers_0", "more": None, "body": "layers_1"}
    assert (proposal.unmatched, proposal.lacking) == (("more",), ("layers_2",))
    assert "# lacking: layers_2" in repr(proposal)
    assert "None,        # left out: fits no layer: bias (7,), weight (7, 7)\n" in repr(proposal)


def test_more_layers_than_places_are_ambiguous():
    model, like, x = chain(3, 3, 4)
    theirs = state_dict(stem=dense(3, 3), mid=dense(3, 3), body=dense(3, 3), head=dense(3, 4))
    proposal = propose(theirs, model, like, x)
    assert [match.source for match in proposal.certain] == ["head"]
    assert [match.source for match in proposal.ambiguous] == ["stem", "mid", "body"]
    assert {*proposal.names.values()} == {"layers_0", "layers_1", "layers_2", None}


def test_layers_that_are_called_twice_are_in_no_order():
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b = nn.Dense(3), nn.Dense(3)
            return nn.Dense(4)(nn.Dense(4)(nn.Dense(4)(b(a(b(a(x)))))))

    model, x = Loop(), jnp.ones((1, 3))
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    theirs = state_dict(stem=dense(3, 3), body=dense(3, 3), wide=dense(3, 4), up=dense(4, 4), head=dense(4, 4))
    proposal = propose(theirs, model, like, x)
    assert [match.source for match in proposal.certain] == ["wide", "up", "head"]  # which are told apart still


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, lambda f: lambda v, x: jax.lax.scan(lambda c, _: (f(v, c), None), x, None, 2)[0]]
)
def test_order_is_seen_inside(wrap):
    model, like, x = chain(3, 3)
    theirs = state_dict(stem=dense(3, 3), body=dense(3, 3))
    proposal = jbn.propose_names(theirs, "torch", "linen", x, like=like, call=wrap(model.apply))
    once = len(proposal.certain) == 2
    assert once == (wrap in (jax.jit, jax.checkpoint))  # in a loop each is before the other


def test_a_model_of_nnx():
    rngs = nnx.Rngs(0)
    layers = [
        nnx.Linear(3, 3, rngs=rngs),
        nnx.BatchNorm(3, rngs=rngs),
        nnx.Linear(3, 3, rngs=rngs),
        nnx.BatchNorm(3, rngs=rngs),
    ]
    model = nnx.Sequential(*layers)
    model.eval()
    graph, like = nnx.split(model)
    norm = {name: np.ones(3, "float32") for name in ("weight", "bias", "running_mean", "running_var")}
    theirs = state_dict(stem=dense(3, 3), norm=norm, body=dense(3, 3), after=norm)
    call = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    proposal = jbn.propose_names(theirs, "torch", "nnx", jnp.ones((2, 3)), like=like, call=call)
    assert proposal.names == {old: f"layers/{i}" for i, old in enumerate(("stem", "norm", "body", "after"))}
    assert len(proposal.certain) == 4


def test_same_paths_need_no_call():
    _, like, _ = chain(3, 3)
    proposal = jbn.propose_names(random(like), "linen", "linen", like=like)
    assert proposal.names == {"layers_0": "layers_0", "layers_1": "layers_1"}
    assert len(proposal.certain) == 2


def test_a_layer_inside_of_another_is_named_first():
    norm = {name: np.ones(3, "float32") for name in ("weight", "bias", "running_mean", "running_var")}
    theirs = {"a.scale_of_all": np.ones(2, "float32"), **state_dict(**{"a.b": norm})}
    like = {
        "params": {"x": {"scale_of_all": np.ones(2, "float32")}, "y": {"scale": norm["bias"], "bias": norm["bias"]}}
    }
    like["batch_stats"] = {"y": {"mean": norm["bias"], "var": norm["bias"]}}
    proposal = jbn.propose_names(theirs, "torch", "linen", like=like)
    assert list(proposal.names.items()) == [("a.b", "y"), ("a", "x")]
    jbn.convert(theirs, "torch", "linen", names=proposal.names, like=like)


def test_a_call_without_data_is_refused():
    model, like, x = chain(3, 3)
    theirs = state_dict(stem=dense(3, 3), body=dense(3, 3))
    with pytest.raises(ValueError, match="call meets no data; expected those of the model in inputs"):
        jbn.propose_names(theirs, "torch", "linen", like=like, call=lambda v: model.apply(v, x))


def test_a_model_itself_says_what_its_layers_are():
    """With as many channels in as out, shapes do not tell that a convolution is transposed."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 4, 3), torch.nn.Linear(4, 4))
    model = nn.Sequential([nn.ConvTranspose(4, (3, 3), transpose_kernel=True), nn.Dense(4)])
    x = jnp.ones((1, 5, 5, 4))
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    proposal = jbn.propose_names(theirs, "torch", "linen", x, like=like, call=model.apply)
    assert proposal.names == {"0": "layers_0", "1": "layers_1"}
    assert proposal.kinds == {"0": "transposed"}
