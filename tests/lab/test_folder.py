import io
import os
import resource
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jbn.lab.data.folder import LARGEST_LABEL, open_folder
from jbn.lab.errors import OptionError

STORAGES = (np.savez, np.savez_compressed)
SHAPE = (5, 4, 3)
LABELS = np.arange(4)
IMAGES = np.zeros((4, 2, 2), np.uint8)


def random_images(count, dtype, shape=SHAPE, seed=0):
    generator = np.random.default_rng(seed)
    if dtype == np.uint8:
        return generator.integers(0, 256, (count, *shape), np.uint8)
    return generator.standard_normal((count, *shape)).astype(dtype)


def as_read(images):
    """The oracle: float32, four axes, uint8 as shares of 255."""
    images = images.reshape(*images.shape[:3], -1)
    return images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images.astype(np.float32)


def message_of(path, option="--data", action=open_folder):
    """Return the error of opening a folder, or of another action: one line, about the option, with a way out."""
    with pytest.raises(OptionError) as caught:
        action(path, option)
    assert caught.value.option == option
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    return message


@pytest.mark.parametrize("save", STORAGES)
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[:2], (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", ">f4"])
def test_rows_are_what_was_written_in_the_order_asked_for(tmp_path, dtype, shape, save):
    counts = (7, 0, 0, 1, 12, 0)
    images = [random_images(count, dtype, shape, seed) for seed, count in enumerate(counts)]
    labels = [np.random.default_rng(count).integers(0, 50, count).astype("int16") for count in counts]
    for number in reversed(range(len(counts))):
        save(tmp_path / f"part-{number}.npz", images=images[number], labels=labels[number])
    rows = np.random.default_rng(1).integers(0, sum(counts), 100)
    folder = open_folder(tmp_path)
    found = folder.rows(rows)
    assert (found.images.dtype, found.labels.dtype, folder.labels.dtype) == (np.float32, np.int32, np.int32)
    assert len(folder) == sum(counts)
    assert folder.image_shape == found.images.shape[1:] == (*shape, 1)[:3]
    assert folder.classes == np.concatenate(labels).max() + 1
    np.testing.assert_array_equal(found.images, as_read(np.concatenate(images))[rows])
    np.testing.assert_array_equal(found.labels, np.concatenate(labels)[rows])
    np.testing.assert_array_equal(folder.labels, np.concatenate(labels))


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i2", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_any_integer_dtype(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS.astype(dtype))
    np.testing.assert_array_equal(open_folder(tmp_path).labels, LABELS)


@pytest.mark.parametrize("save", STORAGES)
def test_the_order_of_the_axes_on_disk_does_not_matter(tmp_path, save):
    images = random_images(6, np.float32)
    save(tmp_path / "a.npz", images=np.asfortranarray(images), labels=np.arange(6))
    np.testing.assert_array_equal(open_folder(tmp_path).rows(np.array([5, 0, 3])).images, images[[5, 0, 3]])


def test_files_may_differ_in_precision_storage_and_a_missing_channel(tmp_path):
    parts = [random_images(3, dtype, (2, 2)) for dtype in ("float32", "float64", "float16")]
    np.savez(tmp_path / "a.npz", images=parts[0], labels=np.arange(3, dtype=np.uint64))
    np.savez_compressed(tmp_path / "b.npz", images=parts[1][..., np.newaxis], labels=np.arange(3, dtype=np.int8))
    np.savez(tmp_path / "c.npz", images=parts[2], labels=np.arange(3))
    found = open_folder(tmp_path).rows(np.arange(9)[::-1])
    np.testing.assert_array_equal(found.images, np.concatenate([as_read(part) for part in parts])[::-1])


def test_values_are_found_wherever_they_are_in_the_file(tmp_path):
    path, images = tmp_path / "a.npz", random_images(6, np.float64)
    np.savez(tmp_path / "a.npz", filler=np.ones(7, np.uint8), labels=np.arange(6), images=images, end=np.ones(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("text", "not an array")
    path.write_bytes(b"odd" + path.read_bytes())  # what precedes an archive is no part of it
    np.testing.assert_array_equal(open_folder(tmp_path).rows(np.arange(6)).images, as_read(images))


def test_names_decide_the_order_and_other_files_are_left_out(tmp_path):
    for number, name in enumerate(("b.npz", "a.npz", "part-10.npz", "part-2.npz")):
        np.savez(tmp_path / name, images=np.full((2, 1, 1), number, np.float32), labels=[number, number])
    for name in ("notes.txt", "._a.npz", ".b.npz", "c.npz.partial"):
        (tmp_path / name).write_text("no archive")
    folder = open_folder(tmp_path)
    assert folder.labels.tolist() == [1, 1, 0, 0, 2, 2, 3, 3]
    assert folder.rows(np.arange(8)).images.ravel().tolist() == [1, 1, 0, 0, 2, 2, 3, 3]


def test_a_row_is_found_in_its_file(tmp_path):
    for name, count in (("a", 0), ("b", 3), ("c", 0), ("d", 2), ("e", 0)):
        np.savez(tmp_path / f"{name}.npz", images=IMAGES[:count], labels=LABELS[:count])
    folder = open_folder(tmp_path)
    places = ["b.npz, image 0", "b.npz, image 1", "b.npz, image 2", "d.npz, image 0", "d.npz, image 1"]
    assert [folder.where(row) for row in range(5)] == [f"{tmp_path}/{place}" for place in places]


@pytest.mark.parametrize("save", STORAGES)
def test_rows_that_were_not_asked_for_do_not_matter(tmp_path, save):
    images = random_images(9, np.float32)
    images[[0, 2, 3, 5, 8]] = np.nan
    save(tmp_path / "a.npz", images=images, labels=np.arange(9))
    rows = np.array([7, 1, 4, 6, 1])
    np.testing.assert_array_equal(open_folder(tmp_path).rows(rows).images, images[rows])
    assert np.isnan(open_folder(tmp_path).rows(np.array([5])).images).all()


def test_what_float32_cannot_hold_is_infinite(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([1e300, -1e300, np.nan]).reshape(3, 1, 1), labels=[0, 0, 0])
    found = open_folder(tmp_path).rows(np.arange(3)).images
    np.testing.assert_array_equal(found.ravel(), [np.inf, -np.inf, np.nan])


def test_no_row_is_no_image(tmp_path):
    np.savez(tmp_path / "a.npz", images=random_images(4, np.uint8), labels=LABELS)
    found = open_folder(tmp_path).rows(np.arange(0))
    assert (found.images.shape, found.labels.shape) == ((0, *SHAPE), (0,))


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_outside_are_refused(tmp_path, row):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(IndexError, match=r"expected rows in \[0, 4\)"):
        open_folder(tmp_path).rows(np.array([0, row]))


@pytest.mark.parametrize("save", STORAGES)
def test_opening_reads_no_image(tmp_path, save):
    path, images = tmp_path / "a.npz", random_images(100, np.uint8, (32, 32))
    save(path, images=images, labels=np.arange(100))
    content = bytearray(path.read_bytes())
    content[50_000:60_000] = bytes(10_000)  # of more than 100 kB of noise, packed or not
    path.write_bytes(content)
    folder = open_folder(tmp_path)
    np.testing.assert_array_equal(folder.labels, np.arange(100))
    if save is np.savez:
        # The checksum of the whole is wrong, but of the whole nothing is read.
        rows = np.array([99, 3])
        np.testing.assert_array_equal(folder.rows(rows).images, as_read(images)[rows])
    else:
        assert f"cannot read '{path}'" in message_of(tmp_path, action=lambda *_: folder.rows(np.array([0])))


def test_of_a_large_file_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    hole = bytes(1 << 26)  # a thousand images
    count = 80 * 1024  # 5 GiB: more than an offset of 32 bits reaches

    class Sparse(io.FileIO):
        def write(self, data):
            return self.seek(len(data), 1) and len(data) if data is hole else super().write(data)

    with Sparse(tmp_path / "a.npz", "w") as file, zipfile.ZipFile(file, "w") as archive:
        with monkeypatch.context() as patch, archive.open("images.npy", "w", force_zip64=True) as stream:
            patch.setattr(zipfile, "crc32", lambda data, value=0: 0)
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 256, 256)}
            np.lib.format.write_array_header_1_0(stream, header)
            last = bytes(range(256)) * 256
            for _ in range(79):
                stream.write(hole)
            stream.write(hole[len(last) :] + last)
        with archive.open("labels.npy", "w") as stream:
            np.lib.format.write_array(stream, np.arange(count) % 10)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    folder = open_folder(tmp_path)
    found = folder.rows(np.array([count - 1, 0, count // 2])).images
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 1 << 27
    np.testing.assert_array_equal(found[0, 0, :, 0], np.arange(256, dtype=np.float32) / np.float32(255))
    assert not found[1:].any()


def test_any_number_of_files_can_be_read(tmp_path):
    for number in range(100):
        np.savez(tmp_path / f"{number:03}.npz", images=IMAGES[:1] + np.uint8(number), labels=[number])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, hard))
    try:
        found = open_folder(tmp_path).rows(np.arange(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(np.rint(found.images[:, 0, 0, 0] * 255), np.arange(100))


def saved(**arrays):
    """Return a writer of one file with these arrays."""

    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write


def cut_short(share):
    def write(path):
        saved(images=random_images(200, np.uint8), labels=np.zeros(200, int))(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def cut_out(path):
    cut_short(1)(path)
    content = path.read_bytes()
    path.write_bytes(content[:4000] + content[6000:])


def relabelled(path):
    labels = np.arange(1000)
    saved(images=np.zeros((1000, 1, 1), np.uint8), labels=labels)(path)
    path.write_bytes(path.read_bytes().replace(labels.tobytes(), labels[::-1].tobytes()))


def raw(**entries):
    """Return a writer of one file whose entries are these bytes."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(f"{name}.npy", content)

    return write


def npy(array, promised=None):
    """The bytes of an array, under a header that promises a shape."""
    stream = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": promised or array.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + array.tobytes()


# What is wrong with a file, and what the error says beside its name.
FILES = {
    "nothing": (lambda path: path.touch(), "File is not a zip file"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "cut short in the images": (cut_short(0.5), "File is not a zip file"),
    "cut short at the end": (cut_short(0.999), "File is not a zip file"),
    "cut out of the images": (cut_out, "cannot read"),
    "other labels than written": (relabelled, "Bad CRC-32 for file 'labels.npy'"),
    "fewer images than promised": (raw(images=npy(IMAGES, (5, 2, 2)), labels=npy(np.arange(5))), "'images' has 144"),
    "far more labels than there": (raw(images=npy(IMAGES), labels=npy(LABELS, (10**15,))), "'labels' has"),
    "negative counts": (raw(images=npy(IMAGES, (-4, -2, 2)), labels=npy(LABELS)), "'images' has"),
    "no header": (raw(images=b"\0" * 500, labels=npy(LABELS)), "magic string"),
    "a long header": (raw(images=b"\x93NUMPY\2\0\0\0\1\0" + b" " * 65536, labels=npy(LABELS)), "cannot read"),
    "no images": (saved(pictures=IMAGES, labels=LABELS), "no array 'images' (there: 'pictures', 'labels')"),
    "no labels": (saved(images=IMAGES, y=LABELS), "no array 'labels' (there: 'images', 'y')"),
    "no array": (saved(), "no array 'images' (there: none)"),
    "flat images": (saved(images=IMAGES.reshape(4, 4), labels=LABELS), "dtype uint8 and shape (4, 4); expected (n, h"),
    "five axes": (saved(images=IMAGES[..., None, None], labels=LABELS), "shape (4, 2, 2, 1, 1); expected (n, height"),
    "no height": (saved(images=IMAGES[:, :0], labels=LABELS), "(4, 0, 2); expected (n, height"),
    "no channels": (saved(images=IMAGES[..., None][..., :0], labels=LABELS), "(4, 2, 2, 0); expected (n, height"),
    "signed images": (saved(images=IMAGES.astype("int8"), labels=LABELS), "dtype int8 and shape (4, 2, 2); expected u"),
    "wide images": (saved(images=IMAGES.astype("uint16"), labels=LABELS), "dtype uint16"),
    "boolean images": (saved(images=IMAGES.astype(bool), labels=LABELS), "dtype bool"),
    "complex images": (saved(images=IMAGES.astype("complex64"), labels=LABELS), "dtype complex64"),
    "longdouble images": (saved(images=IMAGES.astype("longdouble"), labels=LABELS), f"dtype {np.dtype('longdouble')}"),
    "text images": (saved(images=IMAGES.astype("U3"), labels=LABELS), "dtype <U3"),
    "object images": (saved(images=IMAGES.astype(object), labels=LABELS), "dtype object"),
    "structured images": (saved(images=IMAGES.astype([("é", "u1")]), labels=LABELS), "dtype [("),
    "float labels": (saved(images=IMAGES, labels=LABELS * 1.0), "labels of dtype float64 and shape (4,); expected int"),
    "boolean labels": (saved(images=IMAGES, labels=LABELS > 1), "labels of dtype bool"),
    "text labels": (saved(images=IMAGES, labels=LABELS.astype(str)), "labels of dtype <U"),
    "object labels": (saved(images=IMAGES, labels=LABELS.astype(object)), "labels of dtype object"),
    "one-hot labels": (
        saved(images=IMAGES, labels=np.eye(4, dtype=int)),
        "shape (4, 4); expected integers of shape (4",
    ),
    "too few labels": (saved(images=IMAGES, labels=LABELS[:3]), "(3,); expected integers of shape (4,), one for each"),
    "too many labels": (saved(images=IMAGES[:0], labels=LABELS), "shape (4,); expected integers of shape (0,)"),
    "a negative label": (saved(images=IMAGES, labels=[0, 1, -2, -3]), "label -2 at index 2; expected labels in [0, 1"),
    "a huge label": (saved(images=IMAGES, labels=[0, 10**9, 0, 0]), "label 1000000000 at index 1; expected labels in"),
    "a label beyond int64": (saved(images=IMAGES, labels=np.uint64([0, 0, 0, 2**64 - 1])), f"label {2**64 - 1} at ind"),
    "one label too large": (saved(images=IMAGES, labels=[LARGEST_LABEL + 1, 0, 0, 0]), f"label {LARGEST_LABEL + 1} at"),
}


@pytest.mark.parametrize("option", ["--data", "--validation"])
@pytest.mark.parametrize("problem", FILES)
def test_a_malformed_file_is_named_with_what_is_wrong(tmp_path, problem, option):
    write, says = FILES[problem]
    saved(images=IMAGES, labels=LABELS)(tmp_path / "a.npz")
    path = tmp_path / "part-007.npz"
    write(path)
    message = message_of(tmp_path, option)
    assert f"'{path}'" in message
    assert says in message


def test_the_largest_label_is_allowed(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES[:1], labels=[LARGEST_LABEL])
    assert open_folder(tmp_path).classes == LARGEST_LABEL + 1


def test_a_folder_without_data_is_refused(tmp_path):
    assert f"'{tmp_path / 'none'}' (No such file" in message_of(tmp_path / "none")
    assert f"no .npz file in '{tmp_path}'" in message_of(tmp_path)
    saved(images=IMAGES[:0], labels=LABELS[:0])(tmp_path / "a.npz")
    assert f"no image in the .npz files of '{tmp_path}'" in message_of(tmp_path)
    assert f"'{tmp_path / 'a.npz'}' (Not a directory)" in message_of(tmp_path / "a.npz")


def test_images_of_two_shapes_are_refused_with_both_files(tmp_path):
    for name, shape in (("a", (4, 2, 2)), ("b", (4, 2, 2, 1)), ("c", (4, 2, 2, 3))):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros(shape, np.uint8), labels=LABELS)
    message = message_of(tmp_path)
    assert f"'{tmp_path / 'c.npz'}' holds images of (2, 2, 3)" in message
    assert f"'{tmp_path / 'a.npz'}' holds images of (2, 2, 1)" in message


@pytest.mark.parametrize("other", ["float16", "float32"])
def test_images_of_two_scales_are_refused_with_both_files(tmp_path, other):
    for name, dtype in (("a", "uint8"), ("b", "uint8"), ("c", other)):
        np.savez(tmp_path / f"{name}.npz", images=IMAGES.astype(dtype), labels=LABELS)
    message = message_of(tmp_path)
    assert f"'{tmp_path / 'c.npz'}' holds float images, but '{tmp_path / 'a.npz'}' holds uint8 images; exp" in message


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 9, 5)])
def test_channels_that_come_first_are_refused_and_either_fix_is_taken(tmp_path, shape):
    path, images = tmp_path / "a.npz", random_images(4, np.uint8, shape)
    np.savez(path, images=images, labels=LABELS)
    assert "whose channels seem to come first; expected (n, height, width, channels): numpy" in message_of(tmp_path)
    for fixed in (np.moveaxis(images, 1, -1), np.swapaxes(images, 1, 2)):
        np.savez(path, images=fixed, labels=LABELS)
        np.testing.assert_array_equal(open_folder(tmp_path).rows(np.arange(4)).images, as_read(fixed))


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 1, 4), (2, 8, 64), (5, 5, 7), (3, 9)])
def test_small_images_and_many_channels_are_not_taken_for_channels_first(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images=random_images(4, np.uint8, shape), labels=LABELS)
    assert open_folder(tmp_path).image_shape == (*shape, 1)[:3]


@pytest.mark.parametrize("name", ["images", "labels"])
def test_nothing_is_unpickled(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trapped",)

    arrays = {"images": IMAGES, "labels": LABELS}
    arrays[name] = np.full(arrays[name].shape, Trap())
    np.savez(tmp_path / "a.npz", **arrays)
    assert "dtype object" in message_of(tmp_path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("save", STORAGES)
def test_broken_bytes_raise_no_other_error(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, images=IMAGES, labels=LABELS)
    content = path.read_bytes()
    broken = [content[:length] for length in range(0, len(content), 5)]
    for place, change in enumerate(np.random.default_rng(0).integers(1, 256, len(content))):
        broken.append(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
    refused = []
    for version in broken:
        path.write_bytes(version)
        try:
            open_folder(tmp_path).rows(np.arange(1))
        except OptionError as error:
            refused.append(str(error))
    assert all(f"'{path}'" in message and "\n" not in message for message in refused)
    assert len(refused) > len(broken) / 2


def grow_unseen(path):
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES = {
    "vanished": (Path.unlink, "No such file"),
    "cut short": (lambda path: os.truncate(path, 300), "changed after it was opened"),
    "longer": (grow_unseen, "changed after it was opened"),
    "written again": (lambda path: os.utime(path, (1, 1)), "changed after it was opened"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("save", STORAGES)
@pytest.mark.parametrize("before", [0, 1], ids=["unread", "read before"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_after_opening_is_named(tmp_path, change, before, save):
    for name in "ab":
        save(tmp_path / f"{name}.npz", images=random_images(50, np.uint8, (32, 32)), labels=np.arange(50))
    folder = open_folder(tmp_path, "--validation")
    folder.rows(np.arange(100 * before))
    apply, says = CHANGES[change]
    apply(tmp_path / "b.npz")
    folder.rows(np.arange(50))
    message = message_of(tmp_path, "--validation", lambda *_: folder.rows(np.array([3, 70])))
    assert f"'{tmp_path / 'b.npz'}'" in message
    assert says in message
