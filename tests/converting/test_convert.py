"""convert: what needs no other library than Flax. Other libraries are met in test_convert_torch, _keras and _peers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
from tests.support import nets

MADE = ["jbn", "linen", "nnx", "torch", "keras"]  # without like
RNG = np.random.default_rng(0)


def vectors(size=3, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal((4, size)) ** 2 + 0.5
    return dict(zip(("scale", "bias", "mean", "var"), values.astype(jnp.dtype(dtype)), strict=True))


def layer(size=3, **options):
    v = vectors(size, **options)
    return jbn.Params(v["scale"], v["bias"]), jbn.State(v["mean"], v["var"])


def torch_norm(prefix="", size=3, **options):
    v = vectors(size, **options)
    own = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return {prefix + own[name]: value for name, value in v.items()}


def torch_model():
    """Return the state_dict of a network like a ResNet, without num_batches_tracked, as old ones are."""
    conv = {"conv1.weight": RNG.standard_normal((4, 3, 7, 7))}
    blocks = {}
    for stage in (1, 2):
        for block in (0, 1):
            at = f"layer{stage}.{block}."
            blocks |= {f"{at}conv1.weight": RNG.standard_normal((4, 4, 3, 3)), **torch_norm(f"{at}bn1.", 4)}
    down = {
        "layer2.0.downsample.0.weight": RNG.standard_normal((4, 4, 1, 1)),
        **torch_norm("layer2.0.downsample.1.", 4),
    }
    fc = {"fc.weight": RNG.standard_normal((5, 4)), "fc.bias": RNG.standard_normal(5)}
    return {**conv, **torch_norm("bn1.", 4), **blocks, **down, **fc}


def wide(state):
    """Return statistics as they come without like: at least float32."""
    return jax.tree.map(lambda a: a if a.dtype.itemsize > 2 else a.astype(np.float32), state)


def equal(got, want):
    """Hold trees against each other, to the bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


@pytest.mark.parametrize("library", MADE)
@given(
    size=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    scale=st.booleans(),
    bias=st.booleans(),
    path=st.sampled_from(["", "norm", "a/b_1/norm"]),
)
def test_a_layer_goes_there_and_back(library, size, dtype, scale, bias, path):
    (s, b), state = layer(size, dtype=dtype)
    params = jbn.Params(s if scale else None, b if bias else None)
    there = jbn.convert((params, state), "jbn", library, names={"": path})
    equal(jbn.convert(there, library, "jbn", names={path: ""}), (params, wide(state)))


