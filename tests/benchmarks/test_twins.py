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
from benchmarks.twins import Separable, Truth, shapes
from tests.support.nets import gap

IMAGES = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)


def test_a_twin_evaluates_as_a_model_of_haiku(monkeypatch):
    stages = ((8, 1), (16, 2))
    features, strides = zip(*stages, strict=True)
    monkeypatch.setattr(hk.nets, "MobileNetV1", partial(hk.nets.MobileNetV1, strides, features, name="mobile_net_v1"))
    source = READERS["haiku"]("MobileNetV1", IMAGES)
    model = Separable(Truth("haiku", source.norms), stages)
    like, x = shapes(model)
    proposal = jbn.propose_names(source.tree, "haiku", "linen", x, like=like, call=model.apply)
    assert {match.source: match.target for match in proposal.certain} == model.truth.names
    assert source.norms.keys() < model.truth.names.keys()
    variables = jbn.convert(source.tree, "haiku", "linen", like=like, names=proposal.names)
    assert gap(jax.jit(model.apply)(variables, IMAGES), source.logits(IMAGES)) < 1e-5
