"""A twin computes what its model computes: a small copy of what benchmarks.zoo does with whole ones."""

from functools import partial

import jax
import numpy as np
import pytest

pytest.importorskip("haiku")
pytest.importorskip("flax.linen")

import haiku as hk

import jbn
from benchmarks.sources import READERS
from benchmarks.twins import ResNet, Truth, shapes
from tests.support.nets import gap

IMAGES = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(np.float32)


def test_a_twin_evaluates_as_a_model_of_haiku(monkeypatch):
    small = partial(
        hk.nets.ResNet,
        (1, 1, 2, 1),
        channels_per_group=(16, 32, 64, 128),
        initial_conv_config={"output_channels": 4},
        name="res_net50",
    )
    monkeypatch.setattr(hk.nets, "ResNet50", small)
    source = READERS["haiku"]("ResNet50", IMAGES)
    model = ResNet(Truth("haiku", source.norms), (1, 1, 2, 1), 4)
    like, x = shapes(model)
    proposal = jbn.propose_names(source.tree, "haiku", "linen", x, like=like, call=model.apply)
    assert source.norms.keys() < model.truth.names.keys()
    assert all(match.target == model.truth.names[match.source] for match in proposal.certain)
    variables = jbn.convert(source.tree, "haiku", "linen", like=like, names=model.truth.names.get)
    assert gap(jax.jit(model.apply)(variables, IMAGES), source.logits(IMAGES)) < 1e-5
