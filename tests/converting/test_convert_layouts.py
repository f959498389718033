"""convert: what the arrays of a layer mean elsewhere: conventions of the variance, kernels, flattened examples."""

from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported


import jbn
from tests.converting.test_convert import MADE, RNG, equal, layer, torch_norm, wide


@pytest.mark.parametrize(
    ("source", "target", "unbiased", "factor"),
    [
        ("torch", "linen", False, 99 / 100),
        ("torch", "nnx", True, 1),
        ("torch", "keras", False, 99 / 100),
        ("torch", "torch", False, 1),
        ("keras", "torch", False, 100 / 99),
        ("keras", "jbn", False, 1),
        ("keras", "jbn", True, 100 / 99),
        ("jbn", "torch", False, 100 / 99),
        ("jbn", "torch", True, 1),
        ("jbn", "linen", True, 1),
    ],
)
def test_count_converts_the_variance_where_conventions_differ(source, target, unbiased, factor):
    """By n/(n - 1) towards that of a sample, and back; without count nothing is touched."""
    tree = layer(dtype="float32")
    there = jbn.convert(tree, "jbn", source, unbiased=True)  # as it is: no count
    same, new = (jbn.convert(there, source, target, unbiased=unbiased, count=n) for n in (None, 100))
    same, new = (jbn.convert(t, target, "jbn") for t in (same, new))
    equal(same, tree)
    equal((new[0], new[1].mean), (tree[0], tree[1].mean))
    want = (tree[1].var.astype(np.float64) * factor).astype(np.float32)
    np.testing.assert_array_equal(new[1].var, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_count_is_applied_in_the_dtype_of_the_result(dtype):
    tree = torch_norm(dtype=dtype)
    got = jbn.convert(tree, "torch", "keras", count=9)["moving_variance"]
    want = wide(tree["running_var"])
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, (want * np.float64(8 / 9)).astype(want.dtype))


