"""Changing the import line: the same variables, outputs, gradients and statistics as ``flax.linen.BatchNorm``."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from tests.support import oracle
from tests.support.cases import CASES, Case, by_flax, by_flax_nnx, by_linen, by_nnx, data

MINE, THEIRS = jbn.linen.BatchNorm, nn.BatchNorm
# Masked positions, which are 0 here, are left out; so is a mask of whole features, which Flax turns into NaN.
KNOWN = [case for case in CASES if case.mask != (1, 4) and not case.unbiased and case.affine is None]
# Flax's NNX layer has one feature axis, and does its arithmetic in the dtype of y.
OF_NNX = [case for case in KNOWN if isinstance(case.axis, int) and case.dtype == "float32"]
over = pytest.mark.parametrize(
    ("case", "ours", "flax_s"),
    [*((case, by_linen, by_flax) for case in KNOWN), *((case, by_nnx, by_flax_nnx) for case in OF_NNX)],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)


@pytest.fixture(autouse=True)
def _settings(request):
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and case.dtype == "float64":
        request.getfixturevalue("x64")
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_constructor_is_flax_s_with_new_fields_last():
    mine, theirs = (
        [p for p in inspect.signature(cls).parameters.values() if p.name not in ("parent", "name")]
        for cls in (MINE, THEIRS)
    )
    assert [(p.name, p.default) for p in mine[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    new = "activation group_size unbiased normalize_by sow_moments"
    assert " ".join(p.name for p in mine[len(theirs) :]) == new


def test_the_call_is_flax_s_with_new_arguments_last():
    mine, theirs = (list(inspect.signature(cls.__call__).parameters.values()) for cls in (MINE, THEIRS))
    assert [(p.name, p.kind, p.default) for p in mine[:4]] == [(p.name, p.kind, p.default) for p in theirs]
    assert [p.name for p in mine[4:]] == ["residual", "scale", "bias"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False},
        {"use_bias": False},
        {"axis": (1, 2)},
        {"axis": 0},
        {"param_dtype": jnp.bfloat16},
        {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.uniform()},
        {"use_fast_variance": False, "dtype": jnp.bfloat16},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_the_variables_are_flax_s(options):
    x = jnp.ones((2, 3, 4))
    mine, theirs = (cls(False, **options).init(jax.random.key(3), x) for cls in (MINE, THEIRS))
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    assert [list(v) for v in mine.values()] == [list(v) for v in theirs.values()]
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_are_never_narrow(dtype):
    """Flax makes them of 16 bits where ``force_float32_reductions`` is off, and they stall."""
    layer, x = MINE(False, param_dtype=dtype, force_float32_reductions=False), jnp.full((8, 3), 5.0).at[0].set(6.0)
    variables = layer.init(jax.random.key(0), x)
    assert variables["params"]["scale"].dtype == dtype
    assert variables["batch_stats"]["mean"].dtype == variables["batch_stats"]["var"].dtype == jnp.float32
    narrow = {**variables, "batch_stats": jax.tree.map(lambda v: v.astype(dtype), variables["batch_stats"])}
    with pytest.raises(ValueError, match=r"state.mean has dtype .* in which running statistics stall"):
        layer.apply(narrow, x, mutable=["batch_stats"])
    MINE(True).apply(narrow, x)


@pytest.mark.parametrize("shape", [(3,), (6,), (5, 3), (6, 5), (5, 1)])
def test_a_mask_of_lower_rank_is_refused(shape):
    """It would be broadcast from the right, where the features are: with as many examples as features, silently."""
    x = jax.random.normal(jax.random.key(0), (6, 5, 3))
    with pytest.raises(ValueError, match=r"mask has shape .* x has shape \(6, 5, 3\); expected the same rank") as error:
        MINE(False).init(jax.random.key(0), x, mask=np.ones(shape))
    assert ("mask[..., None" in str(error.value)) == (shape in [(6,), (6, 5)])


def test_the_output_of_initialization_is_flax_s():
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 1
    for evaluate in (True, False):
        mine, theirs = (cls(evaluate).init_with_output(jax.random.key(3), x)[0] for cls in (MINE, THEIRS))
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def close(mine, theirs, case: Case, size: float, valid=True, dtype=None):
    bound = oracle.tolerance(dtype or case.dtype, case.rows, 4 * size)
    np.testing.assert_allclose(
        np.where(valid, oracle.wide(mine), 0), np.where(valid, oracle.wide(theirs), 0), rtol=0, atol=bound
    )


def precision(case: Case, train: bool) -> str:
    """Evaluating float64 x, Flax takes the root of σ² + ε in the float32 of the state, and so has no more digits."""
    return "float32" if case.dtype == "float64" and not train else case.dtype


@over
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_outputs_and_statistics(case, ours, flax_s, train):
    d = data(case)
    valid = np.ones(case.shape, bool) if d.mask is None else np.broadcast_to(d.mask, case.shape)
    (y, new), (z, old) = ours(case, d, train), flax_s(case, d, train, dtype=jnp.dtype(case.dtype))
    close(y, z, case, np.abs(oracle.wide(y)).max(), valid, precision(case, train))
    for name in ("mean", "var"):
        # Flax's float64 x makes the state float64, and E[x²] - E[x]² loses some ulps of E[x²].
        np.testing.assert_allclose(oracle.wide(new[name]), oracle.wide(old[name]), rtol=1e-5, atol=1e-5)


@over
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gradients(case, ours, flax_s, train):
    d = data(case)
    valid = np.ones(case.shape, bool) if d.mask is None else np.broadcast_to(d.mask, case.shape)
    g = np.where(valid, np.random.default_rng(1).standard_normal(case.shape), 0).astype(jnp.dtype(case.dtype))
    names = [name for name in ("x", "scale", "bias", "residual") if getattr(d, name) is not None]

    def pull(door, **options):
        def f(*values):
            y = door(case, d._replace(**dict(zip(names, values, strict=True))), train, **options)[0]
            return y.astype(case.dtype)

        return jax.vjp(f, *(getattr(d, name) for name in names))[1](g)

    mine, theirs = pull(ours), pull(flax_s, dtype=jnp.dtype(case.dtype), use_fast_variance=False)
    size = max(np.abs(oracle.wide(a)).max() for a in theirs)
    for name, a, b in zip(names, mine, theirs, strict=True):
        assert a.dtype == b.dtype
        close(a, b, case, size, valid if name in ("x", "residual") else True, precision(case, train))


def test_a_flax_checkpoint_goes_on_unchanged():
    """A model trained with Flax's layer continues with ours, and the other way around."""

    class Model(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(self.norm(use_running_average=not train, name="norm")(nn.Dense(8)(x)))
            return nn.Dense(1)(x)

    x = jax.random.normal(jax.random.key(0), (32, 4))
    variables = Model(THEIRS).init(jax.random.key(1), x, True)

    def loss(params, stats, model):
        y, new = model.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return ((y - x.sum(1, keepdims=True)) ** 2).mean(), new["batch_stats"]

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)

    def train(variables, models):
        params, stats = variables["params"], variables["batch_stats"]
        for model in models:
            grads, stats = step(params, stats, model)
            params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        return Model(MINE).apply({"params": params, "batch_stats": stats}, x, False), stats

    theirs, mine = Model(THEIRS), Model(MINE)
    want, stats = train(variables, [theirs] * 20)
    for order in ([mine] * 20, [theirs] * 10 + [mine] * 10, [mine] * 10 + [theirs] * 10):
        got, found = train(variables, order)
        np.testing.assert_allclose(got, want, atol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, stats)


