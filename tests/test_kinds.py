"""What is of a wrong kind is refused by its name, whichever argument of a public function it is given for."""

import inspect
import math
import re
import traceback
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
PARAMS, STATE = jbn.bn_init(3)
MOMENTS = jbn.moments(X)
TREE = {f"n.{name}": np.ones(3, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
LIKE = {
    "params": {"n": {"scale": np.ones(3, np.float32), "bias": np.ones(3, np.float32)}},
    "batch_stats": {"n": {"mean": np.ones(3, np.float32), "var": np.ones(3, np.float32)}},
}


class Net(nn.Module):
    """A dense layer and a norm of Linen."""

    train: bool = False
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        return self.norm(not self.train)(nn.Dense(3)(x))


class Twin(nnx.Module):
    """The same of NNX."""

    def __init__(self, norm=nnx.BatchNorm):
        self.dense, self.norm = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), norm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dense(x))


class Foreign:
    """A model that PyTorch might have made."""

    def named_modules(self):
        return []

    def __call__(self, x):
        return x


VARIABLES = Net().init(jax.random.key(0), X)
OPTIONS = {
    "momentum": 0.9, "epsilon": 1e-5, "dtype": None, "axis_name": None, "axis_index_groups": None, "activation": None,
    "group_size": None, "unbiased": False, "normalize_by": None, "sow_moments": False,
}  # fmt: skip
FIELDS = OPTIONS | {
    "use_running_average": False, "axis": -1, "param_dtype": jnp.float32, "use_bias": True, "use_scale": True,
    "use_fast_variance": True,
}  # fmt: skip
CALL = {
    "axis": -1, "epsilon": 1e-5, "mask": np.ones((8, 1), bool), "axis_name": None, "axis_index_groups": None,
    "group_size": 4, "activation": None, "residual": X, "dtype": None,
}  # fmt: skip
EXAMINED = {"epsilon": 1e-5, "momentum": 0.9, "updates": 3}
PASSES = {"upstream": "batch", "unbiased": False, "progress": None}
FLAGS = {"use_running_average": True, "update": False, "affine": False}


def apply(params, state, x):
    return jbn.bn_forward(params, state, x, True)[1]


def inside(context, model):
    """Call a model inside a context."""

    def run(**options):
        with warnings.catch_warnings(), context(**options):
            warnings.simplefilter("ignore")
            model.apply(VARIABLES, X, mutable=["batch_stats"])

    return run


def then_called(change):
    """Call what a function returns, or the first that it returns."""

    def run(*args, **options):
        found = change(*args, **options)
        model = found[0] if isinstance(found, tuple) else found
        return model.init_with_output(jax.random.key(0), X) if isinstance(model, nn.Module) else model(X)

    return run


