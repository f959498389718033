"""Models of Linen that are folded inside of ``replace``, and called inside of it or after it."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jbn.linen
from tests.support.fold_cases import numbers


def test_what_is_folded_inside_of_replace_stays_so_after_it():
    x = jax.random.normal(jax.random.key(0), (16, 5))
    for norm in (nn.BatchNorm, jbn.linen.BatchNorm):
        model = nn.Sequential([nn.Dense(6), norm(True), nn.Dense(3)])
        variables = numbers(model.init(jax.random.key(1), x))
        plain = model.apply(variables, x)
        with jbn.linen.replace(activation=nn.relu, epsilon=0.5):
            want = model.apply(variables, x)
            apply, folded, _ = jbn.linen.fold(model, variables, x)
            np.testing.assert_allclose(apply(folded, x), want, atol=1e-5)
        np.testing.assert_allclose(apply(folded, x), want, atol=1e-5)
        apply, folded, _ = jbn.linen.fold(model, variables, x)
        with jbn.linen.replace(activation=nn.relu, epsilon=0.5):
            np.testing.assert_allclose(apply(folded, x), plain, atol=1e-5)


def test_a_kept_norm_that_has_left_replace_is_refused():
    x = jax.random.normal(jax.random.key(0), (16, 5))
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.BatchNorm(True)])
    variables = model.init(jax.random.key(1), x)
    with jbn.linen.replace(activation=nn.relu):
        apply, folded, folds = jbn.linen.fold(model, variables, x)
        assert folds.kept == ("layers_2",)
        np.testing.assert_allclose(apply(folded, x), model.apply(variables, x))
    with pytest.raises(ValueError, match="layers_2 is not folded, and was jbn's inside of"):
        apply(folded, x)
