"""The shapes that batch normalization meets in real models; measurements and tests share them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Spec(NamedTuple):
    """What one normalization gets: a batch of examples, features last."""

    model: str
    example: tuple[int, ...]  # positions and features
    times: int = 1  # how many norms of the model have it

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.model} {'×'.join(map(str, self.example))}"

    def images(self, batch: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of a batch."""
        return jax.ShapeDtypeStruct((batch, *self.example), jnp.dtype(dtype))


# Version 1.5, at 224×224: its 53 norms, by what they get.
RESNET50 = tuple(
    Spec("ResNet-50", (size, size, features), times)
    for size, features, times in (
        (112, 64, 1), (56, 64, 6), (56, 256, 4), (56, 128, 1), (28, 128, 7), (28, 512, 5), (28, 256, 1), (14, 256, 11),
        (14, 1024, 7), (14, 512, 1), (7, 512, 5), (7, 2048, 4),
    )
)  # fmt: skip

# A few of the norms of other models: wide and early ones, and the smallest.
OTHERS = (
    *(
        Spec("EfficientNet-B0", (size, size, features))
        for size, features in ((112, 96), (56, 144), (14, 672), (7, 1152))
    ),
    *(Spec("U-Net", (size, size, features)) for size, features in ((128, 32), (64, 64), (16, 256))),
    *(Spec("MLP", (features,)) for features in (512, 4096)),
    Spec("1-D convolution", (1024, 64)),
    Spec("3-D convolution", (8, 28, 28, 64)),
)

# Examples in a batch: on a CPU as many as take a fraction of a second, on an accelerator as many as are trained with.
BATCH, LARGE = 32, 256
# Models whose examples are one row, or few.
BATCHES = {"MLP": 4096}


def batch_of(spec: Spec, batch: int) -> int:
    """Return how many examples a batch of a model has."""
    return BATCHES.get(spec.model, batch)
