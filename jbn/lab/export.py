"""``jbn export``: a network that a run has saved, in files for others; each is tried before it gets its name."""

import errno
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.extend
import numpy as np
import typer
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax import export
from jax.sharding import Mesh
from rich.console import Console

from jbn import load_arrays, save_arrays
from jbn.atomic import replace_file
from jbn.lab.data.batches import Batches
from jbn.lab.devices import mesh_of
from jbn.lab.errors import FileError, OptionError, file_errors
from jbn.lab.options import ExportOptions
from jbn.lab.report import waiting
from jbn.lab.run.saved import Saved, blame_checkpoint, find_saved
from jbn.linen import fold
from jbn.paths import count_of
from jbn.version import install

PLATFORMS = ("cpu", "cuda", "tpu")
FOLDED = (".jaxexport", ".onnx")  # programs; arrays are those of the network as it was trained
# How far logits may be from those of the network, relative to the largest: a folded kernel is rounded once more, in the
# dtype of the arithmetic, and such errors add up over the layers.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
# The packages that a kind of file needs, and the extra that installs them.
NEEDS = {
    ".jaxexport": ("lab", "flatbuffers"),
    ".onnx": ("onnx", "jax2onnx", "onnxruntime"),
    ".safetensors": ("lab", "safetensors"),
    ".npz": ("lab",),
}


class Product(NamedTuple):
    """A network to export.

    Attributes:
        network: as it was trained.
        variables: its weights and running statistics.
        evaluate: the same in evaluation, a function of images (n, h, w, c) alone, its batch norms folded.
        images: float32 (n, h, w, c), to try files on.
        bound: how far the logits of a file may be from those of the network, relative to the largest.
        those: which images they are, in words.
        words: what it is, in words.
    """

    network: nn.Module
    variables: dict[str, Any]
    evaluate: Callable[[Any], Any]
    images: Any
    bound: float
    those: str
    words: tuple[str, ...]


def run(options: ExportOptions, console: Console) -> None:
    """Write the files, and say what they are; where one cannot be written, end with exit status 1.

    Raises:
        OptionError: a file is there or cannot be made here, or there is no such checkpoint, or it cannot be read.
    """
    _check(options)
    with waiting(console, "Reading the checkpoint, folding ..."):
        product = _open(options)
    for line in product.words:
        console.print(line, soft_wrap=True, highlight=False)
    try:
        for file in options.files:
            with waiting(console, f"Writing {file.name}; most of the time it compiles ..."):
                error = _write(product, file)
            differ = f"differ by {error:.0e} of the largest" if error else "are the same"
            console.print(f"Wrote {file}: its logits of {product.those} {differ}", soft_wrap=True)
    except FileError as error:
        typer.echo(f"jbn: {error}", err=True)
        raise typer.Exit(1) from None


def _check(options: ExportOptions) -> None:
    """Refuse files that are there, that have no folder, or that need a package, before anything is computed."""
    for file in options.files:
        extra, *needed = NEEDS[file.suffix]
        lacking = [name for name in needed if find_spec(name) is None]
        if lacking:
            fix = f"{' and '.join(lacking)}, not installed here; expected {install(extra)}"
            raise OptionError("FILE", f"'{file}' needs {fix}")
        if os.path.isdir(file) or not os.path.isdir(file.parent):
            raise OptionError("FILE", f"got '{file}'; expected the name of a file, in a folder that is there")
        if os.path.lexists(file) and not options.force:
            raise OptionError("FILE", f"'{file}' is there; write over it with --force, or take another name")
    places = [os.path.realpath(file) for file in options.files]
    if twice := [file for file, place in zip(options.files, places, strict=True) if places.count(place) > 1]:
        raise OptionError("FILE", f"got '{twice[0]}' twice; expected each file once")


def _open(options: ExportOptions) -> Product:
    """Return what is to be exported, and images to try it on."""
    saved, mesh = find_saved(options.checkpoint), mesh_of(1)
    recipe, state = saved.read(mesh)
    if options.average and state.average is None:
        raise OptionError("--average", f"there is none: the run in '{saved.out}' was started without --ema")
    images, those = _images_of(saved, mesh)
    network, variables = recipe.network, jax.device_get(state.average if options.average else state.variables)
    apply, folded, folds = fold(network, variables, images, train=False)
    words = [f"{saved.options.model} in '{saved.out}' after step {state.step}"]
    words[0] += ", the average of its weights" * options.average
    programs = any(file.suffix in FOLDED for file in options.files)
    if folds.pairs and programs:
        words.append(f"Folded into the layers beside them: {count_of(len(folds.pairs), 'norm')}")
    if folds.kept and programs:
        words.append(f"Not folded: {', '.join(folds.kept)}")

    def evaluate(images: Any) -> Any:
        return apply(folded, images, train=False)

    return Product(network, variables, evaluate, images, BOUNDS[saved.options.dtype], those, tuple(words))