# Each public function with arguments that fit, by name; what begins with a star is positional.
TABLE = {
    "jbn.affine": lambda: {"params": PARAMS, "state": STATE, "epsilon": 1e-5},
    "jbn.batch_norm": lambda: {"x": X, "scale": np.ones(3, np.float32), "bias": np.ones(3, np.float32), **CALL},
    "jbn.bn_forward": lambda: {
        "params": PARAMS, "state": STATE, "x": X, "train": True, "update": True, "momentum": 0.9, "unbiased": False,
        "normalize_by": None, **CALL,
    },
    "jbn.bn_init": lambda: {
        "num_features": 3, "use_scale": True, "use_bias": True, "dtype": jnp.float32, "counted": False,
    },
    "jbn.check": lambda: {"devices": jax.devices()[:1]},
    "jbn.compare": lambda: {"a": {"p": X}, "b": {"p": X}, "names": None, "tolerance": None},
    "jbn.convert": lambda: {
        "tree": TREE, "source": "torch", "target": "linen", "like": LIKE, "names": None, "kinds": {}, "flattened": {},
        "count": None, "unbiased": False,
    },
    "jbn.convert_options": lambda: {"options": {"eps": 1e-5}, "source": "torch", "target": "linen"},
    "jbn.cumulative": lambda: {"count": 3},
    "jbn.debiased": lambda: {"momentum": 0.9},
    "jbn.decay_mask": lambda: {"params": {"a": X}},
    "jbn.diagnose": lambda: {"apply": apply, "params": PARAMS, "state": STATE, "batch": X, **EXAMINED},
    "jbn.fold": lambda: {
        "params": PARAMS, "state": STATE, "kernel": X[:2], "bias": X[0], "layout": "IO", "into": "previous",
        "groups": 1, "padding": None, "epsilon": 1e-5,
    },
    "jbn.freeze": lambda: {"old": {"a": STATE}, "new": {"a": STATE}, "patterns": "*"},
    "jbn.keep_statistics": lambda: {"old": {"a": STATE}, "new": {"a": STATE}, "patterns": "*"},
    "jbn.load_arrays": lambda: {"path": "arrays.npz"},
    "jbn.merge": lambda: {"*moments": MOMENTS},
    "jbn.merge_states": lambda: {"states": [STATE, STATE], "counts": [1, 2]},
    "jbn.mix": lambda: {"a": MOMENTS, "b": MOMENTS, "weight": 0.5},
    "jbn.moments": lambda: {"x": X, "axis": -1, "mask": None, "axis_name": None, "pilot": None},
    "jbn.norm_mask": lambda: {"params": {"n": {"scale": X[0]}}, "state": {"n": STATE}},
    "jbn.propose_names": lambda: {
        "tree": TREE, "source": "torch", "target": "linen", "like": LIKE, "call": None, "kinds": {},
    },
    "jbn.recalibrate": lambda: {"apply": apply, "params": PARAMS, "state": STATE, "batches": [X], **PASSES},
    "jbn.record": lambda: {"model": Foreign(), "*args": X},
    "jbn.remat_policy": dict,
    "jbn.renorm": lambda: {"r_max": 3.0, "d_max": 5.0},
    "jbn.renorm_schedule": lambda: {"step": 3, "steps": 100, "r_max": 3.0, "d_max": 5.0},
    "jbn.save_arrays": lambda: {"path": "saved.npz", "arrays": {"a": X}},
    "jbn.trainable_mask": lambda: {"params": {"a": X}, "frozen": "*"},
    "jbn.update": lambda: {"state": STATE, "moments": MOMENTS, "momentum": 0.9, "unbiased": False},
    "jbn.linen.BatchNorm": lambda: {**FIELDS, "force_float32_reductions": True},
    "jbn.linen.diagnose": lambda: {
        "model": Net(True), "variables": VARIABLES, "batch": X, "also": (), "mutable": None, **EXAMINED,
    },
    "jbn.linen.fold": lambda: {"model": Net(), "variables": VARIABLES, "*args": X, "pairs": None, "also": ()},
    "jbn.linen.foldable": lambda: {"model": Net(), "variables": VARIABLES, "*args": X, "also": ()},
    "jbn.linen.freeze": lambda: {"patterns": "*", **FLAGS},
    "jbn.linen.recalibrate": lambda: {
        "model": Net(True), "variables": VARIABLES, "batches": [X], "also": (), "mutable": None, "rngs": None, **PASSES,
    },
    "jbn.linen.record": lambda: {"model": Net(), "variables": VARIABLES, "*args": X},
    "jbn.linen.replace": lambda: {"also": (), **OPTIONS},
    "jbn.nnx.BatchNorm": lambda: {"num_features": 3, "rngs": nnx.Rngs(0), **FIELDS},
    "jbn.nnx.diagnose": lambda: {"model": Twin(), "batch": X, "also": (), "method": "__call__", **EXAMINED},
    "jbn.nnx.fold": lambda: {"model": Twin(), "*args": X, "pairs": None, "also": ()},
    "jbn.nnx.foldable": lambda: {"model": Twin(), "*args": X, "also": ()},
    "jbn.nnx.freeze": lambda: {"model": Twin(jbn.nnx.BatchNorm), "patterns": "*", **FLAGS},
    "jbn.nnx.recalibrate": lambda: {"model": Twin(), "batches": [X], "also": (), "method": "__call__", **PASSES},
    "jbn.nnx.record": lambda: {"model": Twin(), "*args": X},
    "jbn.nnx.replace": lambda: {"model": Twin(), "also": (), "use_running_average": False, "axis": -1, **OPTIONS},
}  # fmt: skip
CALLS = {
    "jbn.linen.BatchNorm": then_called(jbn.linen.BatchNorm),
    "jbn.linen.freeze": inside(jbn.linen.freeze, Net(True, jbn.linen.BatchNorm)),
    "jbn.linen.replace": inside(jbn.linen.replace, Net(True)),
    "jbn.nnx.BatchNorm": then_called(jbn.nnx.BatchNorm),
}
# Arguments that go on into code of the user, or of Flax.
THEIRS = {"batch", "*args", "rngs"}
# Functions that were passed raise what they raise, and so does a model with the batches that it was passed.
FUNCTIONS = {"activation", "normalize_by", "names", "apply", "call", "progress", "method", "momentum", "model"}
# Where text and any object may stand: a tree of anything, a name, a pattern, what is not looked at.
ANYTHING = {"params", "axis_name", "patterns", "padding"}
KINDS = {
    "nothing": None,
    "text": "nope",
    "bytes": b"nope",
    "a list": [1, "a"],
    "a tuple": (1, 2),
    "a list of nothing": [None],
    "a set": {1, 2},
    "an integer": -7,
    "a number": 2.5,
    "NaN": math.nan,
    "a mapping": {"a": 1},
    "a mapping of numbers": {1: 2},
    "a function": len,
    "a class": int,
    "an array of text": np.array(["a", "b"]),
    "an array of times": np.array(["2020"], "M8[D]"),
    "an array of complex numbers": np.ones(3, np.complex64),
    "an array of bools": np.ones(3, bool),
    "a scalar": jnp.ones(()),
    "an array": jnp.ones(3),
    "a state": STATE,
    "a state of NNX": nnx.state(Twin()),
    "a module of Linen": Net(),
    "a module of NNX": Twin(),
    "an object": Foreign(),
}


