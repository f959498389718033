"""save_arrays and load_arrays: what goes in comes out, nothing is half written, nothing is run."""

import io
import re
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jbn

SUFFIXES = [".npz", ".safetensors"]
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
ARRAYS = {
    "layer1.0.bn1.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "a/b": jnp.arange(3, dtype=jnp.float16),
    "file": np.array(7),
    "": np.zeros((0, 2)),
    "flag": np.array([True, False]),
}


@pytest.fixture(autouse=True)
def _package(request):
    if ".safetensors" in request.node.name:
        pytest.importorskip("safetensors")


@each_suffix
def test_there_and_back(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    jbn.save_arrays(file, {"old": np.ones(3)})
    jbn.save_arrays(str(file), ARRAYS)
    found = jbn.load_arrays(file)
    assert set(found) == set(ARRAYS)
    for name, array in found.items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_bfloat16(tmp_path):
    pytest.importorskip("safetensors")
    array = jnp.arange(5, dtype=jnp.bfloat16)
    jbn.save_arrays(tmp_path / "m.safetensors", {"a": array})
    assert (jbn.load_arrays(tmp_path / "m.safetensors")["a"] == array).all()
    with pytest.raises(ValueError, match=r"arrays: 'a' is of bfloat16, which .npz lacks; .* is .safetensors"):
        jbn.save_arrays(tmp_path / "m.npz", {"b": np.ones(2), "a": array})
    np.savez(tmp_path / "m.npz", a=array)
    with pytest.raises(ValueError, match=r"m.npz cannot be read: 'a' is bytes without a meaning, as .npz keeps bfl"):
        jbn.load_arrays(tmp_path / "m.npz")


@each_suffix
@pytest.mark.parametrize("dtype", ["complex64", "int4", "longdouble"])
def test_other_dtypes(tmp_path, suffix, dtype):
    with pytest.raises(ValueError, match=rf"arrays: 'a' is of .*, which {suffix} lacks; .* such as float32"):
        jbn.save_arrays(tmp_path / f"m{suffix}", {"b": np.ones(2), "a": np.ones(3, jnp.dtype(dtype))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_that_npz_lacks(tmp_path, dtype):
    pytest.importorskip("safetensors")
    array = np.arange(5).astype(jnp.dtype(dtype))
    with pytest.raises(ValueError, match=f"'a' is of {dtype}, which .npz lacks; .* There is .safetensors for it"):
        jbn.save_arrays(tmp_path / "m.npz", {"a": array})
    torch = pytest.importorskip("torch")
    tensor = torch.arange(5).to(getattr(torch, dtype))
    jbn.save_arrays(tmp_path / "m.safetensors", {"a": array, "b": tensor})
    for found in jbn.load_arrays(tmp_path / "m.safetensors").values():
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()
        assert found.flags.writeable


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"])
def test_dtypes_that_others_write(tmp_path, dtype):
    library = pytest.importorskip("safetensors.numpy")
    array = np.ones(5, jnp.dtype(dtype))
    (tmp_path / "m.safetensors").write_bytes(library.save({"a": array}))
    found = jbn.load_arrays(tmp_path / "m.safetensors")["a"]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


NAMES = st.text(st.sampled_from("aA./\\~é \0\n\ud800"), max_size=4) | st.sampled_from(
    ["a", "a.npy", "a.npy.npy", ".npy", "__metadata__", "a/", "/a", "file", "arr_0", "a" * 300, "a" * 70000]
)
KINDS = st.sampled_from(
    ["bool", "int8", "uint64", ">i4", "float16", ">f8", "float32", "bfloat16", "float8_e5m2", "int4", "complex64", "U2"]
)


@each_suffix
@given(
    st.dictionaries(NAMES, st.tuples(KINDS, st.sampled_from([(), (0,), (3,), (2, 3), (2, 0, 1)])), max_size=4),
    st.booleans(),
)
def test_what_is_accepted_comes_back(tmp_path_factory, suffix, drawn, transposed):
    """Names and bits; what is refused is named, and leaves no file."""
    folder = tmp_path_factory.mktemp("files")
    arrays = {
        name: np.arange(int(np.prod(shape))).reshape(shape).astype(jnp.dtype(dtype))
        for name, (dtype, shape) in drawn.items()
    }
    arrays = {name: array.T if transposed else array for name, array in arrays.items()}
    try:
        jbn.save_arrays(folder / f"m{suffix}", arrays)
    except (ValueError, TypeError) as error:
        assert any(repr(name) in str(error) for name in arrays)  # noqa: PT017
        assert not list(folder.iterdir())
        return
    found = jbn.load_arrays(folder / f"m{suffix}")
    assert list(map(repr, sorted(found))) == list(map(repr, sorted(arrays)))
    for name, array in found.items():
        want = arrays[name].astype(arrays[name].dtype.newbyteorder("="))
        assert (array.dtype, array.shape) == (want.dtype, want.shape)
        assert array.tobytes() == want.tobytes()
    if suffix == ".npz":
        elsewhere = np.load(folder / "m.npz")
        assert all(elsewhere[name].tobytes() == found[name].tobytes() for name in found)


@pytest.mark.parametrize(
    ("suffix", "names", "lost"),
    [
        (".npz", ["a.npy", "a"], "'a.npy'"),
        (".npz", ["a", "b\0c"], r"'b\\x00c'"),
        (".npz", ["\ud800"], r"'\\ud800'"),
        (".npz", ["a" * 70000], "'aaa"),
        (".safetensors", ["a", "__metadata__"], "'__metadata__'"),
        (".safetensors", ["\ud800"], r"'\\ud800'"),
    ],
)
def test_names_that_a_file_would_not_give_back(tmp_path, suffix, names, lost):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"m{suffix}"
    jbn.save_arrays(file, {"old": np.ones(3)})
    with pytest.raises(ValueError, match=rf"arrays: {suffix} does not give back the name {lost}.* Expected another"):
        jbn.save_arrays(file, {name: np.zeros(2) for name in names})
    assert jbn.load_arrays(file)["old"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_names_that_numpy_would_confuse_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        for i, member in enumerate(["a.npy", "a.npy.npy"]):
            with archive.open(member, "w") as file:
                np.lib.format.write_array(file, np.asarray(i))
    assert {name: int(array) for name, array in jbn.load_arrays(tmp_path / "m.npz").items()} == {"a": 0, "a.npy": 1}


@each_suffix
@pytest.mark.parametrize("keep", [slice(-7), slice(40), slice(0, 0)], ids=["cut", "short", "empty"])
def test_damaged(tmp_path, suffix, keep):
    file = tmp_path / f"m{suffix}"
    jbn.save_arrays(file, {"a": np.ones(30)})
    file.write_bytes(file.read_bytes()[keep])
    with pytest.raises(ValueError, match=rf"m{suffix} cannot be read: .* Expected a whole {suffix} file"):
        jbn.load_arrays(file)


def test_a_flipped_bit_in_npz(tmp_path):
    file = tmp_path / "m.npz"
    jbn.save_arrays(file, {"a": np.ones(30)})
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read: Bad CRC-32"):
        jbn.load_arrays(file)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("ran",))

    file = tmp_path / "m.npz"
    np.savez(file, a=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="cannot be read: 'a' holds Python objects, as a pickle"):
        jbn.load_arrays(file)


@each_suffix
def test_no_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"none{suffix}"):
        jbn.load_arrays(tmp_path / f"none{suffix}")
    with pytest.raises(OSError, match="nowhere"):
        jbn.save_arrays(tmp_path / "nowhere" / f"m{suffix}", {"a": np.ones(3)})


WAYS = {
    "m.pt": r"""torch.load\('.*m.pt', map_location="cpu", weights_only=True\), then jbn.convert\(state_dict,""",
    "m.pth": "torch.load",
    "m.bin": "torch.load",
    "m.ckpt": r"""Lightning it is torch.load\(.*m.ckpt.*\["state_dict"\], of TensorFlow tf.train.load_checkpoint""",
    "m.pkl": "a pickle can run any code",
    "m.msgpack": r"flax.serialization.msgpack_restore.*jbn.convert\(variables, .linen.",
    "m.eqx": "eqx.tree_deserialise_leaves",
    "m.onnx": r"onnx.load\('.*m.onnx'\).graph.initializer",
    "m.gguf": "gguf.GGUFReader",
    "m.tflite": "its norms are folded and gone",
    "m.npy": r"np.load\('.*m.npy'\)",
    "m": r"\.hdf5\.$",
    "m.txt": r"\.hdf5\.$",
}


@pytest.mark.parametrize("name", WAYS)
def test_other_suffixes(tmp_path, name):
    message = rf"path is '.*{name}'(, a file)?; expected a file that ends in .safetensors or .npz\."
    with pytest.raises(ValueError, match=message + "$"):
        jbn.save_arrays(tmp_path / name, {})
    message = message.replace(" or .npz", ", .npz, .keras, .h5, .hdf5")
    with pytest.raises(ValueError, match=message) as caught:
        jbn.load_arrays(tmp_path / name)
    assert re.search(WAYS[name], str(caught.value))


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.npz"])
def test_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(
        ValueError, match=r"a folder; expected .* of Orbax it is orbax.checkpoint.*restore\(os.path.abs"
    ):
        jbn.load_arrays(tmp_path / name)


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text):
    return len(text).to_bytes(8, "little") + text


ZIP = zipped(**{"a.npy": npy(np.ones(3))})
MISNAMED = {
    "a zip whose directory is damaged": (
        ".npz",
        ZIP.replace(b"PK\1\2", b"PK\1\3"),
        r"Bad magic .* Expected a whole .npz",
    ),
    "a zip that begins before its start": (".npz", ZIP[30:], r"Expected a whole .npz"),
    "an HDF5 file that is cut": (".h5", b"\x89HDF\r\n\x1a\n" + bytes(99), r"Expected a whole .h5"),
    "an array": (".npz", npy(np.ones(3)), r"It begins as .npy does. To read it: np.load\("),
    "PyTorch's": (".npz", zipped(**{"m__data.pkl": b""}), r"holds 'm/data.pkl', which is no array. .* torch.load\("),
    "Keras'": (
        ".npz",
        zipped(**{"config.json": b""}),
        r"as .keras does. To read it: give it that suffix, for jbn.load",
    ),
    "a zip": (".npz", zipped(**{"a.txt": b"x"}), r"holds 'a.txt', which is no array. Expected a whole .npz"),
    "an empty member": (".npz", zipped(**{"a.npy": b""}), r"'a': EOF.* Expected a whole .npz"),
    "a pickle": (".npz", b"\x80\x04K\x01.", r"It begins as .pkl does"),
    "HDF5": (".npz", b"\x89HDF\r\n\x1a\n", r"It begins as .h5 does"),
    "text": (".npz", b"hello", r"File is not a zip file. Expected a whole .npz"),
    "a pickle in safetensors": (".safetensors", b"\x80\x04K\x01." * 9, r"It begins as .pkl does"),
    "npz in safetensors": (".safetensors", zipped(**{"a.npy": npy(np.ones(3))}), r"It begins as .npz does"),
    "no header": (".safetensors", header(b"not JSON"), r"JSON in header.* Expected a whole .safetensors"),
    "a header of other things": (".safetensors", header(b'{"a": 1}'), r"Expected a whole .safetensors"),
    "a dtype of no library": (
        ".safetensors",
        header(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}') + b"0",
        r"'a' is of F4, which NumPy lacks. Expected one of BOOL,",
    ),
    "float8 of NumPy": (".npz", zipped(**{"a.npy": npy(np.ones(3, jnp.float8_e5m2))}), r"'a': .*'<f1'"),
}


@pytest.mark.parametrize("case", MISNAMED)
def test_what_is_not_what_its_name_says(tmp_path, case):
    suffix, content, message = MISNAMED[case]
    for package in {".safetensors": ["safetensors"], ".h5": ["h5py"]}.get(suffix, []):
        pytest.importorskip(package)
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"m{suffix} cannot be read: .*{message}"):
        jbn.load_arrays(tmp_path / f"m{suffix}")


