"""A normalization by running statistics as a multiply-add and inside a layer beside it, against float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jbn
from tests.support import oracle


class Layer(NamedTuple):
    """A layer, its kernel and the layout of that; ``call`` is linear in x and in the kernel."""

    call: Any  # of x and kernel
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    layout: str
    groups: int = 1
    features: int = -1  # their axis in x and y
    padding: Any = None


def conv(x: tuple[int, ...], kernel: tuple[int, ...], layout="HWIO", groups=1, padding="SAME", last=True, **options):
    spatial = layout.replace("I", "").replace("O", "")
    spec = (f"N{spatial}C", layout, f"N{spatial}C") if last else (f"NC{spatial}", layout, f"NC{spatial}")

    def call(x, kernel):
        strides = options.get("strides", (1,) * len(spatial))
        dilation = options.get("dilation")
        return lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=spec, feature_group_count=groups
        )

    return Layer(call, x, kernel, layout, groups, -1 if last else 1, padding)


def transposed(x: tuple[int, ...], kernel: tuple[int, ...], layout="HWIO", groups=1, flipped=False):
    """A transposed convolution of stride 2; its groups, which JAX lacks, are those of PyTorch's kernels."""
    order = [layout.index(letter) for letter in ("HWOI" if flipped else "HWIO")]

    def call(x, kernel):
        kernels = jnp.split(kernel.transpose(order), groups, 3 if flipped else 2)
        parts = zip(jnp.split(x, groups, -1), kernels, strict=True)
        return jnp.concatenate(
            [lax.conv_transpose(x, kernel, (2, 2), "SAME", transpose_kernel=flipped) for x, kernel in parts], -1
        )

    return Layer(call, x, kernel, layout, groups)


def depthwise(x: tuple[int, ...], kernel: tuple[int, ...]):
    """Keras: (h, w, inputs, outputs of each)."""
    h, w, inputs, each = kernel
    plain = conv(x, (h, w, 1, inputs * each), groups=inputs, padding="VALID")
    return Layer(
        lambda x, k: plain.call(x, k.reshape(h, w, 1, inputs * each)), x, kernel, "HWIO", inputs, padding="VALID"
    )


LAYERS = {
    "dense IO": Layer(jnp.matmul, (9, 4), (4, 6), "IO"),
    "dense OI": Layer(lambda x, kernel: x @ kernel.T, (9, 4), (6, 4), "OI"),
    "conv 1-D": conv((3, 9, 4), (3, 4, 6), "WIO"),
    "conv 2-D, strides": conv((3, 9, 8, 4), (3, 3, 4, 6), strides=(2, 1)),
    "conv 2-D, dilated": conv((3, 9, 8, 4), (3, 2, 4, 6), dilation=(2, 3), padding="VALID"),
    "conv 2-D, channels first": conv((3, 4, 9, 8), (6, 4, 3, 3), "OIHW", last=False, padding="VALID"),
    "conv 3-D": conv((2, 4, 5, 3, 2), (2, 2, 2, 2, 4), "DHWIO", padding="VALID"),
    "conv 1×1": conv((3, 5, 5, 4), (1, 1, 4, 6), strides=(2, 2)),
    "grouped": conv((3, 7, 7, 6), (3, 3, 2, 9), groups=3, padding="VALID"),
    "grouped, channels first": conv((3, 6, 7, 7), (9, 2, 3, 3), "OIHW", groups=3, last=False, padding="VALID"),
    "depthwise": conv((3, 7, 7, 6), (3, 3, 1, 6), groups=6, padding="VALID"),
    "depthwise, two outputs each": conv((3, 7, 7, 6), (3, 3, 1, 12), groups=6, padding="VALID"),
    "depthwise of Keras": depthwise((3, 7, 7, 6), (3, 3, 6, 2)),
    "transposed": transposed((3, 5, 5, 4), (3, 3, 4, 6)),
    "transposed, HWOI": transposed((3, 5, 5, 4), (3, 3, 6, 4), "HWOI", flipped=True),
    "transposed, IOHW in groups": transposed((3, 5, 5, 4), (4, 3, 3, 3), "IOHW", groups=2, flipped=True),
}
each = pytest.mark.parametrize("name", LAYERS)


def arrays(layer: Layer, seed: int = 0) -> tuple[Any, Any, Any, int]:
    """Draw x, kernel and bias; return the number of outputs too."""
    rng = np.random.default_rng([seed, *layer.kernel])
    x, kernel = rng.standard_normal(layer.x), rng.standard_normal(layer.kernel)
    outputs = jax.eval_shape(layer.call, x, kernel).shape[layer.features]
    return x, kernel, rng.standard_normal(outputs), outputs


