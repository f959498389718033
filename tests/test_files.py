"""save_arrays and load_arrays: what goes in comes out, nothing is half written, nothing is run."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

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
    with pytest.raises(ValueError, match=r"arrays: 'a' is of bfloat16, which .npz lacks; .* there is .safetensors"):
        jbn.save_arrays(tmp_path / "m.npz", {"b": np.ones(2), "a": array})
    np.savez(tmp_path / "m.npz", a=array)
    with pytest.raises(ValueError, match=r"m.npz cannot be read: 'a' is bytes without a meaning, as .npz keeps bfl"):
        jbn.load_arrays(tmp_path / "m.npz")


@each_suffix
@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "longdouble"])
def test_other_dtypes(tmp_path, suffix, dtype):
    with pytest.raises(ValueError, match=rf"arrays: 'a' is of .*, which {suffix} lacks"):
        jbn.save_arrays(tmp_path / f"m{suffix}", {"a": np.ones(3, jnp.dtype(dtype))})


@each_suffix
def test_what_fails_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    file = tmp_path / f"m{suffix}"
    jbn.save_arrays(file, {"a": np.ones(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        jbn.save_arrays(file, {"a": np.zeros(3)})
    assert jbn.load_arrays(file)["a"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


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
    with pytest.raises(ValueError, match="cannot be read: Object arrays cannot be loaded"):
        jbn.load_arrays(file)


@each_suffix
def test_no_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"none{suffix}"):
        jbn.load_arrays(tmp_path / f"none{suffix}")
    with pytest.raises(OSError, match="nowhere"):
        jbn.save_arrays(tmp_path / "nowhere" / f"m{suffix}", {"a": np.ones(3)})


@pytest.mark.parametrize("name", ["m.pt", "m", "m.npy"])
def test_other_suffixes(tmp_path, name):
    message = rf"path is '.*{name}'; expected a file that ends in .safetensors or .npz. Of .pt and .pth"
    with pytest.raises(ValueError, match=message):
        jbn.save_arrays(tmp_path / name, {})
    with pytest.raises(ValueError, match=message):
        jbn.load_arrays(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.ones(3)], "arrays is of type list; expected a mapping of names"),
        ({"a": 1.0}, "arrays: 'a' has a leaf of type float; expected an array"),
        ({1: np.ones(3)}, "arrays: 1 is of type int; expected a string"),
    ],
)
def test_other_kinds(tmp_path, arrays, message):
    with pytest.raises(TypeError, match=message):
        jbn.save_arrays(tmp_path / "m.npz", arrays)
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for act in (jbn.load_arrays, lambda path: jbn.save_arrays(path, {})):
        with pytest.raises(ImportError, match="pip install safetensors"):
            act(tmp_path / "m.safetensors")