@pytest.mark.parametrize("value", ["text", b"bytes", np.datetime64("2020-01-01")])
def test_other_arrays_of_numpy_are_read(tmp_path, value):
    np.savez(tmp_path / "m.npz", a=value, b=np.ones(3))
    found = jbn.load_arrays(tmp_path / "m.npz")
    assert found["a"] == np.asarray(value)
    with pytest.raises(TypeError, match=r"^the layer of tree has an array of .*; expected numbers: leave it out"):
        jbn.convert(found, "torch", "linen")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.ones(3)], "arrays is of type list; expected a mapping of names"),
        ({"a": 1.0}, "arrays: 'a' has a leaf of type float; expected an array"),
        ({"a": np.rec.array([(1, 2.0)])}, r"arrays: 'a' has an array of \(numpy.record, .*; expected numbers"),
        ({"a": np.array(["b"])}, "arrays: 'a' has an array of <U1; expected numbers"),
        ({"a": np.ma.masked_array([1.0])}, "arrays: 'a' has a masked array .* expected a plain one"),
        ({1: np.ones(3)}, "arrays: 1 is of type int; expected a string"),
        ({"a": {1: np.ones(3), "b": np.ones(3)}}, r"^arrays has keys of several kinds in one node, .*; expected str"),
    ],
)
def test_other_kinds(tmp_path, arrays, message):
    with pytest.raises(TypeError, match=message):
        jbn.save_arrays(tmp_path / "m.npz", arrays)
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    (tmp_path / "m.safetensors").write_bytes(b"")
    for act in (jbn.load_arrays, lambda path: jbn.save_arrays(path, {"a": np.ones(3)})):
        with pytest.raises(ImportError, match="pip install safetensors"):
            act(tmp_path / "m.safetensors")


