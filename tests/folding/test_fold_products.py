"""Layers of Flax that multiply in another way than layers of their class do: no norm is folded into them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx
from flax.linen.dtypes import promote_dtype

import jbn.linen
import jbn.nnx
from tests.support.fold_cases import ROWS, numbers


def clipped(a, b, *args, **kwargs):
    return jax.lax.dot_general(jnp.clip(a, -1, 1), b, *args, **kwargs)


def squared(x, *args, **kwargs):
    return jax.lax.conv_general_dilated(x * x, *args, **kwargs)


def doubled(x, *others, **kwargs):
    return promote_dtype(2 * x, *others, **kwargs)


OWN = {
    "none": {},
    "dot_general": {"dot_general": clipped},
    "dot_general_cls": {"dot_general_cls": lambda: clipped},
    "promote_dtype": {"promote_dtype": doubled},
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("own", OWN)
def test_products_that_round_or_clip_are_kept(own, norm_first):
    """Between the norm and the product stands what a product of its own does to x, or to what it returns."""
    x = numbers(jnp.zeros(ROWS))
    layers = nn.Dense(x.shape[-1], **OWN[own]), nn.BatchNorm(True)
    model = nn.Sequential(layers[::-1] if norm_first else layers)
    variables = numbers(model.init(jax.random.key(0), x))
    apply, folded, folds = jbn.linen.fold(model, variables, x)
    assert len(folds.pairs) == (own == "none")
    np.testing.assert_allclose(apply(folded, x), model.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["Linear", "Conv"])
def test_products_of_their_own_are_kept_in_nnx(layer):
    rngs = nnx.Rngs(0)
    own = {
        "Linear": lambda: nnx.Linear(3, 3, dot_general=clipped, rngs=rngs),
        "Conv": lambda: nnx.Conv(3, 3, (1, 1), conv_general_dilated=squared, rngs=rngs),
    }
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), own[layer]())
    nnx.update(model, numbers(nnx.state(model)))
    x = numbers(jnp.zeros((2, 4, 4, 3)))
    folded, folds = jbn.nnx.fold(model, x)
    assert not folds.pairs
    model.eval()
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-5, atol=1e-5)
