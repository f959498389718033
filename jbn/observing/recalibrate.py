"""``recalibrate``: the population statistics of every layer of a model, exact over all batches."""

from __future__ import annotations

import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, takewhile
from typing import Any, TypeVar, get_args

import jax
import numpy as np

from jbn.arguments import read_choice
from jbn.core.checks import read_flag
from jbn.core.state import Observation, Upstream
from jbn.observing.survey import Batch, Layer, Seen, Statistics, survey
from jbn.paths import ArrayTree, count_of, name_few

StateT = TypeVar("StateT")

# When statistics count as those of the pass before: in standard deviations, and relative to the variance.
_SETTLED = 1e-5


def recalibrate(
    apply: Callable[[ArrayTree, StateT, Batch], StateT],
    params: ArrayTree,
    state: StateT,
    batches: Iterable[Batch],
    *,
    upstream: Upstream = "batch",
    unbiased: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> StateT:
    r"""Return the state whose statistics are those of all rows of all batches, in every layer of a model.

    .. math:: \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
        \sigma^2 = \frac{\sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right)}{\sum_b n_b}

    For parameters whose running statistics are not those of training: averaged weights (SWA, EMA, schedule-free), other
    data, small batches. Counts, means and variances are merged, so that masks, a partial last batch and shards of any
    size are exact; momentum does not matter.

    Args:
        apply: ``apply(params, state, batch)`` runs the model as in training and returns its new state. It is compiled
            once for each shape of a batch, so that a partial last batch compiles a second time, and not again when
            the same function object comes back; it may contain ``jit``, ``scan``, ``shard_map`` with ``axis_name``. An
            ``apply`` that averages the states of shards itself, by ``jax.lax.pmean``, is refused: such an average has
            lost how far the shards lie apart.
        params: passed to ``apply``.
        state: a tree with the ``mean`` and ``var`` of every layer; other leaves come back as they are.
        batches: what ``apply`` takes, one after the other; any tree of arrays each, sharded or not.
        upstream: what layers normalize by meanwhile. "batch": as ``apply`` says, in training by the batch, which is
            what the parameters were trained with and takes one pass over the data; a batch of one row is
            normalized by the statistics of all others. "recalibrated": by the statistics that are returned, as
            evaluation will, for batches too small to normalize by; it repeats the pass until no statistics move, by
            more than 1e-5 of the deviation or the variance. After pass k the first k layers are exact, and one more
            pass confirms it; starting near the answer, such as after "batch", takes fewer.
        unbiased: let the variance be n/(n - 1) times the biased one, as in PyTorch.
        progress: called with the number of the pass and of the batches done in it, both from 1.

    Returns:
        A state of the type, shapes, dtypes and sharding of the one given. A feature with fewer than two valid rows
        keeps its statistics, and so does a layer that evaluates in this call, such as one that is frozen, or that the
        call does not reach.

    Raises:
        ValueError: for no batches, a state without statistics, a layer without two valid rows or, with upstream
            "batch", with one row a batch, statistics that are not finite, and layers that are not jbn's, with their
            paths; and where no layer takes statistics.
        TypeError: for arguments of other kinds, such as one batch instead of several.

    Warns:
        UserWarning: where layers keep their statistics, because they evaluate or are not reached, with their paths.

    >>> import jax, jbn
    >>> params, state = jbn.bn_init(3)
    >>> x = jax.random.normal(jax.random.key(0), (10, 3)) + 100
    >>> def apply(params, state, x):
    ...     return jbn.bn_forward(params, state, x, True)[1]
    >>> state = jbn.recalibrate(apply, params, state, [x[:4], x[4:8], x[8:]])
    >>> bool(abs(state.mean - x.mean(0)).max() < 1e-4)
    True

    Source: S. Ioffe, C. Szegedy, "Batch Normalization", 2015, algorithm 2; P. Izmailov et al., "Averaging Weights Leads
    to Wider Optima", 2018, section 3.2; Y. Wu, J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    Elsewhere: ``torch.optim.swa_utils.update_bn`` averages the statistics of batches with equal weights.
    """
    if not callable(apply):
        raise TypeError(f"apply is of type {type(apply).__name__}; expected a function of params, state and batch.")
    check_batches(batches, upstream)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is of type {type(progress).__name__}; expected a function of two numbers.")
    unbiased = read_flag("unbiased", unbiased)
    model = survey(state)
    statistics = model.remembered()
    # A stack of layers, such as that of ``nn.scan``, is as many layers as its leading axes have entries.
    depth = sum(math.prod(found.mean.shape[:-1]) for found in statistics.values())
    passes = 1 if upstream == "batch" else depth + 1
    compiled = jax.jit(apply)
    for number in count(1):
        question = model.question(statistics, upstream)
        asked = ((batch, model.ask(compiled, params, question, batch)) for batch in batches)
        answers, alone = _look_ahead(asked, number, progress), list[Answered]()
        if upstream == "batch":
            answers = _set_aside(answers, alone)
        found = model.merge(answer for _, answer in answers)
        if alone and found:
            question = model.question(statistics | _take_all(found, statistics, unbiased), upstream)
            found = model.merge((model.ask(compiled, params, question, batch) for batch, _ in alone), found)
        seen, idle = model.select(found or model.merge(answer for _, answer in alone))
        if empty := [layer.path for layer, found in seen.items() if not (found.count > 1).any()]:
            raise ValueError(f"Fewer than two valid rows reached {name_few(empty)}; expected some batch to have them.")
        if upstream == "batch" and (single := [layer.path for layer, found in seen.items() if found.is_alone]):
            raise ValueError(
                f"{name_few(single)} saw no more rows than batches, one value per channel: no batch to normalize by. "
                "Expected larger batches, one or another of one row excepted, or upstream='recalibrated'."
            )
        new = _take_all(seen, statistics, unbiased)
        settled = all(_agree(statistics[layer], found) for layer, found in new.items())
        statistics |= new
        if settled or number >= passes:
            break
    if broken := [layer.path for layer, found in seen.items() if not np.isfinite(found.var + found.mean).all()]:
        raise ValueError(
            f"The statistics of {name_few(broken)} are not finite; expected finite activations: look for NaN or inf in "
            "params and in batches, or mask the rows."
        )
    if idle:
        warnings.warn(
            f"{len(idle)} of {count_of(len(model.layers), 'layer')} keep their statistics: they evaluate in this "
            f"call, or it does not reach them: {name_few(layer.path for layer in idle)}. If they are not frozen on "
            "purpose, pass them the flag of training.",
            stacklevel=_count_frames_of_jbn() + 1,
        )
    return model.fill({layer: statistics[layer] for layer in seen})  # type: ignore[no-any-return]


def _count_frames_of_jbn() -> int:
    """Count from the caller to the first line that is not jbn's: the modules of Flax call from rooms of their own."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(sys._getframe(1)))
    return sum(1 for _ in takewhile(lambda name: name.partition(".")[0] == "jbn", names))


Answered = tuple[Batch, dict[Layer, Observation]]


def _look_ahead(answers: Iterator[Answered], number: int, progress: Any) -> Iterator[Answered]:
    """Yield each batch with the answer to it while the next one is under way."""
    waiting: Answered | None = None
    for done, ahead in enumerate(answers, 1):
        if waiting is not None:
            yield waiting
        waiting = ahead
        if progress is not None:
            progress(number, done)
    if waiting is None:
        raise ValueError(
            "batches is empty; expected at least one batch. An iterator that was used before has none left."
        )
    yield waiting


def _set_aside(answers: Iterator[Answered], alone: list[Answered]) -> Iterator[Answered]:
    """Yield the answers to batches whose rows have company, and put the others into ``alone``.

    One row is normalized by the running statistics. Before the pass these are old, or those of a new layer, and what
    the row then is to the layers that follow is no number of this model.
    """
    for batch, answer in answers:
        if any(map(_has_one_row, answer.values())):
            alone.append((batch, answer))
        else:
            yield batch, answer


def _has_one_row(found: Observation) -> bool:
    """Say whether some layer has seen one row at each of its calls; a stack has several."""
    rows, updates = np.asarray(found.count) + np.asarray(found.rest), np.asarray(found.updates)
    return bool(((updates > 0) & (rows == updates)).any())


def _take_all(seen: dict[Layer, Seen], before: dict[Layer, Statistics], unbiased: bool) -> dict[Layer, Statistics]:
    return {layer: _take(found, before[layer], unbiased) for layer, found in seen.items()}


def _take(seen: Seen, before: Statistics, unbiased: bool) -> Statistics:
    """Return the statistics of what was seen, and those of before where too little was."""
    var = seen.var * (seen.count / np.maximum(seen.count - 1, 1) if unbiased else 1)
    usable = (seen.count > 1) & np.isfinite(seen.mean) & np.isfinite(var)
    return Statistics(np.where(usable, seen.mean, before.mean), np.where(usable, var, before.var))


def _agree(old: Statistics, new: Statistics) -> bool:
    """Say whether statistics have settled."""
    deviation, rounding = np.sqrt(new.var), 2.0**-22 * np.abs(new.mean)
    same_mean = np.abs(new.mean - old.mean) <= _SETTLED * deviation + rounding
    return bool((same_mean & (np.abs(new.var - old.var) <= _SETTLED * new.var)).all())


def check_batches(batches: object, upstream: object) -> None:
    """Refuse what are no batches, or none that can be read as often as ``upstream`` needs."""
    read_choice("upstream", upstream, get_args(Upstream))
    one = hasattr(batches, "dtype") or hasattr(batches, "_fields") or isinstance(batches, Mapping | str | bytes)
    if one or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is of type {type(batches).__name__}; expected an iterable of batches. One batch is [batch]."
        )
    if upstream == "recalibrated" and isinstance(batches, Iterator):
        raise TypeError(
            f"batches is of type {type(batches).__name__}, which can be read once; upstream='recalibrated' reads it "
            "again and again. Expected a list, or an object whose __iter__ starts anew."
        )
