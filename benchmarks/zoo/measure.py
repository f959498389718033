"""What is measured of one model: ``measure(case)``; `BARS` says what each figure has to be."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export

from benchmarks.zoo.cases import Case, Functions, Model, draw, widen
from benchmarks.zoo.kinks import at as with_kinks_at
from benchmarks.zoo.kinks import record as kinks_of
from jbn.programs import find_inner

SEEDS = range(5)
CLOSE = 1e-5
"""Of the largest logit."""
RATIO = 1.5
"""Of the error of jbn's gradients, to that of the model's own."""
VALUES = 64
"""Per channel in every norm, fewer of which make gradients ill-conditioned."""

Row = dict[str, Any]


def measure(case: Case, report: Callable[[Row], object] = lambda row: None) -> Row:
    """Measure a model; where a figure cannot be had, the reason is there.

    Args:
        case: the model.
        report: is called with the row as far as it is, after each figure.
    """
    row: Row = {"package": case.package, "version": case.version, "model": case.model, "figures": {}, "reasons": {}}
    model = _try(row, "build", case.build)
    if model is None:
        return row
    row["norms"] = model.count()
    x = draw(model.shape, 0)
    want = _try(row, "evaluation", lambda: _evaluate(model.functions(), x))
    if want is None:
        return row
    figures: dict[str, Callable[[], Any]] = {
        "convert": lambda: _convert(model),
        "replace": lambda: _replace(model, x, want),
        "fold": lambda: _fold(model, x, want),
        "export": lambda: _export(model, x, want),
        "diagnose": lambda: _diagnose(model, x),
        "recalibrate": lambda: _recalibrate(model),
        "freeze": lambda: _freeze(model, x, want),
        "gradient": lambda: _gradient(model),  # it takes longest: who waits no longer has the others
    }
    if model.source is None:
        del figures["convert"]
    for name, figure in figures.items():
        value = _try(row, name, figure)
        if value is not None:
            row["figures"][name] = value
        report(row)
    return row


def misses(row: Row) -> list[str]:
    """Return the figures of a row that are missing or not what they have to be."""
    figures = row["figures"]
    off = {name: figures[name] for name in ("convert",) if name in figures}
    off |= {name: figures[name]["error"] for name in ("replace", "fold", "freeze") if name in figures}
    off |= {f"export, {name}": error for name, error in figures.get("export", {}).items()}
    exact, own = (figures.get("fold", {}).get(name, math.inf) for name in ("exact", "own"))
    if exact <= own < math.inf:  # folding has moved the logits no farther from float64 than float32 has the model's own
        off |= {"fold": 0.0, "export, folded": 0.0}
    found = [*row["reasons"], *(name for name, error in off.items() if not error <= CLOSE)]
    counts = {name: figures[name]["norms"] for name in ("replace", "freeze") if name in figures}
    found += [name for name, norms in counts.items() if norms != row["norms"]]
    if "gradient" in figures and not figures["gradient"]["ratio"] <= RATIO:
        found.append("gradient")
    if "diagnose" in figures and figures["diagnose"]["values"] < VALUES:
        found.append("values")
    return list(dict.fromkeys(found))


def _try(row: Row, name: str, figure: Callable[[], Any]) -> Any:
    """Return a figure; where it fails note why."""
    try:
        return figure()
    except Exception as error:  # whatever a model of others does
        text = " ".join(str(error).split())
        row["reasons"][name] = f"{type(error).__name__}: {text[:300]}"
        return None


def _evaluate(functions: Functions, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(functions.evaluate)(functions.params, functions.others, x))


def _off(y: Any, want: np.ndarray) -> float:
    """Return the largest error, of the largest number that should be there."""
    if not np.isfinite(y).all():
        raise ValueError("the logits are not finite")
    return _short(np.abs(np.asarray(y, np.float64) - want).max() / np.abs(want).max())


def _short(value: Any) -> float:
    return float(f"{float(value):.3g}")


def _convert(model: Model) -> float:
    assert model.images is not None
    assert model.source is not None
    return _off(_evaluate(model.functions(), model.images), model.source)


def _replace(model: Model, x: np.ndarray, want: np.ndarray) -> Row:
    functions, norms = model.replace()
    return {"norms": norms, "error": _off(_evaluate(functions, x), want)}


def _fold(model: Model, x: np.ndarray, want: np.ndarray) -> Row:
    """Fold a model; where logits move by more than they may, they are held against float64, and its own too."""
    functions, folds = model.fold(x)
    y = _evaluate(functions, x)
    found = {"norms": len(folds.pairs), "kept": len(folds.kept), "error": _off(y, want)}
    if found["error"] > CLOSE:
        with jax.enable_x64(True):
            exact = _evaluate(model.widen(), widen(x))
        found |= {"exact": _off(y, exact), "own": _off(want, exact)}
    return found


def _export(model: Model, x: np.ndarray, want: np.ndarray) -> Row:
    """Write and read the evaluation in jax's own format."""

    def through_bytes(functions: Functions) -> float:
        leaves, tree = jax.tree.flatten(_arrays(functions))

        def evaluate(leaves: Any, x: Any) -> Any:
            params, others = jax.tree.unflatten(tree, leaves)
            return functions.evaluate(params, others, x)

        exported: Any = export.export(jax.jit(evaluate))(leaves, x)
        read: Any = export.deserialize(exported.serialize())
        return _off(read.call(leaves, x), want)

    return {"replaced": through_bytes(model.replace()[0]), "folded": through_bytes(model.fold(x)[0])}