def norm(features: int, seed: int = 0, mean: float = 1.0) -> tuple[jbn.Params, jbn.State]:
    rng = np.random.default_rng([seed, features])
    scale, bias = rng.standard_normal(features) + 1.5, rng.standard_normal(features)
    return jbn.Params(scale, bias), jbn.State(mean * rng.standard_normal(features), rng.uniform(0.1, 4, features))


def run(layer, x, kernel):
    """Return the layer's output in float64: it is not under test."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        return np.asarray(jax.jit(layer.call)(*narrow((x, kernel), np.float64)))


def added(y, bias, axis):
    return y if bias is None else y + np.expand_dims(bias, [i for i in range(y.ndim) if i != axis % y.ndim])


def normalized(x, params, state, axis):
    return oracle.forward(x, params.scale, params.bias, axis=axis, stats=state, epsilon=1e-3).y


def narrow(tree, dtype=np.float32):
    return jax.tree.map(lambda value: np.asarray(value, dtype), tree)


def errors(name, into, with_bias, dtype):
    """Return the largest error of the folded layer and the largest value, both against float64."""
    layer = LAYERS[name]
    x, kernel, bias, outputs = arrays(layer)
    bias = bias if with_bias else None
    params, state = norm(outputs if into == "previous" else layer.x[layer.features])
    x, kernel, bias, params, state = narrow((x, kernel, bias, params, state), dtype)
    options = {"layout": layer.layout, "groups": layer.groups, "into": into, "padding": layer.padding, "epsilon": 1e-3}
    folded, shift = jbn.fold(params, state, kernel, bias, **options)
    assert folded.dtype == shift.dtype == dtype
    if into == "previous":
        want = normalized(added(run(layer, x, kernel), bias, layer.features), params, state, layer.features)
    else:
        want = added(run(layer, normalized(x, params, state, layer.features), kernel), bias, layer.features)
    got = added(run(layer, x, folded), oracle.wide(shift), layer.features)
    return np.abs(got - want).max(), np.abs(want).max()


@each
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_into_the_layer_before(name, with_bias):
    error, size = errors(name, "previous", with_bias, np.float32)
    # Kernel and bias are rounded, and the sums over the kernel are of up to 36 terms of this size.
    assert error <= oracle.tolerance("float32", scale=4 * size)


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name].padding != "SAME" and "trans" not in name])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_into_the_layer_after(name, with_bias):
    error, size = errors(name, "next", with_bias, np.float32)
    assert error <= oracle.tolerance("float32", scale=4 * size)


@each
def test_in_float64(name, x64):
    error, size = errors(name, "previous", True, np.float64)
    assert error <= oracle.tolerance("float64", scale=4 * size)


@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["HWIO", "OIHW", "IHOW"]),
    st.integers(0, 9),
)
def test_into_any_grouped_kernel(groups, inputs, outputs, layout, seed):
    shape = {"H": 2, "W": 1, "I": inputs, "O": outputs * groups}
    plain = conv((2, 3, 3, inputs * groups), (2, 1, inputs, outputs * groups), groups=groups, padding="VALID")
    order = ["HWIO".index(letter) for letter in layout]
    x, kernel, bias, _ = arrays(plain, seed)
    for into, features in (("previous", outputs * groups), ("next", inputs * groups)):
        params, state = norm(features, seed)
        folded, shift = jbn.fold(
            *narrow((params, state, kernel.transpose(order), bias)), layout=layout, groups=groups, into=into, padding=0
        )
        assert folded.shape == tuple(shape[letter] for letter in layout)
        back = np.asarray(folded, np.float64).transpose([layout.index(letter) for letter in "HWIO"])
        got = added(run(plain, x, back), oracle.wide(shift), -1)
        if into == "previous":
            want = oracle.forward(added(run(plain, x, kernel), bias, -1), *params, stats=state).y
        else:
            want = added(run(plain, oracle.forward(x, *params, stats=state).y, kernel), bias, -1)
        np.testing.assert_allclose(got, want, rtol=0, atol=oracle.tolerance("float32", scale=8 * np.abs(want).max()))


@pytest.mark.parametrize("absent", [("scale",), ("bias",), ("scale", "bias")])
def test_absent_parameters_are_one_and_zero(absent):
    params, state = narrow(norm(6))
    kernel = narrow(arrays(LAYERS["dense IO"])[1])
    some = {name: value for name, value in params._asdict().items() if name not in absent}
    whole = {"scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)} | some
    for a, b in zip(*(jbn.fold(p, state, kernel, layout="IO") for p in (some, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_affine_loses_the_digits_that_it_says(mean):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4096, 8)) + mean).astype(np.float32)
    params, _ = narrow(norm(8))
    state = jbn.State(*narrow(oracle.moments(x)[1:]))
    a, b = jbn.affine(params, state)
    want = oracle.forward(x, *params, stats=state)
    error = np.abs(oracle.wide(x) * oracle.wide(a) + oracle.wide(b) - want.y).max()
    size = np.abs(oracle.wide(a) * state.mean).max()
    assert error <= 2.0**-24 * 4 * size + oracle.tolerance("float32", scale=np.abs(want.y).max())
    if mean:
        assert error >= 2.0**-24 * size / 4  # it does lose them
    exact, _ = jbn.bn_forward(params, state, x, False)
    assert np.abs(exact - want.y).max() <= oracle.tolerance("float32", scale=np.abs(want.y).max())


def test_several_axes_of_features_have_an_affine_form():
    state = jbn.State(np.ones((2, 3), np.float32), np.full((2, 3), 3, np.float32))
    a, b = jbn.affine(None, state, epsilon=1.0)
    assert a.shape == (2, 3)
    np.testing.assert_allclose(b, -0.5)


def test_bfloat16_kernels_are_folded_in_float32():
    layer = LAYERS["conv 2-D, strides"]
    _, kernel, bias, outputs = arrays(layer)
    params, state = narrow(norm(outputs))
    kernel, bias = (jnp.asarray(value, jnp.bfloat16) for value in (kernel, bias))
    folded, shift = jbn.fold(params, state, kernel, bias, layout="HWIO")
    wide, wide_shift = jbn.fold(params, state, kernel.astype(np.float32), bias.astype(np.float32), layout="HWIO")
    np.testing.assert_array_equal(folded, wide.astype(jnp.bfloat16))
    np.testing.assert_array_equal(shift, wide_shift.astype(jnp.bfloat16))


def test_it_is_a_function_like_any_other():
    params, state = narrow(norm(6))
    kernel = narrow(arrays(LAYERS["dense IO"])[1])
    eager = jbn.fold(params, state, kernel, layout="IO")
    jitted = jax.jit(lambda *arrays: jbn.fold(*arrays, layout="IO"))(params, state, kernel)
    many = jax.vmap(lambda kernel: jbn.fold(params, state, kernel, layout="IO"))(kernel[None])
    for a, b, c in zip(eager, jitted, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(a, c[0], rtol=1e-6, atol=1e-7)
    slope = jax.grad(lambda scale: jbn.fold({"scale": scale}, state, kernel, layout="IO")[0].sum())(params.scale)
    np.testing.assert_allclose(slope, kernel.sum(0) / np.sqrt(state.var + 1e-5), rtol=1e-5)


KERNEL, GROUPED = np.ones((3, 3, 4, 6), np.float32), np.ones((3, 3, 2, 6), np.float32)
REFUSED = {
    "into": (KERNEL, {"into": "both"}, ValueError, "into is 'both'; expected 'previous' or 'next'"),
    "short layout": (KERNEL, {"layout": "IO"}, ValueError, r"layout is 'IO' for a kernel of shape \(3, 3, 4, 6\)"),
    "two outputs": (KERNEL, {"layout": "HOIO"}, ValueError, "one I for inputs and one O for outputs"),
    "no layout": (KERNEL, {"layout": None}, ValueError, "layout is None"),
    "other layout": (KERNEL, {"layout": "HWOI"}, ValueError, r"6 features, but the kernel .* has 4 on axis 2, the O"),
    "groups": (KERNEL, {"groups": 0}, ValueError, "groups is 0; expected a positive integer"),
    "groups that do not divide": (
        np.ones((3, 3, 5, 3), np.float32), {"groups": 2}, ValueError, "of size 5, divided into groups"
    ),
    "integers": (KERNEL.astype(int), {}, TypeError, "kernel is of dtype int"),
    "no kernel": (None, {}, TypeError, "kernel is None"),
    "a bias of integers": (KERNEL, {"bias": np.ones(6, np.int32)}, TypeError, "bias is of dtype int32; expected an"),
    "a bias of bools": (KERNEL, {"bias": np.ones(6, bool)}, TypeError, "bias is of dtype bool; expected an array of"),
    "a complex bias": (KERNEL, {"bias": np.ones(6, complex)}, TypeError, "bias is of dtype complex128; expected an"),
    "bias": (KERNEL, {"bias": np.ones(4, np.float32)}, ValueError, r"bias has shape \(4,\); expected \(6,\)"),
    "zeros": (
        np.ones((3, 3, 6, 4), np.float32), {"into": "next", "padding": "SAME"}, ValueError,
        "padding is 'SAME' for a kernel of 3×3 positions; expected 'VALID'",
    ),
    "no padding": (np.ones((3, 3, 6, 4), np.float32), {"into": "next"}, ValueError, "padding is None"),
    "pairs of zeros": (
        np.ones((1, 1, 6, 4), np.float32), {"into": "next", "padding": [(0, 0), (0, 1)]}, ValueError, "padding is"
    ),
    "epsilon": (KERNEL, {"epsilon": -1e-5}, ValueError, "epsilon is -1e-05"),
    "no array": ([[1.0]], {}, TypeError, "kernel has a leaf of type list; expected an array"),
    "a masked array": (np.ma.masked_array(KERNEL), {}, TypeError, "kernel has a masked array of NumPy"),
    "float16": (KERNEL.astype(np.float16) * 6e4, {}, ValueError, "folded kernel does not fit into float16: .* wider"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    kernel, options, kind, message = REFUSED[case]
    params, state = narrow(norm(6))
    options = {"layout": "HWIO", **options}
    with pytest.raises(kind, match=message):
        jbn.fold(params, state, kernel, options.pop("bias", None), **options)


def test_a_state_of_other_features_is_refused():
    with pytest.raises(ValueError, match="scale has shape"):
        jbn.fold({"scale": np.ones(4, np.float32)}, narrow(norm(6))[1], KERNEL, layout="HWIO")
    with pytest.raises(ValueError, match="expected one axis of features"):
        jbn.fold(None, jbn.State(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)), KERNEL, layout="HWIO")


UNUSABLE = [("mean", np.nan), ("mean", np.inf), ("var", np.nan), ("var", np.inf), ("var", -1.0), ("var", 0.0)]


@pytest.mark.parametrize(("name", "value"), UNUSABLE)
def test_statistics_that_make_no_number_are_refused(name, value):
    """With an epsilon, a variance may be 0."""
    params, state = narrow(norm(6))
    state = state._replace(**{name: np.where(np.arange(6) == 2, np.float32(value), getattr(state, name))})
    act = (
        lambda epsilon: jbn.fold(params, state, KERNEL, layout="HWIO", epsilon=epsilon),
        lambda epsilon: jbn.affine(params, state, epsilon=epsilon),
    )
    for call in act:
        with pytest.raises(ValueError, match=rf"state.{name} has 1 of 6 values such as {value:g}; expected finite"):
            call(0.0)
        if value != 0:
            with pytest.raises(ValueError, match=rf"state.{name} has 1 of 6 values"):
                call(1e-5)
        else:
            assert all(np.isfinite(array).all() for array in call(1e-5))


def test_epsilon_may_be_0():
    params, state = narrow(norm(6))
    kernel = narrow(arrays(LAYERS["dense IO"])[1])
    want = oracle.wide(params.scale) / np.sqrt(oracle.wide(state.var))
    a, b = jbn.affine(params, state, epsilon=0.0)
    folded, shift = jbn.fold(params, state, kernel, layout="IO", epsilon=0.0)
    np.testing.assert_array_equal(a, want.astype(np.float32))
    np.testing.assert_array_equal(folded, (kernel * want).astype(np.float32))
    for got in (b, shift):
        np.testing.assert_array_equal(got, (oracle.wide(params.bias) - state.mean * want).astype(np.float32))


@pytest.mark.parametrize("into", ["previous", "next"])
@pytest.mark.parametrize("kernel_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32", None])
def test_each_array_keeps_its_dtype(into, kernel_dtype, bias_dtype):
    """And is rounded once; a new bias is as exact as the normalization's, or as its statistics."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((6, 6)).astype(jnp.dtype(kernel_dtype))
    bias = None if bias_dtype is None else rng.standard_normal(6).astype(jnp.dtype(bias_dtype))
    params, state = narrow(norm(6))
    for beta in (params.bias, params.bias.astype(jnp.bfloat16), None):
        some = params._replace(bias=beta)
        folded, shift = jbn.fold(some, state, kernel, bias, layout="IO", into=into, epsilon=1e-3)
        new = np.dtype(np.float32) if beta is None else beta.dtype
        assert folded.dtype == kernel.dtype
        assert shift.dtype == (new if bias is None else bias.dtype)
        a = oracle.wide(params.scale) / np.sqrt(oracle.wide(state.var) + 1e-3)
        b = (0 if beta is None else oracle.wide(beta)) - oracle.wide(state.mean) * a
        w, given = oracle.wide(kernel), 0 if bias is None else oracle.wide(bias)
        want = (w * a, given * a + b) if into == "previous" else (w * a[:, None], given + b @ w)
        for got, exact in zip((folded, shift), want, strict=True):
            bound = float(jnp.finfo(got.dtype).eps) * np.abs(exact)
            assert (np.abs(oracle.wide(got) - exact) <= bound + 1e-14).all()