@pytest.mark.parametrize("source", MADE)
@pytest.mark.parametrize("target", MADE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_of_16_bits_are_widened_and_nothing_else_is(source, target, dtype):
    """An average of them stalls; like says otherwise."""
    kernel = np.ones((2, 3), jnp.dtype(dtype))
    tree = {"params": {"fc": {"kernel": kernel}, "n": {"scale": kernel[0]}}, "batch_stats": {"n": {}}}
    tree["batch_stats"]["n"] = {"mean": kernel[0], "var": kernel[0]}
    like = jbn.convert(tree, "linen", source, like=tree if source == "linen" else None)
    there = jax.tree.map(lambda a: np.asarray(a).astype(dtype) if a.dtype == np.float32 else a, like)
    got = jbn.convert(there, source, target)
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(got) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sorted(dtypes) == sorted(["float32"] * 2 + [dtype] * 2)
    narrow = jax.tree.map(lambda a: np.asarray(a).astype(dtype) if a.dtype == np.float32 else a, got)
    got = jbn.convert(there, source, target, like=narrow)
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [leaf.dtype for leaf in jax.tree.leaves(narrow)]


def test_counts_by_pattern():
    tree = {**torch_norm("a.bn."), **torch_norm("b.bn."), **torch_norm("c.bn.")}
    state = jbn.convert(tree, "torch", "nnx", count={"b": np.int64(2), "[ab].bn": 4})
    ratios = [float((state[name]["bn"]["var"] / tree[f"{name}.bn.running_var"])[0]) for name in "abc"]
    assert ratios == pytest.approx([3 / 4, 1 / 2, 1])


@given(
    window=st.lists(st.integers(1, 3), max_size=3),
    ends=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
)
def test_the_two_kernels_of_a_transposed_convolution(window, ends, groups):
    from jbn.converting.dialects import adjoint

    kernel = np.random.default_rng(0).standard_normal((*window, ends[0], ends[1] * groups)).astype("float32")
    other = adjoint(kernel, groups)
    assert other.shape == (*window, ends[1], ends[0] * groups)
    np.testing.assert_array_equal(adjoint(other, groups), kernel)


@pytest.mark.parametrize("window", [(3,), (2, 3)])
def test_transpose_kernel_of_flax_is_the_other_kernel(window):
    """Both layers of Flax give the same y, from one state_dict of PyTorch."""
    rank = len(window)
    x = RNG.standard_normal((2, *(5,) * rank, 4)).astype("float32")
    state_dict = {"up.weight": RNG.standard_normal((4, 6, *window)).astype("float32"), "up.bias": np.ones(6, "float32")}
    ys = []
    for kind in ("transposed", "transpose_kernel"):
        up = nn.ConvTranspose(6, window, (2,) * rank, transpose_kernel=kind == "transpose_kernel", name=None)
        like = {"params": {"up": jax.eval_shape(up.init, jax.random.key(0), x)["params"]}}
        variables = jbn.convert(state_dict, "torch", "linen", like=like, kinds={"up": kind})
        ys.append(up.apply({"params": variables["params"]["up"]}, x))
        np.testing.assert_array_equal(
            jbn.convert(variables, "linen", "torch", like=state_dict, kinds={"up": kind})["up.weight"],
            state_dict["up.weight"],
        )
    np.testing.assert_allclose(*ys, atol=1e-5)
    want = lax.conv_transpose(
        x, jnp.moveaxis(state_dict["up.weight"], (0, 1), (-1, -2)), (2,) * rank, "SAME", transpose_kernel=True
    )
    np.testing.assert_allclose(ys[1], want + 1, atol=1e-5)


def test_depthwise_kernels_of_keras():
    """Output i·multiplier + m belongs to input i and multiplier m."""
    kernel = RNG.standard_normal((3, 3, 4, 2)).astype("float32")
    variables = jbn.convert({"dw/kernel": kernel}, "keras", "linen", kinds={"dw": "depthwise"})
    flat = variables["params"]["dw"]["kernel"]
    assert flat.shape == (3, 3, 1, 8)
    np.testing.assert_array_equal(flat[:, :, 0, 5], kernel[:, :, 2, 1])
    back = jbn.convert(variables, "linen", "keras", like={"dw/kernel": kernel}, kinds={"dw": "depthwise"})
    np.testing.assert_array_equal(back["dw/kernel"], kernel)


@pytest.mark.parametrize("kind", ["transposed", "depthwise"])
@pytest.mark.parametrize("library", ["torch", "keras"])
def test_a_dense_layer_among_convolutions_stays_one(kind, library):
    """A pattern may name a whole decoder."""
    variables = {"params": {"decoder": {"fc": {"kernel": RNG.standard_normal((3, 3)).astype("float32")}}}}
    plain, named = (jbn.convert(variables, "linen", library, kinds=said) for said in (None, {"decoder": kind}))
    equal(named, plain)
    equal(jbn.convert(named, library, "linen", kinds={"decoder": kind}), variables)


def test_embeddings_are_not_transposed():
    table = RNG.standard_normal((7, 3)).astype("float32")
    params = jbn.convert({"emb.weight": table}, "torch", "linen", kinds={"emb": "embedding"})["params"]
    np.testing.assert_array_equal(params["emb"]["embedding"], table)
    for library, name in (("torch", "emb.weight"), ("keras", "emb/embeddings")):
        np.testing.assert_array_equal(jbn.convert({"params": params}, "linen", library)[name], table)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_of_no_known_name_go_along(dtype):
    array = RNG.standard_normal((2, 3)).astype(jnp.dtype(dtype))
    params = jbn.convert({"x.logit_scale": array}, "torch", "linen")["params"]
    equal(params, {"x": {"logit_scale": jnp.asarray(array)}})


def test_what_has_no_meaning_here_goes_along():
    like = {"params": {"x": {"logit_scale": jnp.zeros((2, 3))}}}
    tree = {"x.logit_scale": RNG.standard_normal((2, 3)).astype("float32")}
    np.testing.assert_array_equal(
        jbn.convert(tree, "torch", "linen", like=like)["params"]["x"]["logit_scale"], tree["x.logit_scale"]
    )


def test_a_norm_of_a_layer_may_have_more_axes():
    """As the layer norm of PyTorch over (2, 3): a weight of the shape of the bias is a scale."""
    weight = RNG.standard_normal((2, 3)).astype("float32")
    params = jbn.convert({"ln.weight": weight, "ln.bias": weight + 1}, "torch", "linen")["params"]["ln"]
    np.testing.assert_array_equal(params["scale"], weight)


@pytest.mark.parametrize("outputs", [False, True])
def test_flattened_examples(outputs):
    """Features first, (C, H, W), and last, (H, W, C): y is the same."""
    shape = (2, 3, 4)
    image = RNG.standard_normal(shape).astype("float32")
    weight = RNG.standard_normal((24, 5) if outputs else (5, 24)).astype("float32")
    state_dict = {"fc.weight": weight, "fc.bias": weight[:, 0]}
    dense = jbn.convert(state_dict, "torch", "linen", flattened={"fc": shape})["params"]["fc"]
    last = np.moveaxis(image, 0, -1)
    if outputs:
        z = image.ravel()[:5]
        want = np.moveaxis((weight @ z + weight[:, 0]).reshape(shape), 0, -1)
        got = (z @ dense["kernel"] + dense["bias"]).reshape(last.shape)
    else:
        want = weight @ image.ravel() + weight[:, 0]
        got = last.ravel() @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    back = jbn.convert({"params": {"fc": dense}}, "linen", "torch", flattened={"fc": shape})
    equal(back, state_dict)


def test_a_norm_of_flattened_examples():
    tree = torch_norm("bn.", 24)
    stats = jbn.convert(tree, "torch", "linen", flattened={"bn": (2, 3, 4)})["batch_stats"]["bn"]
    want = np.moveaxis(tree["bn.running_mean"].reshape(2, 3, 4), 0, -1).ravel()
    np.testing.assert_array_equal(stats["mean"], want)
    same = jbn.convert(tree, "torch", "torch", flattened={"bn": (2, 3, 4)})
    np.testing.assert_array_equal(same["bn.running_mean"], tree["bn.running_mean"])


def test_pixels_of_one_need_no_order():
    square = {"fc.weight": RNG.standard_normal((6, 6)).astype("float32")}
    params = jbn.convert(square, "torch", "linen", flattened={"fc": (6, 1, 1)})["params"]
    np.testing.assert_array_equal(params["fc"]["kernel"], square["fc.weight"].T)


# Rows of a dense layer after a convolution of 6 channels, what else there is before it, and the shape that somebody
# must tell, if anybody must.
AFTER = {
    "flattened": (6 * 25, {}, (6, 5, 5)),
    "flattened, not square": (6 * 10, {}, (6, 10, 1)),
    "the widest of several": (9 * 25, {"deep.weight": (9, 6, 3, 3), "end.weight": (5, 9, 3, 3)}, (9, 5, 5)),
    "the last of several": (4 * 25, {"deep.weight": (9, 6, 3, 3), "a.weight": (4, 9, 3, 3)}, (4, 5, 5)),
    "pooled": (6, {}, None),
    "no multiple": (40, {}, None),
    "after a dense layer": (12, {"a.weight": (12, 6), "a.bias": (12,)}, None),
    "after a norm": (12, {"a.weight": (12,), "a.running_mean": (12,), "a.running_var": (12,)}, None),
    "without a convolution": (150, {"conv.weight": (6, 3)}, None),
}


@pytest.mark.parametrize("case", AFTER)
def test_a_dense_layer_that_seems_to_take_flattened_images_is_warned_of(case, recwarn):
    rows, others, example = AFTER[case]
    shapes = {"conv.weight": (6, 3, 5, 5)} | others | {"fc.weight": (10, rows)}
    # As from PyTorch: JAX would sort the names of a plain dictionary.
    tree = OrderedDict((name, np.ones(shape, np.float32)) for name, shape in shapes.items())
    variables = jbn.convert(tree, "torch", "linen")
    text = [str(warning.message) for warning in recwarn.list]
    warns = example is not None
    assert len(text) == warns
    if warns:
        (place,) = (name[:-7] for name, shape in shapes.items() if len(shape) == 4 and shape[0] == example[0])
        each = rows // example[0]
        assert f"fc of tree takes {rows} values, {each} for each of the {example[0]} channels of {place}:" in text[0]
        assert f"flattened={{'fc': {example}}}" in text[0]
        assert recwarn.list[0].filename == __file__
        assert jbn.convert(tree, "torch", "linen", flattened={"fc": example})
        assert len(recwarn.list) == 1
        if not others:  # the other way round too; there the names are in order, and tell nothing of that of the layers
            jbn.convert(variables, "linen", "torch")
            assert len(recwarn.list) == 2
    told = len(recwarn.list)
    jbn.convert(tree, "torch", "linen", flattened={})
    jbn.convert(tree, "torch", "torch")
    assert len(recwarn.list) == told


# The shape that is told of a dense layer after convolutions from 3 to 6 to 8 channels, and the one that is expected.
TOLD = {
    "features last": ((4, 4, 8), (8, 4, 4)),
    "features first": ((8, 4, 4), None),
    "first of another layer": ((6, 4, 8), None),
    "an image that no layer has taken": ((3, 5, 8), None),
    "neither": ((4, 5, 7), None),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_flattened_shape_with_features_last_is_warned_of(case, recwarn):
    example, expected = TOLD[case]
    shapes = {"a.weight": (6, 3, 5, 5), "b.weight": (8, 6, 5, 5), "fc.weight": (10, int(np.prod(example)))}
    tree = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    jbn.convert(tree, "torch", "linen", flattened={"fc": example})
    text = [str(warning.message) for warning in recwarn.list]
    assert len(text) == (expected is not None)
    if text:
        assert text[0].startswith(f"flattened is {example} for fc, and no layer has 4 channels, but b has 8.")
        assert f"as in {expected}," in text[0]
        assert recwarn.list[0].filename == __file__