@pytest.mark.parametrize("library", MADE)
@given(
    window=st.lists(st.integers(1, 3), max_size=3),
    ends=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_model_goes_there_and_back(library, window, ends, dtype):
    kernel = np.arange(np.prod([*window, *ends])).reshape(*window, *ends).astype(jnp.dtype(dtype))
    variables = {
        "params": {
            "conv": {"kernel": kernel, "bias": kernel[..., 0, :].ravel()[: ends[1]]},
            "norm": {"scale": kernel[-1].ravel()},
        },
        "batch_stats": {"norm": {"mean": kernel.ravel(), "var": kernel.ravel()}},
    }
    there = jbn.convert(variables, "linen", library)
    variables["batch_stats"] = wide(variables["batch_stats"])
    equal(jbn.convert(there, library, "linen"), variables)


def test_what_each_library_has():
    (scale, bias), (mean, var) = tree = layer()
    assert set(jbn.convert(tree, "jbn", "linen")) == {"params", "batch_stats"}
    assert set(jbn.convert(tree, "jbn", "nnx")) == {"scale", "bias", "mean", "var"}
    torch = jbn.convert(tree, "jbn", "torch", names={"": "layers.0"})
    assert {name: value.dtype.name for name, value in torch.items()} == {
        **{f"layers.0.{name}": "float32" for name in ("weight", "bias", "running_mean", "running_var")},
        "layers.0.num_batches_tracked": "int64",
    }
    keras = jbn.convert(tree, "jbn", "keras")
    for name, value in {"gamma": scale, "beta": bias, "moving_mean": mean, "moving_variance": var}.items():
        assert type(keras[name]) is np.ndarray
        np.testing.assert_array_equal(keras[name], value)
    params, state = jbn.convert(torch, "torch", "jbn")
    assert type(params["layers"]["0"]) is jbn.Params
    assert type(state["layers"]["0"]) is jbn.State
    assert isinstance(state["layers"]["0"].mean, jax.Array)


def test_arrays_of_numpy_are_contiguous():
    """Writers of files read their memory as it lies."""
    variables = {"params": {"conv": {"kernel": np.ones((2, 3, 4, 5), np.float32)}}}
    like = {"conv.weight": np.ones((5, 4, 2, 3), np.float32)}
    for shapes in (None, like):
        assert jbn.convert(variables, "linen", "torch", like=shapes)["conv.weight"].flags.c_contiguous


OTHERS = {
    "torch": {"n.mean": (1, 3, 1, 1), "n.std": (1, 3, 1, 1), "n.var": (2,), "n.scale": (2, 2), "n.kernel": (2, 3)},
    "keras": {"n/mean": (3,), "n/variance": (3,), "n/scale": (2, 2), "n/var": (2,), "n/w": (2, 3)},
}


@pytest.mark.parametrize("library", OTHERS)
@pytest.mark.parametrize("target", ["linen", "nnx", "torch", "keras"])
def test_names_that_mean_another_thing_elsewhere(library, target):
    """With like they go where it has them, as they are; without it those that would be taken for statistics do not."""
    tree = {name: RNG.standard_normal(shape).astype("float32") for name, shape in OTHERS[library].items()}
    names = {name[2:]: value for name, value in tree.items()}
    stats = {name: value for name, value in names.items() if name in ("mean", "var")}
    params = {name: value for name, value in names.items() if name not in stats}
    separator = "." if target == "torch" else "/"
    likes = {
        "linen": [{"params": {"n": params}, "batch_stats": {"n": stats}}, {"params": {"n": names}}],
        "nnx": [{"n": names}],
    }.get(target, [{f"n{separator}{name}": value for name, value in names.items()}])
    for like in likes:
        got = jbn.convert(tree, library, target, like=like)
        jax.tree.map(np.testing.assert_array_equal, got, like)
    if target in OTHERS:
        jax.tree.map(np.testing.assert_array_equal, jbn.convert(tree, library, target), likes[0])
        return
    # Where parameters are apart, what is only named like a statistic elsewhere is none of them either.
    doubtful = {name for name in names if name in stats or (target == "linen" and name in ("std", "variance"))}
    said = rf"^n of tree has {', '.join(sorted(doubtful))}, which may be no parameter.* expected like.* by na"
    with pytest.raises(ValueError, match=said):
        jbn.convert(tree, library, target)
    free = {name: value for name, value in names.items() if name not in doubtful}
    got = jbn.convert({name: value for name, value in tree.items() if name[2:] in free}, library, target)
    jax.tree.map(np.testing.assert_array_equal, got["params"]["n"] if target == "linen" else got["n"], free)


@pytest.mark.parametrize("source", ["linen", "jbn"])
def test_a_tree_says_which_of_two_is_trained(source):
    """Parameters called mean and var are none of the statistics, and a count is no parameter."""
    norm = vectors()
    params, stats = (
        {"n": {"mean": norm["scale"], "var": norm["bias"]}},
        {"n": {"mean": norm["mean"], "var": norm["var"]}},
    )
    tree = {"params": params, "batch_stats": stats} if source == "linen" else (params, stats)
    equal(jbn.convert(tree, source, source, like=tree), jax.tree.map(jnp.asarray, tree))
    with pytest.raises(ValueError, match=r"^n of tree has mean, var, which may be no parameter"):
        jbn.convert(tree, source, source)
    one = {"n": {"count": np.ones(3, np.float32)}}
    tree = {"params": params, "batch_stats": one} if source == "linen" else ({}, one)
    with pytest.raises(ValueError, match=r"^n of tree has count"):
        jbn.convert(tree, source, "linen", names=None)


@pytest.mark.parametrize("source", ["torch", "keras"])
@pytest.mark.parametrize("target", ["jbn", "linen"])
@pytest.mark.parametrize(
    ("beside", "array"), [(True, np.ones(3, np.float32)), (False, np.ones((), np.int64)), (False, np.array([True]))]
)
def test_what_may_be_no_parameter_is_refused_without_like(source, target, beside, array):
    """What lies beside running statistics, as Keras' renormalization has it; integers and flags anywhere."""
    separator = "." if source == "torch" else "/"
    tree = jbn.convert(layer(), "jbn", source, names={"": "bn"})
    path = "bn" if beside else "gate"
    name = f"{path}{separator}renorm_mean"
    with pytest.raises(ValueError, match=rf"^{path} of tree has renorm_mean, .* .* leaves the layer out"):
        jbn.convert(tree | {name: array}, source, target)
    if not beside:
        equal(jbn.convert(tree | {name: array}, source, target, names={path: None}), jbn.convert(tree, source, target))
    assert name.replace(".", "/") in jbn.convert(tree | {name: array}, source, "keras")
    like = jbn.convert(tree, source, "linen")
    for collection in like.values():
        collection[path] = {**collection.get(path, {}), "renorm_mean": array} if beside else {"renorm_mean": array}
        got = jbn.convert(tree | {name: array}, source, "linen", like=like)
        np.testing.assert_array_equal(
            next(part for part in got.values() if "renorm_mean" in part.get(path, {}))[path]["renorm_mean"], array
        )
        collection[path].pop("renorm_mean")
        collection.pop(path) if not beside else None


def test_items_of_lists_are_numbers_in_nnx():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    kernel = RNG.standard_normal((4, 3)).astype("float32")
    state_dict = {"0.weight": kernel, "0.bias": kernel[:, 0], **torch_norm("1.", 4)}
    nnx.update(model, jbn.convert(state_dict, "torch", "nnx", names={"": "layers"}))
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel.T)
    np.testing.assert_array_equal(model.layers[1].var[...], state_dict["1.running_var"])


