"""convert and convert_options refuse what they cannot map, and say which path, why, and what would do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

F = np.ones(3, np.float32)
BN = {"weight": F, "bias": F, "running_mean": F, "running_var": F}
PAIR = jbn.Params(F, F), jbn.State(F, F)
UP = {"up.weight": np.ones((4, 3, 2, 2), np.float32)}


def under(path, tree=BN):
    return {f"{path}.{name}": value for name, value in tree.items()}


def linen(**layers):
    """Return variables of norms of so many features."""
    ones = {name: jnp.ones(size) for name, size in layers.items()}
    return {
        "params": {name: {"scale": one, "bias": one} for name, one in ones.items()},
        "batch_stats": {name: {"mean": one, "var": one} for name, one in ones.items()},
    }


def dense(*shape):
    return {"params": {"fc": {"kernel": jnp.ones(shape)}}}


REFUSED = {
    "source": (BN, "pytorch", "jbn", {}, r"source is 'pytorch'; expected one of 'jbn', 'linen'"),
    "a library": (BN, ["torch"], "jbn", {}, r"source is \['torch'\]; expected one of"),
    "target": (BN, "torch", "flax", {}, r"target is 'flax'; expected one of"),
    "nothing": ({}, "torch", "jbn", {}, r"tree holds no arrays"),
    "nothing to fill": (BN, "torch", "linen", {"like": {}}, r"like holds no arrays"),
    "haiku without like": (BN, "torch", "haiku", {}, r"like is None; expected a tree of haiku"),
    "equinox without like": (BN, "torch", "equinox", {}, r"like is None; expected a tree of equinox"),
    "two arrays of a name": (
        ({"m": {"w": F}}, {"m": {"w": F}}),
        "haiku",
        "linen",
        {},
        r"^tree has two arrays 'm/w', such as one among params and one in state; expected one.* rename one",
    ),
    "two arrays of a name to fill": (
        BN,
        "torch",
        "haiku",
        {"like": ({"m": {"w": F}}, {"m": {"w": F}})},
        r"^like has two arrays 'm/w'",
    ),
    "other collections": ({"cache": {"a": F}}, "linen", "jbn", {}, r"tree holds cache; .*'batch_stats'"),
    "one statistic": ({"a.running_var": F}, "torch", "jbn", {}, r"^a of tree has one running statistic"),
    "one statistic, alone": ({"running_mean": F}, "torch", "jbn", {}, r"^the layer of tree has one running"),
    "two to one": (
        {**under("a"), **under("b.c")},
        "torch",
        "linen",
        {"names": {"b.c": "a"}},
        r"names: a and b.c both become a; expected a path of its own",
    ),
    "a layer in a layer": (
        {**under("a"), **under("b")},
        "torch",
        "jbn",
        {"names": {"a": ""}},
        r"names: there are layers under the root, which is a layer",
    ),
    "a layer in a layer below": (
        {**under("b.c"), **under("b")},
        "torch",
        "jbn",
        {},
        r"names: there are layers under b, which is a layer",
    ),
    "name without a match": (
        under("layer1.bn1"),
        "torch",
        "jbn",
        {"names": {"layer1.bn": "a"}},
        r"names: 'layer1.bn' matches none of the 1 layer: layer1.bn1",
    ),
    "a star is in a key": (under("a.b.bn"), "torch", "jbn", {"names": {"*.bn": "*"}}, r"'\*.bn' matches none"),
    "part of a key": (under("layer11"), "torch", "jbn", {"names": {"layer1": "a"}}, r"'layer1' matches none"),
    "stars": (under("a"), "torch", "jbn", {"names": {"*": "a"}}, r"'\*' becomes 'a'; expected as many stars"),
    "kind": (UP, "torch", "linen", {"kinds": {"up": "conv"}}, r"kinds: 'up' has 'conv'; expected one of 'transposed'"),
    "kind without a match": (
        UP,
        "torch",
        "linen",
        {"kinds": {"down": "transposed"}},
        r"kinds, .*'down' matches none of the 1 layer of tree \('up'\)",
    ),
    "groups": (UP, "torch", "linen", {"kinds": {"up": "transposed"}}, r"^up of tree is a transposed .*expected like"),
    "multiplier": (
        {"params": {"dw": {"kernel": np.ones((2, 2, 1, 4))}}},
        "linen",
        "keras",
        {"kinds": {"dw": "depthwise"}},
        r"^dw of tree needs like",
    ),
    "flattened": (UP, "torch", "linen", {"flattened": {"up": 5}}, r"flattened: 'up' has 5; expected a shape"),
    "flattened elsewhere": (UP, "torch", "linen", {"flattened": {"fc": (1, 2)}}, r"flattened, .*'fc' matches none"),
    "flattened, other size": (
        dense(8, 5),
        "linen",
        "torch",
        {"flattened": {"fc": (3, 2, 2)}},
        r"^fc of tree has kernel \(8, 5\), but flattened is \(3, 2, 2\), 12 values",
    ),
    "flattened convolution": (
        UP,
        "torch",
        "linen",
        {"flattened": {"up": (2, 2, 2)}},
        r"^up of tree has kernel \(2, 2, 3, 4\), but flattened is",
    ),
    "flattened norm": (
        BN,
        "torch",
        "jbn",
        {"flattened": {"*": (2, 2)}},
        r"has scale \(3,\), bias \(3,\), mean \(3,\), var \(3,\), but flattened is \(2, 2\), 4 values",
    ),
    "flattened square": (
        dense(8, 8),
        "linen",
        "torch",
        {"flattened": {"fc": (2, 2, 2)}},
        r"^fc of tree has 8 inputs and 8 outputs, and flattened does not tell",
    ),
    "count": (BN, "torch", "jbn", {"count": 1}, r"count: '\*' has 1; expected 2 or more"),
    "no count": (BN, "torch", "jbn", {"count": {"": 2.5}}, r"count: '' has 2.5; expected"),
    "names that become one": (
        {"a": {"kernel": np.ones((2, 3)), "scale": F}},
        "nnx",
        "torch",
        {},
        r"^a of tree has kernel and scale, which all become weight; expected one of them",
    ),
    "names that mean one": (
        {"a/bias": F, "a/beta": F},
        "keras",
        "jbn",
        {},
        r"^a of tree has beta and bias, which all become bias",
    ),
    "count elsewhere": (BN, "torch", "jbn", {"count": {"bn": 9}}, r"count, .*'bn' matches none of the 1 layer"),
    "left over": (
        {**under("bn"), "fc.weight": np.ones((2, 3))},
        "torch",
        "linen",
        {"like": linen(bn=3)},
        r"Of 5 arrays of tree 1 are left over: 'fc/kernel' from 'fc'. Of 4 in like 0 are lacking: none",
    ),
    "lacking": (
        under("bn"),
        "torch",
        "linen",
        {"like": linen(bn=3, norm=3)},
        r"Of 4 arrays of tree 0 are left over: none. Of 8 in like 4 are lacking: 'norm/mean', ",
    ),
    "misnamed": (
        under("bn"),
        "torch",
        "linen",
        {"like": linen(norm=3)},
        r"4 are left over: 'bn/bias' from 'bn' \(near 'norm/bias'\), .*'norm/scale'",
    ),
    "no statistics": (
        {"bn.weight": F, "bn.bias": F},
        "torch",
        "linen",
        {"like": linen(bn=3)},
        r"Of 4 in like 2 are lacking: 'bn/mean', 'bn/var'",
    ),
    "no scale": (
        under("bn"),
        "torch",
        "linen",
        {"like": {"batch_stats": linen(bn=3)["batch_stats"]}},
        r"2 are left over: 'bn/bias' from 'bn', 'bn/scale' from 'bn'",
    ),
    "an embedding": (
        {"e.weight": np.ones((7, 3))},
        "torch",
        "linen",
        {"like": {"params": {"e": {"embedding": np.ones((7, 3))}}}},
        r"'e/kernel' from 'e' \(near 'e/embedding'\).*embeddings named in kinds",
    ),
    "shape": (
        under("bn"),
        "torch",
        "linen",
        {"like": linen(bn=4)},
        r"tree and like differ in 4 arrays: 'bn/bias' is float32 \(3,\), in like float32 \(4,\)",
    ),
    "transposed and not named": (
        UP,
        "torch",
        "linen",
        {"like": {"params": {"up": {"kernel": np.ones((2, 2, 4, 3))}}}},
        r"'up/kernel' is float32 \(2, 2, 3, 4\), in like .*transposed and depthwise convolutions are to be named",
    ),
    "grouped where there are none": (
        {**UP, "up.bias": np.ones(6)},
        "torch",
        "linen",
        {
            "like": {"params": {"up": {"kernel": np.ones((2, 2, 4, 6)), "bias": np.ones(6)}}},
            "kinds": {"up": "transposed"},
        },
        r"'up/kernel' is float32 \(2, 2, 4, 3\), in like float64 \(2, 2, 4, 6\)",
    ),
    "integers": (
        {"a.b": np.ones(3, int)},
        "torch",
        "linen",
        {"like": {"params": {"a": {"b": F}}}},
        r"'a/b' is int64 \(3,\), in like float32",
    ),
    "overflow": (
        under("bn", {**BN, "running_var": 1e5 * F}),
        "torch",
        "linen",
        {"like": jax.tree.map(lambda a: a.astype(jnp.float16), linen(bn=3))},
        r"'bn/var' does not fit into float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    tree, source, target, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        jbn.convert(tree, source, target, **options)


OF_OTHER_KINDS = {
    "a module": (object(), "torch", "jbn", {}, r"tree is of type object; expected a state_dict"),
    "nested": ({"a": BN}, "torch", "jbn", {}, r"tree holds a tree under 'a'; expected a state_dict"),
    "a checkpoint around it": (
        {"callbacks": {"early": {"best": 3}}, "epoch": 3, "state_dict": BN},
        "torch",
        "jbn",
        {},
        r"tree holds a tree under 'state_dict'; expected a state_dict, .*: pass its \['state_dict'\]",
    ),
    "shapes": (
        {"a.weight": jax.ShapeDtypeStruct((3,), "float32")},
        "torch",
        "jbn",
        {},
        r"^a of tree has a ShapeDtypeStruct without values; expected an array",
    ),
    "keras": ([F], "keras", "jbn", {}, r"tree is of type list; expected \{v.path: "),
    "nnx": (F, "nnx", "jbn", {}, r"tree is of type ndarray; expected nnx.state"),
    "params alone": (PAIR[0], "jbn", "torch", {}, r"tree is of type Params; expected a pair, \(params, state\)"),
    "no names": ((F, F), "jbn", "torch", {}, r"tree has arrays without names; expected \(params, state\)"),
    "haiku": ({"bn": {}}, "haiku", "jbn", {}, r"tree is of type dict; expected a pair, \(params, state\) of hk"),
    "haiku, deeper": (PAIR, "haiku", "jbn", {}, r"tree is no tree of Haiku"),
    "equinox": (PAIR[0], "equinox", "jbn", {}, r"expected a pair, \(model, state\) of eqx"),
    "like": (BN, "torch", "jbn", {"like": {}}, r"like is of type dict; expected a pair"),
    "no array": ({"a.weight": "x"}, "torch", "jbn", {}, r"^a of tree has a leaf of type str; expected an array"),
    "a key": ({"a": {"key": jax.random.key(0)}}, "nnx", "torch", {}, r"^a of tree is a key of random numbers"),
    "kinds": (BN, "torch", "jbn", {"kinds": "transposed"}, r"kinds is 'transposed'; expected a mapping of patterns"),
    "names": (BN, "torch", "jbn", {"names": "bn"}, r"names is of type str; expected a mapping or a function"),
    "a record": (
        {"a.x": np.rec.array([(1, 2.0)])},
        "torch",
        "linen",
        {},
        r"^a of tree has an array of .*; expected numbers",
    ),
    "a number in like": (
        BN,
        "torch",
        "linen",
        {"like": {"params": {"scale": 1.0}}},
        r"like has a float at 'scale'; expected arrays, or",
    ),
    "a key of names": (BN, "torch", "jbn", {"names": {3: "a"}}, r"names has the key 3; expected strings"),
    "a key of kinds": (BN, "torch", "jbn", {"kinds": {3: "depthwise"}}, r"kinds has the key 3; expected strings"),
    "complex statistics": (
        {"a.running_mean": F.astype(complex), "a.running_var": F},
        "torch",
        "linen",
        {},
        r"^a of tree has a running mean of complex128; expected real",
    ),
    "a name": (BN, "torch", "jbn", {"names": {"": 3}}, r"names: '' becomes 3; expected a string or None"),
    "a name of a function": (BN, "torch", "jbn", {"names": lambda path: 3}, r"names: '' becomes 3; expected"),
}


@pytest.mark.parametrize("case", OF_OTHER_KINDS)
def test_other_kinds_are_refused(case):
    tree, source, target, options, message = OF_OTHER_KINDS[case]
    with pytest.raises(TypeError, match=message):
        jbn.convert(tree, source, target, **options)


SPELLED = {
    "torch": lambda mean, var: {"bn.running_mean": mean, "bn.running_var": var},
    "keras": lambda mean, var: {"bn/moving_mean": mean, "bn/moving_variance": var},
    "linen": lambda mean, var: {"params": {}, "batch_stats": {"bn": {"mean": mean, "var": var}}},
    "nnx": lambda mean, var: {"bn": {"mean": mean, "var": var}},
    "jbn": lambda mean, var: ({}, {"bn": jbn.State(mean, var)}),
    "haiku": lambda mean, var: (
        {},
        {
            f"bn/~/{name}_ema": {"average": value, "hidden": value, "counter": np.zeros((), np.int32)}
            for name, value in (("mean", mean), ("var", var))
        },
    ),
}


@pytest.mark.parametrize("source", SPELLED)
@pytest.mark.parametrize("target", ["torch", "linen"])
@pytest.mark.parametrize(
    ("name", "value"), [("mean", np.nan), ("mean", np.inf), ("var", np.nan), ("var", np.inf), ("var", -1.0)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_that_no_batch_has_are_refused(source, target, name, value, dtype):
    good, bad = np.ones(3, jnp.dtype(dtype)), np.array([1, value, 1], jnp.dtype(dtype))
    tree = SPELLED[source](*(bad if name == one else good for one in ("mean", "var")))
    like = jbn.convert(SPELLED[source](good, good), source, target)
    for shapes in (None, like):
        message = rf"^bn of tree has 1 of 3 values of its running {name} such as {value:g}; .*recalibr"
        with pytest.raises(ValueError, match=message):
            jbn.convert(tree, source, target, like=shapes)
    jbn.convert(SPELLED[source](-good, 0 * good), source, target)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("running_var", np.full(3, 1e300), "'a/var' does not fit into float32, which jax has for it"),
        ("weight", np.full(3, 1e300), "'a/scale' does not fit into float32, which jax has for it"),
        ("index", np.array([2**40]), "'a/index' does not fit into int32, which jax has for it"),
    ],
)
def test_what_jax_would_make_another_number_of_is_refused(array, value, message):
    with pytest.raises(ValueError, match=message):
        jbn.convert({f"a.{name}": leaf for name, leaf in {**BN, array: value}.items()}, "torch", "nnx")


def test_a_variance_that_the_count_makes_infinite_is_refused():
    variables = linen(a=3)
    variables["batch_stats"]["a"]["var"] = np.full(3, 3e38, np.float32)
    with pytest.raises(
        ValueError,
        match=r"^a of tree has 3 of 3 values of its running var such as inf; expected finite ones, 0 or more",
    ):
        jbn.convert(variables, "linen", "torch", count=2)
    jbn.convert(variables, "linen", "torch")


@pytest.mark.parametrize(("index", "value"), [(0, np.nan), (1, np.inf), (1, -1.0)])
def test_averages_of_equinox_are_refused_alike(index, value):
    eqx = pytest.importorskip("equinox")
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    averages = [jnp.ones(3), jnp.ones(3)]
    averages[index] = averages[index].at[0].set(value)
    state = state.set(model.batch_state_index, tuple(averages)).set(model.batch_counter, jnp.array(5))
    with pytest.raises(ValueError, match=r"^the layer of tree has 1 of 3 values of its running "):
        jbn.convert((model, state), "equinox", "linen")


@pytest.mark.filterwarnings("default::UserWarning")  # PyTorch deprecates the one that it makes
def test_a_tensor_that_numpy_cannot_hold_is_named():
    torch = pytest.importorskip("torch")
    for tensor, message in (
        (torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), r"torch.qint8, .*tensor.dequantize"),
        (torch.ones(3).to_sparse(), r"layout torch.sparse_coo; expected a dense one, such as tensor.to_dense"),
    ):
        with pytest.raises(TypeError, match=rf"^a of tree has a.* of {message}"):
            jbn.convert({"a.x": tensor}, "torch", "linen")