def test_a_mask_may_be_of_any_dtype_that_flax_takes():
    """Flax takes numbers; the migration must not break there."""
    x = jax.random.normal(jax.random.key(0), (6, 5, 3))
    masks = [np.array([1, 1, 0, 1, 0])[None, :, None], np.ones((6, 5, 1)), [[[True]], [[False]]] * 3]
    for mask in masks:
        mine, theirs = (
            cls(False).apply(cls(False).init(jax.random.key(0), x), x, mask=mask, mutable=["batch_stats"])
            for cls in (MINE, THEIRS)
        )
        valid = np.broadcast_to(np.asarray(mask, bool), x.shape)
        np.testing.assert_allclose(np.where(valid, mine[0], 0), np.where(valid, theirs[0], 0), atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine[1], theirs[1])


@pytest.mark.parametrize(("name", "value"), [("mask", "all"), ("mask", object()), ("x", None), ("x", "rows")])
def test_what_is_no_array_is_refused_by_name(name, value):
    given = {"x": np.ones((6, 3), np.float32), "mask": None} | {name: value}
    with pytest.raises(
        TypeError, match=f"^{name} is of type {type(value).__name__}, which JAX does not read as numbers"
    ):
        MINE(False).init(jax.random.key(0), given["x"], mask=given["mask"])