def _images_of(saved: Saved, mesh: Mesh) -> tuple[Any, str]:
    """Return images to try files on, a batch of the training data or, where these cannot be read, noise; and which."""
    size = saved.options.batch_size
    try:
        batches = Batches(saved.data(validation=False).training, size, mesh)
        with blame_checkpoint():
            images = batches.read(batches.rows(0, seed=0)).images
        return images, count_of(len(images), "image")
    except OptionError:
        noise = jax.random.uniform(jax.random.key(0), (size, *saved.form.image_shape))
        return noise, f"{count_of(size, 'image')} of noise, for the data of its run cannot be read,"


def _write(product: Product, file: Path) -> float:
    """Make a file, try it and put it in its place; return how far its logits were from those of the network.

    Raises:
        FileError: it cannot be written, or its logits are others; what was there before stays.
    """
    make, answer = FORMS[file.suffix]
    with file_errors(file):
        content = make(product, file.suffix)
        given, expected = (
            np.asarray(logits, np.float64)
            for logits in (
                answer(product, content, file.suffix),
                product.network.apply(product.variables, product.images, train=False),
            )
        )
        error = float(np.abs(given - expected).max() / np.abs(expected).max())
        if not error <= product.bound:
            wrong = f"its logits differ from those of the network by {error:.0e} of the largest"
            raise FileError(f"'{file}' is not written: {wrong}; expected {product.bound:.0e} at most")

        def put(partial: IO[bytes]) -> None:
            partial.write(content)
            partial.flush()
            if Path(partial.name).read_bytes() != content:
                raise OSError(errno.EIO, "what was written reads otherwise")

        replace_file(file, put)
    return error


def _make_program(product: Product, _: str) -> bytes:
    """Return the network for ``jax.export.deserialize``, for any number of images and any device."""
    any_number = export.symbolic_shape("n, " + ", ".join(map(str, product.images.shape[1:])))
    program = export.export(jax.jit(product.evaluate), platforms=PLATFORMS)
    return bytes(program(jax.ShapeDtypeStruct(any_number, product.images.dtype)).serialize())


def _answer_of_program(product: Product, content: bytes, _: str) -> Any:
    return export.deserialize(bytearray(content)).call(product.images)


def _make_onnx(product: Product, _: str) -> bytes:
    """Return the network for runtimes of ONNX, for any number of images.

    Of the traced program: an exporter that replaces Flax's layers runs past what adds the bias of a folded one.
    """
    shape = product.images.shape[1:]
    (n,) = export.symbolic_shape("n")
    traced = jax.make_jaxpr(product.evaluate)(jax.ShapeDtypeStruct((n, *shape), product.images.dtype))
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter and its packages warn of is theirs
        logger.setLevel(logging.ERROR)
        try:
            exporter = importlib.import_module("jax2onnx")
            model = exporter.to_onnx(jax.extend.core.jaxpr_as_fun(traced), [("n", *shape)])
        finally:
            logger.setLevel(level)
    return bytes(model.SerializeToString())


def _answer_of_onnx(product: Product, content: bytes, _: str) -> Any:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(product.images)})[0]


def _make_arrays(product: Product, suffix: str) -> bytes:
    """Return weights and running statistics by their names in the variables of the network."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"arrays{suffix}")
        save_arrays(file, product.variables)
        return file.read_bytes()


def _answer_of_arrays(product: Product, content: bytes, suffix: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"arrays{suffix}")
        file.write_bytes(content)
        variables = unflatten_dict(load_arrays(file), sep="/")
    return product.network.apply(variables, product.images, train=False)


Form = tuple[Callable[[Product, str], bytes], Callable[[Product, bytes, str], Any]]
# What makes the bytes of a kind of file, and what reads them and gives logits of the images.
FORMS: dict[str, Form] = {
    ".jaxexport": (_make_program, _answer_of_program),
    ".onnx": (_make_onnx, _answer_of_onnx),
    **dict.fromkeys((".safetensors", ".npz"), (_make_arrays, _answer_of_arrays)),
}