@pytest.mark.parametrize("spelled", ["layer1.0.bn1", "layer1/0/bn1"])
def test_names_of_a_residual_network(spelled):
    names = {
        spelled: "first",
        "layer*.*.downsample.0": "stage*/block*/proj_conv",
        "layer*.*.downsample.1": "stage*/block*/proj_norm",
        "layer*.*.bn*": "stage*/block*/norm*",
        "layer*.*": "stage*/block*",
        "fc": None,
    }
    variables = jbn.convert(torch_model(), "torch", "linen", names=names)
    block = {"conv1", "norm1"}
    assert set(variables["params"]) == {"conv1", "bn1", "first", "stage1", "stage2"}
    assert {name: set(part) for name, part in variables["params"]["stage1"].items()} == {
        "block0": {"conv1"},
        "block1": block,
    }
    assert set(variables["params"]["stage2"]["block0"]) == block | {"proj_conv", "proj_norm"}
    assert variables["params"]["stage2"]["block0"]["proj_conv"]["kernel"].shape == (1, 1, 4, 4)
    assert set(variables["batch_stats"]) == {"bn1", "first", "stage1", "stage2"}


def test_the_first_name_that_matches_counts():
    tree = {**torch_norm("a.x."), **torch_norm("a.y."), **torch_norm("b.")}
    names = {"a.x": "special", "a": "all", "": "rest"}
    assert set(jbn.convert(tree, "torch", "keras", names=names)) == {
        f"{path}/{name}"
        for path in ("special", "all/y", "rest/b")
        for name in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    for order, late, before in (
        (["a", "a.x", ""], "a.x", "'a'"),
        (["", "a"], "a", "''"),
        (["a.x", "*.y", "b", "*"], r"\*", r"'a.x', '\*.y', 'b'"),
    ):
        message = (
            rf"names: '{late}' comes after {before}, which decided about every .* expected the most special one first"
        )
        with pytest.raises(ValueError, match=message):
            jbn.convert(tree, "torch", "keras", names={old: names.get(old, old) for old in order})


def test_names_by_a_function():
    seen = []

    def name(path):
        seen.append(path)
        return None if path == "fc" else path.replace("layer1.0", "block").replace(".", "_")

    params = jbn.convert(torch_model(), "torch", "linen", names=name)["params"]
    assert "layer2.0.downsample.1" in seen
    assert {"block_bn1", "layer2_0_downsample_1", "conv1"} < set(params)
    assert "fc" not in params


def test_the_root_has_the_empty_path():
    wrapped = {f"module.{name}": value for name, value in torch_norm("bn.").items()} | {"n_averaged": np.zeros(())}
    assert set(jbn.convert(wrapped, "torch", "torch", names={"module": "", "": None})) == {
        *torch_norm("bn."),
        "bn.num_batches_tracked",
    }


def test_linen_and_nnx():
    """A state, its shapes and nothing are filled alike; y has the same bits."""
    net, states = nets.Net(), (nnx.Param, nnx.BatchStat)
    variables, (x, _) = nets.linen_variables(net), nets.batch(0)
    want = jax.jit(net.apply, static_argnums=2)(variables, x, False)
    model = nnx.eval_shape(nets.NNXNet)  # and no time for initial values
    model.eval()
    graph, shapes = nnx.split(model)
    state = jbn.convert(variables, "linen", "nnx", like=shapes)
    assert isinstance(state, nnx.State)
    np.testing.assert_array_equal(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x), want)
    equal(jbn.convert(state, "nnx", "linen"), variables)
    equal(jbn.convert(variables, "linen", "nnx", like=state), state)
    nnx.update(model, jbn.convert(variables, "linen", "nnx"))
    equal(nnx.state(model, states), state)


