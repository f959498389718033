"""``names`` of convert: arrays of other names, numbers, and the prefixes of wrappers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

V = dict(zip("gbmv", np.random.default_rng(0).random((4, 3), "float32"), strict=True))
KERAS = {"gamma": V["g"], "beta": V["b"], "moving_mean": V["m"], "moving_variance": V["v"]}
TORCH = {"weight": V["g"], "bias": V["b"], "running_mean": V["m"], "running_var": V["v"]}
LIKE = jax.eval_shape(
    lambda: {
        "params": {"norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}},
        "batch_stats": {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}},
    }
)
WANT = {"params": {"norm": {"scale": V["g"], "bias": V["b"]}}, "batch_stats": {"norm": {"mean": V["m"], "var": V["v"]}}}


def under(path, layer):
    return {f"{path}{name}": value for name, value in layer.items()}


RENAMED = {
    "the suffix of TensorFlow": ({f"bn/{name}:0": value for name, value in KERAS.items()}, {"*:0": "*", "bn": "norm"}),
    "deeper": ({f"a/b/bn/{name}:0": value for name, value in KERAS.items()}, {"*:0": "*", "a/b/bn": "norm"}),
    "numbers": (
        {f"layers/bn/vars/{i}": value for i, value in enumerate(KERAS.values())},
        {**{f"bn*/vars/{i}": f"bn*/{name}" for i, name in enumerate(KERAS)}, "layers/bn": "norm"},
    ),
    "left out": ({**under("bn/", KERAS), "bn/seed": np.zeros(2)}, {"seed": None, "bn": "norm"}),
    "the first that matches": (
        {"bn/one:0": V["g"], **{f"bn/{name}:0": value for name, value in KERAS.items() if name != "gamma"}},
        {"one:0": "gamma", "*:0": "*", "bn": "norm"},
    ),
}


@pytest.mark.parametrize("case", RENAMED)
@pytest.mark.parametrize("like", [LIKE, None], ids=["like", "alone"])
def test_arrays_are_renamed(case, like):
    tree, names = RENAMED[case]
    jax.tree.map(np.testing.assert_array_equal, jbn.convert(tree, "keras", "linen", names=names, like=like), WANT)


def test_a_function_renumbers():
    def name(path):
        return re.sub(r"layer(\d+)", lambda found: f"layer{int(found[1]) - 1}", path)

    got = jbn.convert(under("layer1.", TORCH) | under("layer2.", TORCH), "torch", "linen", names=name)
    assert {*got["params"]} == {"layer0", "layer1"}


def test_two_arrays_of_one_name_are_refused():
    tree = {**under("bn/", KERAS), "bn/gamma:0": V["g"]}
    with pytest.raises(ValueError, match=r"names: bn/gamma:0 becomes bn/gamma; expected a path of its own for each"):
        jbn.convert(tree, "keras", "linen", names={"*:0": "*"})


def test_a_star_is_no_name_of_every_array():
    with pytest.raises(ValueError, match=r"names: '\*' matches none of the 1 layer"):
        jbn.convert(TORCH, "torch", "linen", names={"*": "layers_*"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model."])
def test_the_prefix_of_a_wrapper_is_told(prefix):
    tree = under(f"{prefix}norm.", TORCH)
    with pytest.raises(ValueError, match="tree and like differ") as caught:
        jbn.convert(tree, "torch", "linen", like=LIKE)
    hint = f"All layers of tree are under {prefix[:-1]!r}: names={{{prefix[:-1]!r}: ''}} strips it."
    assert str(caught.value).endswith(hint)
    names = eval(re.search(r"names=(\{.*\})", hint)[1])
    jax.tree.map(np.testing.assert_array_equal, jbn.convert(tree, "torch", "linen", names=names, like=LIKE), WANT)


def test_a_pattern_that_lacks_the_prefix_of_a_wrapper_is_completed():
    tree = under("_orig_mod.module.norm.", TORCH) | under("_orig_mod.module.fc.", {"weight": np.ones((2, 3))})
    hint = r"All are under '_orig_mod{0}module': expected '_orig_mod{0}module{0}{1}'\.$"
    with pytest.raises(ValueError, match=hint.format("[.]", "nor[*]")):
        jbn.convert(tree, "torch", "linen", names={"nor*": "nor*"})
    for tool in (jbn.convert, jbn.propose_names):
        with pytest.raises(ValueError, match="^kinds, .*" + hint.format("/", "fc")):
            tool(tree, "torch", "linen", kinds={"fc": "transposed"}, like=LIKE)
    calls = {"": np.ones(3), "module": np.ones(3), "module.norm": np.ones(3)}  # the wrapper is called too
    with pytest.raises(ValueError, match=r"All are under 'module': expected 'module\.norm'\."):
        jbn.compare(calls, {"": np.ones(3), "bn": np.ones(3)}, names={"norm": "bn"})
    with pytest.raises(ValueError, match="matches none") as caught:
        jbn.convert(tree, "torch", "linen", names={"other": "norm"})
    assert "All are under" not in str(caught.value)


def test_the_same_paths_in_a_wrapper_are_the_same():
    proposal = jbn.propose_names(under("module.norm.", TORCH), "torch", "linen", like=LIKE)
    assert proposal.matches == (jbn.Match("module.norm", "norm", True, "same paths under 'module'"),)


@pytest.mark.parametrize(
    "tree",
    [
        under("bn.", TORCH) | under("norm.", TORCH),
        under("norm.bn.", TORCH),
        TORCH,
        under("a.bn.", TORCH) | under("b.norm.", TORCH),
    ],
    ids=["not all", "like has it too", "the root", "two"],
)
def test_no_prefix_is_told_where_there_is_none(tree):
    with pytest.raises(ValueError, match="tree and like differ") as caught:
        jbn.convert(tree, "torch", "linen", like=LIKE)
    assert "strips it" not in str(caught.value)


@pytest.mark.parametrize("names", [("_mean", "_variance"), ("moving_mean:0", "moving_variance:0"), ("mean", "std")])
def test_what_is_named_as_statistics_elsewhere_becomes_no_parameter(names):
    tree = {f"bn.{name}": np.ones(3, np.float32) for name in ("weight", "bias", *names)}
    with pytest.raises(ValueError, match=rf"^bn of tree has {names[0]}, {names[1]}, which may be no parameter"):
        jbn.convert(tree, "torch", "linen")
    trained = {"params": {"dense": {"std": np.ones(3, np.float32)}}}
    assert jbn.convert(trained, "linen", "jbn")[0]["dense"]["std"].shape == (3,)