def test_it_takes_the_arrays_that_convert_takes():
    torch = pytest.importorskip("torch")
    params, state = narrow(norm(6))
    kernel = narrow(arrays(LAYERS["dense IO"])[1])
    want = jbn.fold(params, state, kernel, params.bias, layout="IO"), jbn.affine(params, state)
    kinds = {
        "jax": jnp.asarray,
        "PyTorch": torch.tensor,
        "a parameter": lambda value: torch.nn.Parameter(torch.tensor(value)),
    }
    for kind, make in kinds.items():
        theirs, stats = jbn.Params(*map(make, params)), {"mean": make(state.mean), "var": make(state.var)}
        got = (
            jbn.fold(theirs, stats, make(kernel), make(params.bias), layout="IO"),
            jbn.affine(theirs, stats),
        )
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert isinstance(g, jax.Array), kind
            np.testing.assert_array_equal(g, w)
    half = torch.tensor(kernel, dtype=torch.bfloat16, requires_grad=True)
    folded, shift = jbn.fold(params, state, half, layout="IO")
    assert (folded.dtype, shift.dtype) == (jnp.bfloat16, np.float32)
    np.testing.assert_array_equal(folded, jbn.fold(params, state, kernel.astype(jnp.bfloat16), layout="IO")[0])


