"""A matrix product that takes a norm and its ReLU in and gives the sums of the next norm out, in Pallas.

A 1×1 convolution is a product over channels. `normalized_matmul` reads x once, normalizes it on the way in, and sums
y - k and (y - k)² of each tile of y before that tile leaves the chip: the plain program reads y again for the sums,
writes the normalized x and reads it again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

WIDE = jnp.float32
_TPU_BYTES = 10 << 20  # of the 16 MB of VMEM that a kernel gets by default: the compiler needs some for itself


class Affine(NamedTuple):
    """What a norm does to each channel of x, (features,) in float32: ((x - pilot) - offset)·multiplier + bias.

    The mean is pilot + offset, unevaluated as in `jbn.Moments`, so that the product keeps digits that x and it share.
    """

    pilot: Array
    offset: Array
    multiplier: Array
    bias: Array


class Tile(NamedTuple):
    """What one step of the grid computes: rows × columns of y, over steps of so many channels of x."""

    rows: int
    columns: int
    depth: int


def choose_tile(on: str, x: Any, out: int) -> Tile:
    """Return a tile for "tpu" or "gpu": on both all columns of y in one, as far as they fit, so that x is read once.

    Args:
        on: "tpu" or "gpu".
        x: shape and dtype, (rows, in).
        out: the number of columns of y.
    """
    rows, depth = x.shape
    size = jnp.dtype(x.dtype).itemsize
    if on == "gpu":  # the accumulator lies in registers: 128 × 256 in float32 is half of those of a core
        columns = max(n for n in (16, 32, 64, 128, 512 // size) if out % n == 0 or n == 16)
        return Tile(128, columns, max(n for n in (16, 32, 64) if depth % n == 0 or n == 16))
    weights = 2 * depth * out * size
    one_row = 2 * (depth + out) * size + 4 * (depth + 3 * out)  # two buffers of x and y; z, product, y - k, its square
    fits = max(8, (_TPU_BYTES - weights) // one_row)
    return Tile(min(1024, 2 ** (fits.bit_length() - 1), -(-rows // 8) * 8), out, depth)


def sweeps(tile: Tile, out: int) -> int:
    """Return how often the kernel reads x: once for each tile of columns."""
    return -(-out // tile.columns)


def normalized_matmul(
    x: Array, norm: Affine, weights: Array, pilot: Array, *, on: str, tile: Tile | None = None, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Return y = relu(norm(x)) @ weights, Σ(y - k) and Σ(y - k)² over the rows.

    The sums are those of y as it is rounded to its dtype: that is what the next norm reads, so that its output has the
    mean 0 and the variance 1, and its derivative, which makes y - μ again, sums to 0.

    Args:
        x: (rows, in), float32 or bfloat16.
        norm: of the channels of x.
        weights: (in, out), in the dtype of x, which y has too; products are added in float32.
        pilot: k, (out,), in float32.
        on: "tpu" or "gpu": the language of the compiler that gets it.
        tile: by default that of `choose_tile`.
        interpret: whether to run on the device at hand, by XLA and slowly.
    """
    (rows, depth), out = x.shape, weights.shape[1]
    tile = tile or choose_tile(on, x, out)
    if on == "gpu" and (out % tile.columns or depth % tile.depth):
        raise ValueError(
            f"weights has shape {weights.shape}, not multiples of the tile's {tile.depth} × {tile.columns}; on gpu pad "
            "them with zeros, or pass a tile that divides them."
        )
    steps = -(-rows // tile.rows)
    y, sums = pl.pallas_call(
        partial(_masked if on == "gpu" else _whole, rows, tile),
        grid=(steps, -(-out // tile.columns)),
        in_specs=[
            pl.BlockSpec((tile.rows, depth), lambda i, j: (i, 0)),
            pl.BlockSpec((4, depth), lambda i, j: (0, 0)),
            pl.BlockSpec((depth, tile.columns), lambda i, j: (0, j)),
            pl.BlockSpec((1, tile.columns), lambda i, j: (0, j)),
        ],
        out_specs=[
            pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j)),
            pl.BlockSpec((1, 2, tile.columns), lambda i, j: (i, 0, j)),
        ],
        out_shape=[jax.ShapeDtypeStruct((rows, out), x.dtype), jax.ShapeDtypeStruct((steps, 2, out), WIDE)],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3) if on == "gpu" else None,
        interpret=interpret,
    )(x, jnp.stack(norm), weights, pilot[None])
    # A row of sums for each tile: tiles need no order then, and the sum of a few hundred numbers adds no error.
    first, second = sums.sum(0)
    return y, first, second


def _normalize(x: Array, norm: Any, channels: Any) -> Array:
    """Return relu(norm(x)) in the dtype of x, as the product of the plain program reads it."""
    pilot, offset, multiplier, bias = (norm[i : i + 1, channels] for i in range(4))
    z = ((x.astype(WIDE) - pilot) - offset) * multiplier + bias
    return jnp.maximum(z, 0).astype(x.dtype)


def _multiply(z: Array, weights: Array) -> Array:
    exact = lax.Precision.HIGHEST if z.dtype == WIDE else None
    return jnp.dot(z, weights, precision=exact, preferred_element_type=WIDE)


def _sum(y: Array, pilot: Array, valid: Array) -> tuple[Array, Array]:
    # What lies below the last row of x is no number, perhaps: it is chosen away, not multiplied by 0.
    c = jnp.where(valid, y.astype(WIDE) - pilot, 0)
    return c.sum(0), (c * c).sum(0)


def _valid(rows: int, tile: Tile) -> Array:
    return pl.program_id(0) * tile.rows + lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0) < rows


def _whole(rows: int, tile: Tile, x: Any, norm: Any, weights: Any, pilot: Any, y: Any, sums: Any) -> None:
    """Compute one tile on a TPU: Mosaic brings all of its operands into VMEM."""
    product = _multiply(_normalize(x[...], norm, slice(None)), weights[...]).astype(y.dtype)
    y[...] = product
    first, second = _sum(product, pilot[...], _valid(rows, tile))
    sums[0, 0, :], sums[0, 1, :] = first, second


def _masked(rows: int, tile: Tile, x: Any, norm: Any, weights: Any, pilot: Any, y: Any, sums: Any) -> None:
    """Compute one tile on a GPU: Triton loads what the loop asks for, and must not reach below the last row."""
    valid = _valid(rows, tile)

    def add(step: Array, total: Array) -> Array:
        here = pl.ds(step * tile.depth, tile.depth)
        part = triton.load(x.at[:, here], mask=jnp.broadcast_to(valid, (tile.rows, tile.depth)), other=0)
        return total + _multiply(_normalize(part, norm, here), weights[here, :])

    total = jnp.zeros((tile.rows, tile.columns), WIDE)
    product = lax.fori_loop(0, x.shape[1] // tile.depth, add, total).astype(y.dtype)
    triton.store(y, product, mask=jnp.broadcast_to(valid, product.shape))
    sums[0, 0, :], sums[0, 1, :] = _sum(product, pilot[...], valid)
