"""``check``: a self-test of this library on the devices at hand, against float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jbn.checking.report import Report, Row
from jbn.core.forward import bn_forward
from jbn.core.state import Params, State
from jbn.paths import count_of
from jbn.version import __version__

# The bounds of docs/how/accuracy.md. They hold on every device: with rsqrt to 2.5 ulps, the worst of JAX's table of
# accuracy (TPU v2 to v5), y is off by 2e-6 at most.
_OUTPUT = 4e-6  # absolute
_STATISTICS = 4e-6  # of the variance, relative; of the mean, in standard deviations
_GRADIENTS = 1e-5  # relative L2
_COLLECTIVES = 3  # the statistics, the second sweep in its branch, the gradients

_EPSILON = 1e-5
_IMAGES = (64, 8, 8, 16)
# Large enough that GPUs and TPUs count as they do in a network, and without padding of TPU tiles. Compiled, never made.
_LARGE = (128, 64, 64, 256)
# Passes over x of BN + ReLU by docs/how/costs.md, forward and both. The compiler counts the second sweep too, though it
# hardly ever runs: two more on a CPU, whose sums read one array each, and one elsewhere.
_PASSES = {"cpu": (4 + 2, 13 + 2), "cuda": (3 + 1, 8 + 1), "tpu": (3 + 1, 8 + 1)}
_MARGIN = 1.05

_SENT = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
_BESIDE = ("jaxlib", "libtpu", *(f"jax-cuda{n}-{part}" for n in (12, 13) for part in ("plugin", "pjrt")), "numpy")


def check(*, devices: Sequence[jax.Device] | None = None) -> Report:
    """Check accuracy, gradients, masks, synchronization and cost of this library on the devices at hand.

    Everything is compared with float64 NumPy, by the bounds of docs/how/accuracy.md; errors are those beyond half an
    ulp of the result, which its dtype cannot avoid. One device computes what needs one, all of them together what is
    synchronized. It takes some ten seconds, most of them to compile, and a few megabytes of each device.

    Args:
        devices: the devices, of one platform and of this process; those of the default backend unless given.

    Returns:
        A ``Report``: rows of what was checked, measured, allowed and found, and ``passed``, whether nothing failed.
        Printed, it is a table. A check that raises is a row that failed, with the error; one that does not apply here
        is skipped, with the reason.

    Raises:
        TypeError: for what is not a sequence of devices.
        ValueError: for none, for the same one twice, for those of several platforms or of other processes.

    >>> import jax, jbn
    >>> report = jbn.check(devices=jax.devices()[:1])
    >>> report.passed
    True
    >>> print(report.rows[-1].of, report.rows[-1].verdict)
    forward and backward passed
    """
    chosen = _read_devices(devices)
    rows: list[Row] = []
    for name, look in _CHECKS.items():
        try:
            with jax.default_device(chosen[0]), jax.transfer_guard("allow"):
                for row in look(chosen):
                    rows.append(row)
        except _NotHere as reason:
            rows.append(Row(name, "", None, None, "skipped", str(reason)))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            rows.append(Row(name, "", None, None, "failed", f"{type(error).__name__}: {first}"))
    return Report(_heading(chosen), tuple(rows))


class _NotHere(Exception):
    """What would be checked is not there."""


def _row(name: str, of: str, measured: Any, bound: float | None, note: str = "") -> Row:
    measured = float(measured)
    verdict = "measured" if bound is None else "passed" if measured <= bound else "failed"  # NaN fails
    return Row(name, of, measured, bound, verdict, note)


# What is computed, and the same in float64.


class _Batch(NamedTuple):
    """What goes in."""

    x: Any  # (..., features)
    g: Any  # the shape of x, float32: the cotangent of y
    mask: Any  # bool, (..., 1), or None
    scale: Any  # (features,), float32
    bias: Any  # (features,), float32


class _Answer(NamedTuple):
    """What comes out; gradients are those of Σ g·y."""

    y: Any
    mean: Any
    var: Any
    dx: Any
    dscale: Any
    dbias: Any


def _draw(shape: tuple[int, ...], mean: Any, dtype: Any = jnp.float32, mask: Any = None) -> _Batch:
    rng = np.random.default_rng(0)
    x, g = ((rng.standard_normal(shape) + shift).astype(dtype) for shift in (mean, 0))
    x = x if mask is None else np.where(mask, x, np.asarray(np.nan, dtype))
    scale, bias = (rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32) for _ in range(2))
    return _Batch(x, g.astype(np.float32), mask, scale, bias)


def _oracle(batch: _Batch) -> _Answer:
    """Ioffe and Szegedy 2015, algorithm 1 and the gradients of section 3."""
    rows = tuple(range(batch.x.ndim - 1))
    valid = np.broadcast_to(True if batch.mask is None else batch.mask, batch.x.shape)
    x, g = (np.where(valid, part.astype(np.float64), 0) for part in (batch.x, batch.g))
    n = valid.sum(rows)
    mean = x.sum(rows) / n
    centred = np.where(valid, x - mean, 0)
    var = np.square(centred).sum(rows) / n
    r = 1 / np.sqrt(var + _EPSILON)
    normal = centred * r
    dscale, dbias = (g * normal).sum(rows), g.sum(rows)
    y = np.where(valid, normal * batch.scale + batch.bias, 0)
    dx = np.where(valid, batch.scale * r * (g - dbias / n - normal * dscale / n), 0)
    return _Answer(y, mean, var, dx, dscale, dbias)


def _train(batch: _Batch, state: State, axis_name: str | None = None) -> _Answer:
    def loss(x: Array, params: Params) -> Any:
        y, new = bn_forward(
            params, state, x, True, momentum=0.0, epsilon=_EPSILON, mask=batch.mask, axis_name=axis_name
        )
        return jnp.sum(y.astype(batch.g.dtype) * batch.g), (y, new)

    (dx, dparams), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(batch.x, Params(batch.scale, batch.bias))
    return _Answer(y, new.mean, new.var, dx, dparams.scale, dparams.bias)


def _new_state(batch: _Batch) -> State:
    return State(np.zeros_like(batch.scale), np.ones_like(batch.scale))  # type: ignore[arg-type]


def _compare(name: str, found: _Answer, exact: _Answer) -> Iterator[Row]:
    """Yield the rows of a batch: y, the statistics and the gradients."""
    yield _row(name, "y", _error(found.y, exact.y).max(), _OUTPUT, "absolute")
    mean, var = _error(found.mean, exact.mean) / np.sqrt(exact.var), _error(found.var, exact.var) / exact.var
    yield _row(name, "mean and variance", np.max([mean, var]), _STATISTICS, "relative; in deviations")
    dx, dscale, dbias = (
        np.linalg.norm(_error(getattr(found, name), want)) / np.linalg.norm(want)
        for name, want in (("dx", exact.dx), ("dscale", exact.dscale), ("dbias", exact.dbias))
    )
    yield _row(name, "gradient of x", dx, _GRADIENTS, "relative L2")
    yield _row(name, "gradients of scale, bias", np.max([dscale, dbias]), _GRADIENTS, "relative L2")


def _error(found: Any, exact: Any) -> Any:
    """Return the error of every number beyond half an ulp of it, in its dtype."""
    wide = np.asarray(found).astype(np.float64)
    half = np.ldexp(float(jnp.finfo(found.dtype).eps) / 4, np.frexp(wide)[1])
    return np.maximum(np.abs(wide - exact) - np.where(wide == 0, 0, half), 0)


# What is checked, each with all devices at hand; the first of them is the default.


def _arithmetic(devices: Sequence[jax.Device]) -> Iterator[Row]:
    """Tell how exact the quotients and roots of the device are, from which those of normalization are made."""
    n = np.arange(1, 2**16, dtype=np.float32)
    share, root = (np.asarray(value, np.float64) for value in jax.jit(lambda n: (1 / n, lax.rsqrt(n)))(n))
    for of, one in (("1/n", share * n), ("rsqrt", root * np.sqrt(n.astype(np.float64)))):
        yield _row("arithmetic", of, np.abs(one - 1).max(), None, "relative")


def _training(devices: Sequence[jax.Device]) -> Iterator[Row]:
    run = jax.jit(lambda *args: _train(*args))
    # bfloat16 has 8 bits: where the mean is 10⁴ deviations, x is constant.
    for dtype, means in ((jnp.float32, {0: "0", 1e4: "10⁴"}), (jnp.bfloat16, {0: "0", 1e2: "10²"})):
        kind = jnp.dtype(dtype).name
        for mean, written in means.items():
            batch = _draw(_IMAGES, mean, dtype)
            found = run(batch, _new_state(batch))
            name, dtypes = f"{kind}, mean/std {written}", [str(a.dtype) for a in (found.y, found.mean, found.dx)]
            yield from _compare(name, found, _oracle(batch))
            wrong = sum(a != b for a, b in zip(dtypes, (kind, "float32", kind), strict=True))
            yield _row(name, "wrong dtypes", wrong, 0, ", ".join(dtypes) * bool(wrong))


def _evaluation(devices: Sequence[jax.Device]) -> Iterator[Row]:
    batch = _draw(_IMAGES, 1e4)
    seen = _oracle(batch)
    state = State(seen.mean.astype(np.float32), seen.var.astype(np.float32))
    mean, var = (np.asarray(v, np.float64) for v in state)
    exact = (batch.x - mean) / np.sqrt(var + _EPSILON) * batch.scale + batch.bias
    params = Params(batch.scale, batch.bias)
    run = jax.jit(lambda params, state, x: bn_forward(params, state, x, False, epsilon=_EPSILON))
    y, same = run(params, state, batch.x)
    yield _row("evaluation, mean/std 10⁴", "y", _error(y, exact).max(), _OUTPUT, "absolute")
    moved = max(np.abs(np.asarray(new) - old).max() for new, old in zip(same, state, strict=True))
    yield _row("evaluation, mean/std 10⁴", "change of the state", moved, 0)


def _running(devices: Sequence[jax.Device]) -> Iterator[Row]:
    batch, momentum = _draw(_IMAGES, 0), 0.75
    old, seen = State(*(v + 1 for v in _new_state(batch))), _oracle(batch)
    run = jax.jit(lambda x, old: bn_forward({}, old, x, True, momentum=momentum)[1])
    off = [
        _error(new, momentum * np.float64(was) + (1 - momentum) * now)
        for new, was, now in zip(run(batch.x, old), old, (seen.mean, seen.var), strict=True)
    ]
    yield _row("running statistics", "mean and variance", np.max(off), _STATISTICS, "absolute")


def _masks(devices: Sequence[jax.Device]) -> Iterator[Row]:
    mask = np.random.default_rng(1).random((*_IMAGES[:-1], 1)) < 0.7
    batch = _draw(_IMAGES, 1e2, mask=mask)
    found = jax.jit(lambda *args: _train(*args))(batch, _new_state(batch))
    yield from _compare("NaN under a mask", found, _oracle(batch))


def _second_call(devices: Sequence[jax.Device]) -> Iterator[Row]:
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise _NotHere("jit is switched off")
    batch = _draw(_IMAGES, 0)
    params, state, x, other = jax.device_put((Params(batch.scale, batch.bias), _new_state(batch), batch.x, batch.g))

    def call(x: Array, momentum: float) -> None:
        bn_forward(params, state, x, True, momentum=momentum, activation=jax.nn.relu)
        bn_forward(params, state, x, False, activation=jax.nn.relu)

    call(x, 0.9)
    with jax.no_tracing(True):
        call(other, 0.5)
    yield _row("a second eager call", "compilations", 0, 0)


def _shards(devices: Sequence[jax.Device], manual: bool) -> Iterator[Row]:
    """Check a batch over all devices, with other means and numbers of valid rows on each."""
    number, rows = len(devices), 8
    if number == 1:
        raise _NotHere("one device")
    shards = np.arange(number)
    valid = rows - 3 * shards % rows
    valid[2:][-1:] = 0  # of more than two devices, one has none
    mask = (np.arange(rows) < valid[:, None]).reshape(-1, 1, 1)
    batch = _draw((number * rows, 8, 16), 1e2 + np.repeat(shards, rows)[:, None, None], mask=mask)
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    split, whole = P("data"), P()
    split_batch = _Batch(split, split, split, whole, whole)
    placed = jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), batch, split_batch)
    args = placed, jax.device_put(_new_state(batch), NamedSharding(mesh, whole))
    step = partial(_train, axis_name="data" if manual else None)
    if manual:
        out = _Answer(split, whole, whole, split, whole, whole)
        step = jax.shard_map(step, mesh=mesh, in_specs=(split_batch, whole), out_specs=out)
    compiled = jax.jit(lambda *args: step(*args)).lower(*args).compile()
    name = f"{'shard_map' if manual else 'jit'} over {number} devices"
    yield from _compare(name, compiled(*args), _oracle(batch))
    if not (text := compiled.as_text()):
        raise _NotHere("collectives: this compiler shows no program")
    yield _row(name, "collectives", len(_SENT.findall(text)), _COLLECTIVES, "one in the second sweep")


def _costs(devices: Sequence[jax.Device]) -> Iterator[Row]:
    """Ask the compiler how often BN + ReLU goes through x; y is forced before its cotangent, as in a network."""

    def forward(params: Params, state: State, x: Array) -> Any:
        return bn_forward(params, state, x, True, activation=jax.nn.relu)

    def both(params: Params, state: State, x: Array, g: Array) -> Any:
        y, pull, new = jax.vjp(lambda *args: forward(args[0], state, args[1]), params, x, has_aux=True)
        y, g = lax.optimization_barrier((y, g))
        return y, new, pull(g)

    where, kind = _target(devices[0]), jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
    x, vector = jax.ShapeDtypeStruct(_LARGE, kind), jax.ShapeDtypeStruct(_LARGE[-1:], jnp.float32)
    inputs = Params(vector, vector), State(vector, vector), x  # type: ignore[arg-type]
    bounds = _PASSES.get(where, (None, None))
    programs: dict[str, Any] = {
        "forward": jax.jit(forward).lower(*inputs),
        "forward and backward": jax.jit(both).lower(*inputs, x),
    }
    for (name, program), most in zip(programs.items(), bounds, strict=True):
        cost = program.compile().cost_analysis()
        if not (cost and cost.get("bytes accessed")):
            raise _NotHere("this compiler tells no bytes")
        passes = cost["bytes accessed"] / (x.size * x.dtype.itemsize)
        bound = None if most is None else _MARGIN * most
        yield _row(f"passes, BN+ReLU, {x.dtype.name}", name, passes, bound, "the second sweep counted")


_CHECKS: dict[str, Callable[[Sequence[jax.Device]], Iterator[Row]]] = {
    "arithmetic": _arithmetic,
    "training": _training,
    "running statistics": _running,
    "evaluation": _evaluation,
    "masks": _masks,
    "a second eager call": _second_call,
    "jit over devices": partial(_shards, manual=False),
    "shard_map over devices": partial(_shards, manual=True),
    "passes": _costs,
}


# Where it is checked.


def _read_devices(devices: Any) -> Sequence[jax.Device]:
    if devices is None:
        return jax.local_devices()
    if not isinstance(devices, Sequence) or not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError(f"devices is {devices!r}; expected a sequence of devices, such as jax.local_devices()[:2].")
    platforms = sorted({device.platform for device in devices})
    if len(set(devices)) != len(devices) or len(platforms) != 1:
        raise ValueError(
            f"devices is {devices!r}; expected one or several different ones of one platform, such as "
            "jax.local_devices()."
        )
    if away := [device for device in devices if device.process_index != jax.process_index()]:
        raise ValueError(f"devices has {away!r} of another process; expected some of jax.local_devices().")
    return devices


def _heading(devices: Sequence[jax.Device]) -> tuple[str, str]:
    versions = {"jbn": __version__, "jax": jax.__version__}
    for name in _BESIDE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    number, kind = len(devices), f"{devices[0].platform}, {devices[0].device_kind}"
    devices_here = f"{count_of(number, 'device')}: {kind}"
    process = f" (process {jax.process_index()})" if jax.process_count() > 1 else ""
    return (
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        devices_here + process,
    )


def _target(device: jax.Device) -> str:
    """Name the compiler whose counts are known, or nothing."""
    if device.platform == "gpu" and "cuda" in device.client.platform_version:
        return "cuda"
    # The sums of XLA's CPU loops fuse with what they sum since jax 0.10.
    return "" if device.platform == "cpu" and jax.__version_info__ < (0, 10) else device.platform
