"""load_arrays and Keras: its files give the names and the values of the model's weights, or say what they lack."""

import sys
import zipfile

import jax
import numpy as np
import pytest

import jbn

h5py = pytest.importorskip("h5py")
# What a library calls although it is deprecated is not for this library to mend.
pytestmark = [
    pytest.mark.usefixtures("foreign"),
    *(pytest.mark.filterwarnings(f"default::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
FILES = ["m.keras", "m.weights.h5", "m.h5"]


@pytest.fixture(scope="module")
def model(keras):
    """Return a model with models in it, of layers that have names of their own and others, trained once."""
    layers = keras.layers
    base = keras.Input((4, 4, 4))
    base = keras.Model(base, layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", name="in")(base)))
    inner = [keras.Input((4, 4, 4)), layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(name="bn")]
    x = begin = keras.Input((4, 4, 3))
    x = layers.BatchNormalization(name="bn")(
        layers.Conv2D(4, 3, padding="same", name="stem")(layers.Normalization()(x))
    )
    x = layers.DepthwiseConv2D(3, padding="same")(layers.Conv2DTranspose(4, 3, padding="same")(x))
    x = layers.GlobalAveragePooling2D()(keras.Sequential(inner, name="block")(layers.Dropout(0.5)(base(x))))
    model = keras.Model(begin, layers.Dense(3)(layers.Dense(5)(layers.BatchNormalization()(x))), name="whole")
    model.compile("adam", "mse")
    with jax.numpy_rank_promotion("allow"):
        model.fit(np.ones((4, 4, 4, 3)), np.ones((4, 3)), verbose=0)
    draw(model)
    return model


def draw(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.random(variable.shape) + 0.5)


def save(model, file):
    (model.save_weights if file.name.endswith(".weights.h5") else model.save)(file)
    return jbn.load_arrays(file)


def check_same(found, want):
    assert set(found) == set(want)
    for name, array in found.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_what_the_model_has(model, tmp_path, name):
    """Neither the optimizer nor the seed of the dropout is a weight."""
    found = save(model, tmp_path / name)
    check_same(found, {v.path: v.numpy() for v in model.weights})
    assert name != "m.keras" or list(found) == [v.path for v in model.weights]
    kinds = {"depthwise_conv2d": "depthwise", "*_transpose": "transposed"}
    check_same(jbn.convert(found, "keras", "keras", like=model, kinds=kinds), found)


def test_layers_in_a_model_of_its_own_class(keras, tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.first, self.bn = keras.layers.Dense(4, name="a"), keras.layers.BatchNormalization(name="b")
            self.blocks = [keras.layers.Dense(4), [keras.layers.Dense(4, use_bias=False), self.first]]

        def call(self, x):
            return self.blocks[1][0](self.blocks[0](self.bn(self.first(x))))

    model = Net()
    model(np.ones((2, 3)))
    draw(model)
    want = {v.path.removeprefix("net/"): v.numpy() for v in model.weights}
    for name in ("m.weights.h5", "m.keras"):
        check_same(save(model, tmp_path / name), want)


def test_layers_of_one_name_get_those_of_the_file(keras, tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.blocks = [[keras.layers.Dense(2, name="fc")], [keras.layers.Dense(2, name="fc")]]

        def call(self, x):
            return self.blocks[1][0](self.blocks[0][0](x))

    model = Net()
    model(np.ones((2, 3)))
    found = save(model, tmp_path / "m.weights.h5")
    assert set(found) == {f"blocks/container{end}/dense/{name}" for end in ("", "_1") for name in ("kernel", "bias")}


@pytest.mark.parametrize("lacks", ["scale", "center"])
def test_a_norm_without_scale_or_bias_needs_its_configuration(keras, tmp_path, lacks):
    layers = [keras.Input((3,)), keras.layers.BatchNormalization(name="bn", **{lacks: False})]
    model = keras.Sequential(layers, name="net")
    draw(model)
    vector = "beta" if lacks == "scale" else "gamma"
    found = save(model, tmp_path / "m.keras")
    check_same(found, {v.path.removeprefix("net/"): v.numpy() for v in model.weights})
    assert list(found) == [f"bn/{vector}", "bn/moving_mean", "bn/moving_variance"]
    assert list(save(model, tmp_path / "m.weights.h5")) == ["bn/vars/0", "bn/vars/1", "bn/vars/2"]


def test_norms_without_scale_and_bias_and_with_renorm(keras, tmp_path):
    one, two = {"scale": False, "center": False, "name": "bare"}, {"renorm": True, "name": "renorm"}
    layers = [keras.Input((3,)), keras.layers.BatchNormalization(**one), keras.layers.BatchNormalization(**two)]
    model = keras.Sequential(layers, name="net")
    draw(model)
    want = {v.path.removeprefix("net/"): v.numpy() for v in model.weights}
    for name in FILES[:2]:
        check_same(save(model, tmp_path / name), want)


def test_older_files_of_keras_3_have_no_names(model, tmp_path):
    """A configuration has them; without one layers are called as in the file."""
    save(model, tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
        config = archive.read("config.json")
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        file.visititems(lambda name, item: item.attrs.pop("name", None) and None)
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        archive.writestr("config.json", config)
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    want = {v.path: v.numpy() for v in model.weights}
    check_same(jbn.load_arrays(tmp_path / "old.keras"), want)
    found = jbn.load_arrays(tmp_path / "model.weights.h5")
    assert {tuple(name.split("/")[:-1]) for name in found} >= {("conv2d",), ("sequential", "conv2d"), ("dense_1",)}
    np.testing.assert_array_equal(found["conv2d/kernel"], want["stem/kernel"])
    assert len(found) == len(want)


def test_files_of_keras_2(tmp_path):
    """Weights alone or a whole model; names end in a number, lists of many names are in parts."""
    arrays = {"dw/depthwise_kernel:0": np.ones((3, 3, 2, 1)), "bn/gamma:0": np.ones(2), "bn/moving_mean:0": np.ones(2)}
    arrays |= {"s/depthwise_kernel:0": np.ones((3, 3, 2, 1)), "s/pointwise_kernel:0": np.ones((1, 1, 2, 3))}
    layers = ["dw", "bn", "s"]
    for name, top in (("w.h5", ""), ("m.hdf5", "model_weights/")):
        with h5py.File(tmp_path / name, "w") as file:
            group = file.require_group(top) if top else file
            group.attrs["layer_names0"], group.attrs["layer_names1"] = [b"dw", b"bn"], [b"s"]
            for layer in layers:
                own = [array for array in arrays if array.startswith(f"{layer}/")]
                group.create_group(layer).attrs["weight_names"] = [array.encode() for array in own]
                for array in own:
                    group[layer][array] = arrays[array]
        want = {old.removesuffix(":0"): array for old, array in arrays.items()}
        want["dw/kernel"] = want.pop("dw/depthwise_kernel")
        check_same(jbn.load_arrays(tmp_path / name), want)


@pytest.mark.parametrize("name", FILES)
def test_bfloat16(keras, tmp_path, name):
    begin = keras.Input((3,))
    model = keras.Model(begin, keras.layers.Dense(2, dtype="bfloat16", name="fc")(begin))
    found = save(model, tmp_path / name)["fc/kernel"]
    assert found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found, model.weights[0].numpy())


def test_what_is_no_file_of_keras_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "m.h5"
    with h5py.File(file, "w") as opened:
        opened["a"] = np.ones(3)
    with pytest.raises(ValueError, match=r"m.h5 cannot be read: .* Expected a whole .h5 file of arrays"):
        jbn.load_arrays(file)
    with h5py.File(file, "w") as opened:
        opened["layers"] = h5py.ExternalLink("other.h5", "/layers")
    with pytest.raises(ValueError, match=r"m.h5 cannot be read: 'layers' is a link elsewhere"):
        jbn.load_arrays(file)
    with pytest.raises(ValueError, match=r"path is .*m.h5'; expected a file that ends in .safetensors or .npz\."):
        jbn.save_arrays(file, {"a": np.ones(3)})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"Files of Keras, .keras and .h5, need a package: pip install h5py"):
        jbn.load_arrays(file)