def test_like_gives_structure_dtypes_and_sharding():
    there = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    like = {
        "batch_stats": {"bn": {"mean": jnp.zeros(3, jnp.float16), "var": jax.ShapeDtypeStruct((3,), jnp.float32)}},
        "params": {"bn": {"scale": jax.device_put(jnp.zeros(3), there), "bias": np.zeros(3, jnp.bfloat16)}},
    }
    tree = torch_norm("bn.")
    got = jbn.convert(tree, "torch", "linen", like=like)
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, like)
    assert got["params"]["bn"]["scale"].sharding == there
    np.testing.assert_array_equal(got["params"]["bn"]["scale"], tree["bn.weight"])
    frozen = jbn.convert(tree, "torch", "linen", like=nn.FrozenDict(like))
    assert isinstance(frozen, nn.FrozenDict)


def test_the_number_of_batches_is_that_of_like():
    like = {**torch_norm("bn."), "bn.num_batches_tracked": np.array(7)}
    tree = jbn.convert(torch_norm("bn.", seed=1), "torch", "linen")
    assert jbn.convert(tree, "linen", "torch", like=like)["bn.num_batches_tracked"] == 7
    like["bn.num_batches_tracked"] = jax.ShapeDtypeStruct((), jnp.int32)
    got = jbn.convert(tree, "linen", "torch", like=like)["bn.num_batches_tracked"]
    assert (got, got.dtype) == (0, np.int32)
    assert "bn.num_batches_tracked" not in jbn.convert(tree, "linen", "torch", like=torch_norm("bn."))