def function(name):
    return CALLS.get(name) or eval(name)


def run(name, given):
    """Call a function with arguments by name; some are positional."""
    call = function(name)
    order = [key.lstrip("*") for key in given if key.startswith("*")]
    if not order:
        return call(**given)
    names = list(inspect.signature(call).parameters)
    first = [given[key] for key in names[: names.index(order[0])]]
    rest = {key: value for key, value in given.items() if not key.startswith("*") and key in names[len(first) :]}
    return call(*first, *(given[f"*{key}"] for key in order), **rest)


def runs_on(argument, value):
    """Say whether a value is one of the right kind, which fails later for what it does or holds."""
    if argument == "params" and not jax.tree.leaves(value):
        return True
    return (argument in FUNCTIONS and callable(value)) or (
        argument == "batches" and isinstance(value, list | tuple | set)
    )


def faults(name, argument):
    """Return by kind what is wrong with the error about a wrong kind of an argument."""
    word = argument.lstrip("*")
    for kind, value in KINDS.items():
        if value is TABLE[name]().get(argument) or (name == "jbn.check" and value is None):
            continue  # what is as it was; and a check of every device takes long
        try:
            run(name, TABLE[name]() | {argument: value})
            if kind in ("text", "an object") and argument not in ANYTHING and not runs_on(argument, value):
                yield f"{name}({argument}={kind}) is taken"
        except Exception as error:
            ours = "/jbn/" in traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
            text = str(error).split("\n")[0]
            named = re.search(rf"\b{word}\b" if len(word) > 1 else rf"\b{word}(\[.*\])? (is|has|of)\b", text)
            if not (isinstance(error, ValueError | TypeError) and ours and named) and not runs_on(argument, value):
                yield f"{name}({argument}={kind}): {type(error).__name__}: {text[:200]}"


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore")
def test_wrong_kinds_are_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jbn.save_arrays("arrays.npz", {"a": X})
    run(name, TABLE[name]())
    found = [fault for argument in TABLE[name]() if argument not in THEIRS for fault in faults(name, argument)]
    assert not found, "\n".join(found)


def test_every_public_function_and_every_argument_is_in_the_table():
    found = {}
    for module in (jbn, jbn.linen, jbn.nnx):
        for name in module.__all__:
            one = getattr(module, name)
            if inspect.isfunction(one) or name == "BatchNorm":
                found[f"{module.__name__}.{name}"] = inspect.signature(
                    one.__init__ if inspect.isclass(one) else one
                ).parameters
    assert found.keys() == TABLE.keys()
    flax = {"bias_init", "scale_init", "promote_dtype", "parent", "name", "self", "bias_metadata", "scale_metadata"}
    for name, parameters in found.items():
        here = {key.lstrip("*") for key in TABLE[name]()}
        theirs = {key for key, one in parameters.items() if one.kind is one.VAR_KEYWORD or key in flax}
        assert {*parameters} - here - theirs <= {"inputs"}, name