def test_nothing_is_compiled_where_values_are_known():
    params, state = jax.tree.map(jnp.asarray, narrow(norm(7)))
    kernel = jnp.asarray(np.ones((2, 1, 3, 7), np.float32))
    jax.clear_caches()
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        jbn.fold(params, state, kernel, state.mean, layout="HWIO")
        jbn.fold(params, state, np.ones((7, 3), np.float32), layout="IO", into="next")
        jbn.affine(params, state)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in names if "compile" in name]


def test_what_was_placed_stays_there():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params, state = narrow(norm(8))
    kernel = jax.device_put(np.ones((3, 8), np.float32), spread)
    folded, shift = jbn.fold(params, state, kernel, layout="IO")
    assert folded.sharding == spread
    np.testing.assert_array_equal(folded, jbn.fold(params, state, np.ones((3, 8), np.float32), layout="IO")[0])
    there = jax.device_put(kernel, jax.devices()[3])
    assert (jax.jit(lambda x, k, b: x @ k + b[None])(np.ones((2, 3), np.float32), there, shift)).devices() == {
        jax.devices()[3]
    }


@pytest.mark.parametrize("name", ["dense IO", "conv 2-D, strides"])
def test_traced_arrays_give_what_known_ones_do(name, monkeypatch):
    for patched in ("sqrt", "zeros_like", "expand_dims"):  # by an exporter that traces
        monkeypatch.setattr(jnp, patched, None)
    layer = LAYERS[name]
    _, kernel, bias, outputs = arrays(layer)
    params, state = narrow(norm(outputs))
    kernel, bias = narrow((kernel, bias))
    known = jbn.fold(params, state, kernel, bias, layout=layer.layout), jbn.affine(params, state)
    traced = jax.jit(lambda p, s, k, b: (jbn.fold(p, s, k, b, layout=layer.layout), jbn.affine(p, s)))(
        params, state, kernel, bias
    )
    for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(traced), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=oracle.tolerance("float32", scale=float(np.abs(a).max())))
    alone = jax.jit(lambda k: jbn.fold(params, state, k, bias, layout=layer.layout))(kernel)  # the rest is known
    np.testing.assert_allclose(alone[0], known[0][0], rtol=1e-6, atol=1e-6)
