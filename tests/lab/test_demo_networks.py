"""The digits, and what the networks of the demo are made of."""

import json
from dataclasses import asdict

import jax
import numpy as np
import pytest
from rich.console import Console

from jbn.lab import demo
from jbn.lab.data import digits
from jbn.lab.data.images import DATA, enlarge
from jbn.lab.demo import plan_of
from jbn.lab.devices import mesh_of
from jbn.lab.errors import OptionError
from jbn.lab.models import NETWORKS
from jbn.lab.options import DEMO_RATES, DemoOptions, DemoPlace
from jbn.lab.report import finding
from jbn.lab.run import directory
from jbn.lab.step import Recipe, evaluate, initial_state, update
from tests.lab.test_train import one_batch
from tests.support import oracle


@pytest.fixture(scope="module")
def data():
    return digits(0)


def test_split_is_stratified_and_disjoint(data):
    assert [part.images.shape for part in data] == [(1077, 8, 8, 1), (360, 8, 8, 1), (360, 8, 8, 1)]
    for part in data:
        assert np.bincount(part.labels).min() / len(part.labels) > 0.08
    rows = np.concatenate([part.images for part in data]).reshape(1797, -1)
    assert len(np.unique(rows, axis=0)) == 1797
    assert not np.array_equal(digits(1).test.labels, data.test.labels)


def test_enlarged_digits_are_64x64x3(data):
    large = enlarge(data.validation)
    assert large.images.shape == (360, 64, 64, 3)
    assert large.images.dtype == np.float32
    assert np.all(large.images[..., :1] == large.images)


def recipe_of(name, batch_norm, seed=0):
    plan = plan_of(DemoOptions(seed=seed), name, batch_norm)
    return Recipe(plan, NETWORKS[name](batch_norm=batch_norm), per_epoch=8)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_networks_differ_in_batch_norm_alone(name):
    plain, normalized = (initial_state(recipe_of(name, batch_norm, seed=7), (8, 8, 1)) for batch_norm in (False, True))
    kernels = {layer: leaves["kernel"] for layer, leaves in plain.params.items()}
    assert plain.batch_stats == {}
    for layer, kernel in kernels.items():
        np.testing.assert_array_equal(kernel, normalized.params[layer]["kernel"])
    assert len(normalized.batch_stats) == len(kernels) - 1
    assert sum("bias" in leaves for layer, leaves in normalized.params.items() if layer in kernels) == 1


def test_a_step_is_plain_gradient_descent(data):
    recipe, batch = recipe_of("dense", True), one_batch(data.validation)

    def loss(params):
        variables = {"params": params, "batch_stats": start.batch_stats}
        logits, _ = recipe.network.apply(variables, batch.images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[np.arange(360), batch.labels].mean()

    start = initial_state(recipe, (8, 8, 1))
    expected = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, start.params, jax.grad(loss)(start.params))
    moved, measures = update(recipe, start, batch)
    assert measures.learning_rate == np.float32(0.1)
    assert moved.average is None
    for path, leaf in jax.tree.leaves_with_path(expected):
        arrived = dict(jax.tree.leaves_with_path(moved.params))[path]
        np.testing.assert_allclose(arrived, leaf, rtol=0, atol=oracle.tolerance("float32", 360, np.abs(leaf).max()))


def test_evaluation_uses_the_running_statistics(data):
    recipe, batch = recipe_of("dense", True), one_batch(data.training)
    state = initial_state(recipe, (8, 8, 1))
    for _ in range(20):
        before = state
        state, _ = update(recipe, before, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
    few = data.validation._replace(images=data.validation.images[:4], labels=data.validation.labels[:4])
    together = evaluate(recipe.network, state.variables, one_batch(few))[0]
    single = [few._replace(images=few.images[i : i + 1], labels=few.labels[i : i + 1]) for i in range(4)]
    alone = [evaluate(recipe.network, state.variables, one_batch(one))[0] for one in single]
    np.testing.assert_allclose(together, np.sum(alone), rtol=1e-5)
    moved = jax.tree.map(lambda statistic: statistic + 1, state.batch_stats)
    other = evaluate(recipe.network, state._replace(batch_stats=moved).variables, one_batch(few))[0]
    assert abs(other - together) > 4e-3


@pytest.mark.parametrize("name", DEMO_RATES["digits"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_network_of_the_demo_can_be_gone_on_with(name, batch_norm, tmp_path):
    plan = plan_of(DemoOptions(), name, batch_norm)
    directory.write_json(tmp_path / directory.OPTIONS, asdict(plan))
    assert directory.resume(DemoPlace(out=tmp_path), plan) == plan


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("results.json", "{", r"cannot read '.*results.json' \(JSONDecodeError"),
        ("results.json", "{}", r"cannot read '.*results.json' \(KeyError\('parameters'"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}', "'.*metrics.jsonl' does not hold step 2 any more"),
    ],
)
def test_what_is_missing_of_a_network_is_named(tmp_path, name, text, said):
    plan, out = plan_of(DemoOptions(steps=2), "dense", batch_norm=True), tmp_path / "dense-with-batch-norm"
    out.mkdir()
    (out / "results.json").write_text("{}")
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (out / name).write_text(text)
    with pytest.raises(OptionError, match=f"^{said}.*; remove '.*{out.name}' to train this network anew$"):
        demo._train(plan, DemoPlace(out=tmp_path), Console(quiet=True), mesh_of(1))


def test_the_dense_network_on_mnist_is_that_of_the_textbook(tmp_path):
    options = DemoOptions(data="mnist", model=("dense",), steps=2, batch_size=1078)
    demo.run(options, DemoPlace(out=tmp_path / "run"), Console(quiet=True))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == {"training": 3000, "validation": 1000, "test": 1000}
    weights = 784 * 128 + 128 * 64 + 64 * 10 + 10
    assert [network["parameters"] for network in results["networks"]] == [weights + 192, weights + 2 * 192]
    kept = json.loads((tmp_path / "run" / "dense-with-batch-norm" / "options.json").read_text())
    assert kept["data"] == "mnist"


def test_a_convolution_on_larger_images_has_a_smaller_rate():
    rates = {data: DemoOptions(data=data).rate("conv") for data in DATA}
    assert rates["mnist"] / rates["digits"] == pytest.approx((8 / 28) ** 2)
    assert enlarge(DATA["mnist"](0).test).images.shape == (1000, 64, 64, 3)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (((40, None), (60, None)), ("95% in validation after 40 steps", "never reached 95% in validation")),
        (((None, None), (45, 175)), ("90% in validation after 45 steps", "90% in validation after 175 steps")),
        (((None, None), (45, None)), ("90% in validation after 45 steps", "never reached 90% in validation")),
    ],
)
def test_the_sentence_tells_of_an_accuracy_that_was_reached(steps, said):
    networks = [
        {
            "model": "dense",
            "learning_rate": 0.1,
            "test_accuracy": 0.9,
            "steps_to_95_percent": to_95,
            "steps_to_90_percent": to_90,
        }
        for to_95, to_90 in zip(*steps, strict=True)
    ]
    sentence = finding(networks[1], networks[0])
    assert (
        sentence == f"dense at learning rate 0.1: with batch norm 90.0% on test, {said[0]}; without 90.0%, {said[1]}."
    )