def test_nothing_is_shared_with_the_source():
    room = np.zeros(64, np.float32)
    start = -room.ctypes.data % 64 // 4
    mean = room[start : start + 32]  # where jax would take the memory as it is
    tree = {**torch_norm("bn.", 32), "bn.running_mean": mean}
    got = [jbn.convert(tree, "torch", library) for library in ("torch", "linen")]
    before = jax.tree.map(np.array, got)
    for value in tree.values():
        value[:] = np.nan
    for g, b in zip(jax.tree.leaves(got), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(g, b)
    got[0]["bn.weight"][:] = 5  # and can be written to


def test_the_state_of_a_training_run():
    """Its variables are converted, from it and into it; the step and the optimizer stay as they are."""
    optax, train_state = pytest.importorskip("optax"), pytest.importorskip("flax.training.train_state")

    class TrainState(train_state.TrainState):
        batch_stats: dict

    variables = nets.linen_variables(nets.Net())
    kept = {"apply_fn": nets.Net().apply, "tx": optax.adam(1e-3), "params": variables["params"]}
    state = TrainState.create(**kept, batch_stats=variables["batch_stats"]).replace(step=7)
    model = jbn.convert(state, "linen", "nnx")
    assert all(
        (a == b).all()
        for a, b in zip(*map(jax.tree.leaves, (model, jbn.convert(variables, "linen", "nnx"))), strict=True)
    )
    twice = jbn.convert(jax.tree.map(lambda a: 2 * a, model), "nnx", "linen", like=state)
    assert (twice.step, twice.tx) == (7, state.tx)
    assert not any(leaf.any() for leaf in jax.tree.leaves(twice.opt_state))
    for name in ("params", "batch_stats"):
        pairs = zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, twice)), strict=True)
        assert all((2 * a == b).all() for a, b in pairs)
    without = train_state.TrainState.create(**kept)
    assert set(jbn.convert(without, "linen", "linen")) == {"params"}


def test_what_is_left_out_is_not_read():
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(1)))
    state = nnx.state(model)
    tree = jbn.convert(state, "nnx", "torch", names={"layers/1/rngs": None, "layers": ""})
    assert "0.running_var" in tree


@pytest.mark.parametrize("filled", [False, True])
def test_nothing_is_compiled(filled):
    """A model has as many shapes as layers, and each would be a program of its own."""
    tree = {"a.weight": np.ones((3, 4, 1, 2), np.float32), **torch_norm("b.", 11)}
    like = jbn.convert(tree, "torch", "linen") if filled else None
    jax.clear_caches()
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        jbn.convert(tree, "torch", "linen", like=like)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in names if "compile" in name]


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "float16", "bfloat16", "float8_e4m3fn", "float64"])
@pytest.mark.parametrize("filled", [False, True])
def test_statistics_of_any_real_dtype_are_float32(dtype, filled):
    ones = np.ones(3, jnp.dtype(dtype))
    like = {"batch_stats": {name: jax.ShapeDtypeStruct((3,), np.float32) for name in ("mean", "var")}}
    got = jbn.convert({"running_mean": ones, "running_var": ones}, "torch", "linen", like=like if filled else None)
    assert {leaf.dtype.name for leaf in got["batch_stats"].values()} == {"float32"}


def test_the_count_is_not_rounded_to_the_dtype_of_the_source():
    like = {"batch_stats": {name: jax.ShapeDtypeStruct((3,), np.float32) for name in ("mean", "var")}}
    ones = np.ones(3, jnp.bfloat16)
    got = jbn.convert({"running_mean": ones, "running_var": ones}, "torch", "linen", like=like, count=1000)
    np.testing.assert_allclose(got["batch_stats"]["var"], 0.999, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["0", "1", "10"], [0, 1, 10]),
        (["0", "00"], ["0", "00"]),
        (["0", "norm"], ["0", "norm"]),
        (["1", "\N{ARABIC-INDIC DIGIT ONE}"], ["1", "\N{ARABIC-INDIC DIGIT ONE}"]),
    ],
)
def test_numbers_alone_are_items_of_a_list(names, keys):
    got = jbn.convert({f"a.{name}.weight": np.full(3, i) for i, name in enumerate(names)}, "torch", "nnx")
    assert {key: int(leaf["scale"][0]) for key, leaf in got["a"].items()} == {key: i for i, key in enumerate(keys)}