def _gradient(model: Model) -> Row:
    """Return the errors of the gradients of all parameters, against the model as it came in float64, at its kinks."""
    shape = jax.eval_shape(model.functions().evaluate, *_arrays(model.functions()), draw(model.shape, 0)).shape
    inputs = [(draw(model.shape, 10 + seed), draw(shape, 20 + seed)) for seed in SEEDS]
    with jax.enable_x64(True):
        wide = model.widen()
        pairs = [widen(pair) for pair in inputs]
        kinks = [kinks_of(wide.train, *_arrays(wide), x) for x, _ in pairs]
        gradient = jax.jit(_gradient_of(wide)).trace(*_arrays(wide), *pairs[0], kinks[0])
        _check_width(gradient.jaxpr.jaxpr)
        compiled = gradient.lower().compile()
        want = [_flat(compiled(*_arrays(wide), *pair, places)) for pair, places in zip(pairs, kinks, strict=True)]
    errors = {}
    for name, functions in (("jbn", model.replace()[0]), ("theirs", model.functions())):
        narrow = jax.jit(_gradient_of(functions))
        found = [_flat(narrow(*_arrays(functions), *pair, places)) for pair, places in zip(inputs, kinks, strict=True)]
        off = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, want, strict=True)]
        errors[name] = math.exp(np.mean(np.log(np.maximum(off, np.finfo(np.float64).tiny))))
    return {name: _short(error) for name, error in errors.items()} | {"ratio": _short(errors["jbn"] / errors["theirs"])}


def _arrays(functions: Functions) -> tuple[Any, Any]:
    return functions.params, functions.others


def _gradient_of(functions: Functions) -> Callable[..., Any]:
    def loss(params: Any, others: Any, x: Any, cotangent: Any, kinks: list[Any]) -> Any:
        return (with_kinks_at(kinks, functions.train)(params, others, x) * cotangent).sum()

    return jax.grad(loss)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def _check_width(jaxpr: Any) -> None:
    """Refuse a program in which something is computed in less than float64: it would be no reference."""
    for equation in jaxpr.eqns:
        for var in equation.outvars:
            if np.issubdtype(var.aval.dtype, np.floating) and var.aval.dtype.itemsize < 8:
                raise ValueError(f"the model computes {equation.primitive} in {var.aval.dtype} where all is float64")
        for inner in find_inner(equation):
            _check_width(inner)


def _diagnose(model: Model, x: np.ndarray) -> Row:
    diagnosis = model.diagnose(x)
    seen = [int(layer.count.min()) for layer in diagnosis.layers if layer.count.max() > 0]
    kinds = [finding.kind for finding in diagnosis.findings]
    said = [finding.message for finding in diagnosis.findings if finding.kind in ("evaluates", "foreign")]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return {"norms": len(seen), "values": min(seen), "findings": counts, "said": said}


def _recalibrate(model: Model) -> Row:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, after = model.recalibrate([draw(model.shape, seed) for seed in (30, 31)])
    pairs = list(zip(*map(jax.tree.leaves, (before, after)), strict=True))
    if not all(np.isfinite(new).all() for _, new in pairs):
        raise ValueError("statistics are not finite")
    moved = sum(bool((np.asarray(old) != np.asarray(new)).any()) for old, new in pairs)
    return {"norms": moved // 2, "said": [str(warning.message) for warning in caught]}


def _freeze(model: Model, x: np.ndarray, want: np.ndarray) -> Row:
    """Hold a frozen training call against evaluation."""
    y, norms, before, after = model.freeze(x)
    pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    if moved := sum(bool((np.asarray(old) != np.asarray(new)).any()) for old, new in pairs):
        raise ValueError(f"{moved} running statistics moved")
    return {"norms": norms, "error": _off(y, want)}