TREES = {
    "linen": {"params": {"norm": {"scale": np.arange(3.0), "bias": np.ones(3)}, "fc": {"kernel": np.ones((3, 2))}}},
    "nnx": {"layers": {0: {"scale": jnp.arange(3.0)}, 1: {"kernel": jnp.ones((3, 2))}}},
    "jbn": jbn.bn_init(3),
}
TREES["linen"]["batch_stats"] = {"norm": {"mean": np.zeros(3), "var": np.full(3, 2.0)}}


@each_suffix
@pytest.mark.parametrize("library", TREES)
def test_trees_are_flattened(tmp_path, suffix, library):
    """The names are the keys of the tree, and convert reads them as it reads the tree."""
    tree = TREES[library]
    jbn.save_arrays(tmp_path / f"m{suffix}", tree)
    found = jbn.load_arrays(tmp_path / f"m{suffix}")
    assert library != "linen" or set(found) >= {"params/norm/scale", "batch_stats/norm/var"}
    same = [jbn.convert(arrays, library, library, like=tree) for arrays in (found, tree)]
    assert jax.tree.structure(same[0]) == jax.tree.structure(tree)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, same), strict=True))


def test_the_state_of_an_nnx_model(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    jbn.save_arrays(tmp_path / "m.npz", state)
    found = jbn.load_arrays(tmp_path / "m.npz")
    assert set(found) >= {"layers/0/kernel", "layers/1/scale", "layers/1/mean"}
    back = jbn.convert(found, "nnx", "nnx", like=state)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (back, state)), strict=True))


def test_names_that_a_tree_has_twice(tmp_path):
    both = {"params/a": np.ones(3), "params/a/b": np.ones(3)}
    with pytest.raises(ValueError, match=r"tree has an array 'params/a' and others under it; expected names of one"):
        jbn.convert(both, "linen", "nnx")
    with pytest.raises(ValueError, match=r"arrays: 'a/b' is there as a name and as keys of a tree"):
        jbn.save_arrays(tmp_path / "m.npz", {"a/b": np.ones(3), "a": {"b": np.ones(3)}})
    assert not list(tmp_path.iterdir())
