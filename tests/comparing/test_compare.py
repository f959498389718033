"""compare: the first layer at which two models part is found, explained, and told from rounding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.comparing import explain, pairs
from jbn.comparing.record import Call

TRAINING = {"train": True, "mutable": ["batch_stats"]}


class Net(nn.Module):
    """Convolutions, norms and an activation that is no layer; the second convolution has a stride of 2."""

    activations: tuple = (nn.relu, nn.relu, nn.relu)
    epsilon: float = 1e-5
    padding: object = "SAME"
    dtype: object = None
    wide: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        for i, activation in enumerate(self.activations):
            strides, padding = (2, self.padding) if i == 1 else (1, "SAME")
            x = nn.Conv(self.wide, (3, 3), strides=strides, padding=padding, use_bias=False, dtype=self.dtype)(x)
            x = activation(nn.BatchNorm(not train, epsilon=self.epsilon, dtype=self.dtype)(x))
        return nn.Dense(5, dtype=self.dtype)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (4, 16, 16, 3))


@pytest.fixture(scope="module")
def variables(x):
    return randomize(Net().init(jax.random.key(1), x))


@pytest.fixture(scope="module")
def recorded(x, variables):
    return jbn.linen.record(Net(), variables, x)


def randomize(variables):
    rng = np.random.default_rng(0)
    shift = {"batch_stats": (-0.5, 0.5), "params": (0, 0)}
    return {
        name: jax.tree.map(lambda leaf, span=shift[name]: leaf + rng.uniform(*span, leaf.shape).astype("f"), collection)
        for name, collection in variables.items()
    }


def test_equal_models_part_nowhere(recorded):
    found = jbn.compare(recorded, recorded)
    assert found.first is None
    assert [match.paths for match in found.matches] == [(path, path) for path in recorded]
    assert not any(found.alone)
    assert "part nowhere" in str(found)


def test_a_missing_relu(x, variables, recorded):
    other = Net(activations=(nn.relu, lambda x: x, nn.relu))
    a, b = recorded, jbn.linen.record(other, variables, x)
    found = jbn.compare(a, b)
    assert found.first.paths == ("Conv_2", "Conv_2")
    assert "part before Conv_2" in found.message
    assert "a equals relu(b)" in found.message
    assert "b equals relu(a)" in jbn.compare(b, a).message


def test_another_input(x, variables, recorded):
    found = jbn.compare(recorded, jbn.linen.record(Net(), variables, x + 1))
    assert found.first.paths[0] == "Conv_0"
    assert "from the first layer on: is the input the same?: b = a + t" in found.message


def test_a_tolerance_that_is_given(x, variables, recorded):
    other = jbn.linen.record(Net(epsilon=1e-3), variables, x)
    assert jbn.compare(recorded, other, tolerance=2**-8).first is None
    assert jbn.compare(recorded, other, tolerance=2**-16).first.paths[0] == "BatchNorm_0"


def test_complex_arrays_differ_in_either_part():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((8, 6)) + 1j * rng.standard_normal((8, 6))).astype(np.complex64)
    assert jbn.compare({"fft": x}, {"fft": x}).first is None
    for other in (x.conj(), x.real + 0j, 1j * x.imag):
        assert jbn.compare({"fft": x}, {"fft": other.astype(np.complex64)}).first is not None


def test_another_activation(x, variables, recorded):
    found = jbn.compare(recorded, jbn.linen.record(Net((nn.gelu, nn.relu, nn.relu)), variables, x))
    assert found.first.paths[0] == "Conv_1"
    assert "of what is the same in both, a is relu and b gelu (approximate)" in found.message


def test_padding_of_a_stride(x, variables, recorded):
    found = jbn.compare(recorded, jbn.linen.record(Net(padding=((1, 1), (1, 1))), variables, x))
    assert found.first.paths[0] == "Conv_1"
    assert "part at Conv_1 (a) and Conv_1 (b), whose inputs agree" in found.message
    assert "windows that begin elsewhere" in found.message


def test_padding_of_another_size(x, variables, recorded):
    found = jbn.compare(recorded, jbn.linen.record(Net(padding="VALID"), variables, x))
    assert found.first.paths[0] == "Conv_1"
    assert "other shapes, [(4, 8, 8, 8)] and [(4, 7, 7, 8)]" in found.message


def test_padding_by_other_values(x):
    layer = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3), padding="CIRCULAR")
    variables = layer[0].init(jax.random.key(0), x)
    found = jbn.compare(*(jbn.linen.record(each, variables, x) for each in layer))
    assert "equal but at the border, in so many lines from both ends: 1 + 1 along axis 1, 1 + 1 along" in found.message


def test_another_epsilon(x, variables, recorded):
    small = jbn.linen.record(Net(epsilon=1e-4), variables, x)
    assert jbn.compare(recorded, small).first.paths[0] == "BatchNorm_0"
    found = jbn.compare(recorded, jbn.linen.record(Net(epsilon=1e-3), variables, x))
    assert found.first.paths[0] == "BatchNorm_0"
    assert found.first.input_error == 0
    assert "another epsilon" in found.message


def test_training_beside_evaluation(x, variables, recorded):
    found = jbn.compare(recorded, jbn.linen.record(Net(), variables, x, **TRAINING))
    assert found.first.paths[0] == "BatchNorm_0"
    assert "other statistics (running or of the batch)" in found.message


def test_swapped_weights(x, variables, recorded):
    params = dict(variables["params"])
    swapped = {**params, "BatchNorm_1": params["BatchNorm_2"], "BatchNorm_2": params["BatchNorm_1"]}
    swapped |= {"Conv_1": params["Conv_2"], "Conv_2": params["Conv_1"]}
    found = jbn.compare(recorded, jbn.linen.record(Net(), {**variables, "params": swapped}, x))
    assert found.first.paths == ("Conv_1", "Conv_1")
    assert "nothing simple" in found.message
    assert [match.parts for match in found.matches] == [False, False] + [True] * 6, found


def test_nan_in_one_model(x, variables, recorded):
    broken = jax.tree.map(jnp.asarray, variables)
    broken["params"]["BatchNorm_1"]["scale"] = broken["params"]["BatchNorm_1"]["scale"].at[3].set(jnp.nan)
    found = jbn.compare(recorded, jbn.linen.record(Net(), broken, x))
    assert found.first.paths[0] == "BatchNorm_1"
    assert "of 2048 values 0 in a and 256 in b are NaN or inf" in found.message


def test_nan_in_both_models_is_no_difference_and_another_infinity_is(variables):
    x = jnp.full((4, 16, 16, 3), jnp.nan)
    a, b = (jbn.linen.record(Net(), variables, x) for _ in range(2))
    found = jbn.compare(a, b)
    assert found.first is None
    assert "are NaN or inf in both, and say nothing" in found.message
    x = np.full((4, 3), np.inf)
    assert all(jbn.compare({"layer": x}, {"layer": y}).first for y in (-x, np.full_like(x, np.nan)))


@pytest.mark.parametrize("call", [{}, TRAINING], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deep_network_is_not_blamed_for_rounding(x64, dtype, call):
    deep = (nn.relu,) * 16
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3), jnp.float32)
    variables = randomize(Net(deep).init(jax.random.key(1), x))
    wider = "float64" if dtype == "float32" else "float32"
    narrow, wide = (jbn.linen.record(Net(deep, dtype=dtype), variables, x, **call) for dtype in (dtype, wider))
    found = jbn.compare(wide, narrow)
    assert found.first is None, found
    assert len(found.matches) == 34
    # It is not so tolerant that it would see nothing.
    missing = Net((*deep[:5], lambda x: x, *deep[6:]), dtype=dtype)
    found = jbn.compare(wide, jbn.linen.record(missing, variables, x, **call))
    assert found.first.paths == ("Conv_6", "Conv_6")
    assert "relu" in found.message


@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm])
def test_digits_that_a_far_mean_has_lost_are_rounding_and_those_that_a_norm_loses_are_not(x64, norm):
    model = nn.Sequential([nn.Dense(8), nn.Dense(8), norm(False), nn.Dense(8)])
    x = jax.random.normal(jax.random.key(0), (64, 4), jnp.float32)
    variables = model.init(jax.random.key(1), x)
    variables["params"]["layers_1"]["bias"] += 1e4
    calls = []
    for dtype in (jnp.float32, jnp.float64):
        cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), variables)
        calls.append(jbn.linen.record(model, cast, x.astype(dtype), mutable=["batch_stats"]))
    found = jbn.compare(*calls)
    assert found.matches[2].error > 1e-4
    if norm is jbn.linen.BatchNorm:
        assert found.first is None, found
    else:  # its variance is a difference of squares
        assert found.first.paths[0] == "layers_2"


def test_replace_parts_nowhere(x, variables):
    theirs = jbn.linen.record(Net(), variables, x, **TRAINING)
    with jbn.linen.replace():
        ours = jbn.linen.record(Net(), variables, x, **TRAINING)
    found = jbn.compare(theirs, ours)
    assert found.first is None, found
    assert [match.paths for match in found.matches] == [(path, path) for path in theirs]


def test_fold_meets_again(x, variables, recorded):
    apply, folded, folds = jbn.linen.fold(Net(), variables, x)
    assert len(folds.pairs) == 3
    found = jbn.compare(recorded, jbn.linen.record(apply, folded, x))
    assert found.first is None, found
    assert "3 of them meet again" in found.message


class Chain(nn.Module):
    """A dense layer between two norms, which both go into it; with ``fork`` something else takes it too."""

    fork: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="dense")(nn.BatchNorm(True, name="before")(nn.relu(x)))
        y = nn.BatchNorm(True, name="after")(x)
        return nn.Dense(3, name="head")(nn.relu(y)) + (nn.Dense(3, name="fork")(x) if self.fork else 0)


def test_a_layer_that_does_the_work_of_both_its_neighbours_meets_again():
    x = jax.random.normal(jax.random.key(0), (16, 5))
    variables = randomize(Chain().init(jax.random.key(1), x))
    a, (apply, folded, folds) = jbn.linen.record(Chain(), variables, x), jbn.linen.fold(Chain(), variables, x)
    assert len(folds.pairs) == 2
    found = jbn.compare(a, jbn.linen.record(apply, folded, x))
    assert found.first is None, found
    assert "2 of them meet again" in found.message


def test_a_layer_that_is_made_good_on_one_way_alone_parts():
    x = jax.random.normal(jax.random.key(0), (16, 5))
    variables = randomize(Chain(fork=True).init(jax.random.key(1), x))
    other = jax.tree.map(lambda leaf: leaf, variables)
    other["params"]["dense"]["bias"] += 1.0
    other["batch_stats"]["after"]["mean"] += 1.0
    found = jbn.compare(*(jbn.linen.record(Chain(fork=True), each, x) for each in (variables, other)))
    assert found.first.paths == ("dense", "dense"), found


class Residual(nn.Module):
    """A block whose norm adds the shortcut and activates, or functions after it."""

    fused: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(8, (3, 3), name="conv")(x)
        if self.fused:
            return jbn.linen.BatchNorm(True, activation=nn.relu, name="norm")(y, residual=x)
        return nn.relu(jbn.linen.BatchNorm(True, name="norm")(y) + x)


class Residuals(nn.Module):
    fused: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i in range(2):
            x = Residual(self.fused, name=f"block_{i}")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_what_ends_a_block_may_be_a_norm_or_functions_after_it(x):
    variables = randomize(Residuals(True).init(jax.random.key(1), x))
    other = jax.tree.map(lambda leaf: leaf, variables)
    other["params"]["head"]["kernel"] *= 2.0
    a = jbn.linen.record(Residuals(False), variables, x)
    for weights, paths in ((variables, None), (other, ("head", "head"))):
        b = jbn.linen.record(Residuals(True), weights, x)
        for found in (jbn.compare(a, b), jbn.compare(b, a)):
            assert (found.first and found.first.paths) == paths, found


def test_another_branch_does_not_say_that_an_activation_is_elsewhere():
    x, y, z = np.random.default_rng(0).standard_normal((3, 8, 6)).astype(np.float32)
    a, b = (
        {
            "norm": Call("BatchNorm", (x,), (out,)),
            "side": Call("Dense", (x,), (y,)),
            "head": Call("Dense", (out[:, :2] + y[:, :2],), (out @ z.T,)),
        }
        for out in (z, np.maximum(z, 0))
    )
    assert jbn.compare(a, b).first.paths == ("norm", "norm")


def test_a_fold_meets_again_where_arrays_are_rearranged_between_layer_and_norm():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.dense, self.norm, self.flat = torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), flat

        def forward(self, x):
            y = self.dense(x)
            return self.norm(y.flatten(0, 1)).reshape(y.shape) if self.flat else self.norm(y.mT).mT

    for flat in (False, True):
        net = Net(flat).eval()
        torch.nn.init.uniform_(net.norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(0))
        x = torch.randn((4, 7, 5), generator=torch.Generator().manual_seed(1))
        a, dense, norm = jbn.record(net, x), net.dense, net.norm
        params = {"scale": norm.weight, "bias": norm.bias}
        state = {"mean": norm.running_mean, "var": norm.running_var}
        kernel, bias = jbn.fold(params, state, dense.weight, dense.bias, layout="OI")
        dense.load_state_dict({"weight": torch.tensor(np.array(kernel)), "bias": torch.tensor(np.array(bias))})
        net.norm = torch.nn.Identity()
        found = jbn.compare(a, jbn.record(net, x))
        assert (found.first, found.matches[0].parts) == (None, True), found


def test_a_copied_model_of_nnx_stays_as_it_is():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs)
    )
    before = jax.tree.leaves(nnx.state(model))
    x = jax.random.normal(jax.random.key(0), (16, 4))
    training = jbn.nnx.record(model, x)
    assert all(
        np.array_equal(*map(jax.random.key_data, pair))
        if jnp.issubdtype(pair[0].dtype, jax.dtypes.prng_key)
        else np.array_equal(*pair)
        for pair in zip(before, jax.tree.leaves(nnx.state(model)), strict=True)
    )
    assert list(training) == ["layers/0", "layers/1", "layers/3", ""]
    assert [type(layer) for layer in model.layers][:2] == [nnx.Linear, nnx.BatchNorm]
    model.eval()
    found = jbn.compare(training, jbn.nnx.record(model, x))
    assert found.first.paths == ("layers/1", "layers/1")


def test_linen_beside_nnx(x):
    class Twin(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))

    twin = Twin(nnx.Rngs(0))
    arrays = jbn.convert(
        nnx.state(twin, (nnx.Param, nnx.BatchStat)), "nnx", "linen",
        names={"stem": "layers_0", "norm": "layers_1", "head": "layers_4"},
    )  # fmt: skip
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(True), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(5)])
    twin.eval()
    found = jbn.compare(jbn.nnx.record(twin, x), jbn.linen.record(model, arrays, x))
    assert found.first is None, found
    assert [match.paths for match in found.matches] == [
        ("stem", "layers_0"), ("norm", "layers_1"), ("head", "layers_4"), ("", ""),
    ]  # fmt: skip


def test_layers_without_common_names_are_paired_by_their_values():
    """One has a layer more, and comes to two branches in the other order."""
    p, q, r, s = np.random.default_rng(0).standard_normal((4, 8, 3)).astype(np.float32)
    found = jbn.compare({"p": p, "q": q, "r": r}, {"0": s, "1": p, "2": r, "3": q})
    assert [match.paths for match in found.matches] == [("p", "1"), ("q", "3"), ("r", "2")]
    assert (found.first, found.alone) == (None, ((), ("0",)))


def test_another_order_of_the_channels():
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    assert "in another order of the channels" in jbn.compare({"flat": x}, {"flat": x[:, ::-1]}).message
    assert "the same values in another order" in jbn.compare({"flat": x}, {"flat": x[::-1, ::-1]}).message


def test_a_branch_that_parts_in_another_order_is_paired_by_its_names():
    p, q, r, s = np.random.default_rng(0).standard_normal((4, 8, 3)).astype(np.float32)
    found = jbn.compare({"p": p, "q": q, "r": r}, {"p": p, "r": r, "q": s})
    assert found.first.paths == ("q", "q")


def test_a_number_that_models_return_may_differ(x):
    found = jbn.compare({"act": np.ones(3), "loss": np.float32(1)}, {"act": np.ones(3), "loss": np.float32(2)})
    assert found.first.paths == ("loss", "loss")


def test_the_report_fits_a_terminal():
    paths = [f"backbone/stage_{i}/Bottleneck_0/BatchNorm_{i}" for i in range(12)]
    a = {path: np.arange(8.0) * i for i, path in enumerate(paths, 1)}
    b = {"b" if i == 1 else path: value for i, (path, value) in enumerate({**a, paths[5]: -a[paths[5]]}.items())}
    lines = repr(jbn.compare(a, b)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[6].split()[:2] == ["..leneck_0/BatchNorm_5"] * 2
    assert lines[2].split()[1] == "b"
    assert paths[5] in " ".join(lines[-4:])


def test_arrays_are_looked_at_once_for_all_pairs_and_searched_in_a_sample(monkeypatch):
    seen, sizes = [], []
    monkeypatch.setattr(pairs, "sample", lambda x, sample=pairs.sample: seen.append(x) or sample(x))
    monkeypatch.setattr(explain, "_ACTIVATIONS", {"tanh": lambda x: sizes.append(x.size) or np.tanh(x)})
    rng = np.random.default_rng(0)
    for n in (10, 20):
        a = {str(i): rng.standard_normal((50, 50, 8)) for i in range(n)}
        jbn.compare(a, {**a, "4": rng.standard_normal((50, 50, 8))})
    assert len(seen) <= 30 * 4
    assert sizes
    assert max(sizes) < 50 * 50 * 8
