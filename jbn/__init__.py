"""Batch normalization for JAX: exact statistics, one derivative, state in and state out.

The function: ``bn_init`` makes parameters and a state, ``bn_forward(params, state, x, train)`` normalizes x and returns
the new state; ``batch_norm`` and ``moments`` do without a state, ``merge`` joins moments of parts of a batch,
``update`` moves a state towards moments, ``merge_states`` pools those of clients. By what else x may be normalized:
``renorm`` with ``renorm_schedule``, ``mix``, or any function that returns ``Moments`` or a ``Correction``. How the
state moves: by a number, or by a function of how often it did, ``cumulative``, ``debiased`` or any schedule.

What they take and return: ``Params`` and ``State``, or ``CountedState`` where updates are counted, ``Moments``, and
``Correction``.

Tools: ``recalibrate`` (exact statistics after training), ``diagnose`` (what is wrong with a model: a ``Diagnosis`` with
a ``LayerStatistics`` for each layer and a ``Finding`` for each fault), ``convert``, ``propose_names`` (a ``Proposal``,
with a ``Match`` for each layer), ``convert_options``, ``load_arrays`` and ``save_arrays`` (from and to other
libraries), ``affine`` and ``fold`` (a normalization as a multiply-add; of models ``Folds`` says what was folded),
``record`` (a ``Call`` for each layer) and ``compare`` (where two models part: a ``Comparison`` with a ``ComparedLayer``
for each pair), ``keep_statistics`` (once ``freeze``), ``trainable_mask``, ``norm_mask`` and ``decay_mask`` (what moves
in training), ``remat_policy`` (what ``jax.checkpoint`` keeps), ``check`` (does it hold on these devices: a ``Report``).

Modules, each to be imported by its name: ``jbn.linen`` and ``jbn.nnx``, whose ``BatchNorm`` goes in the place of
Flax's, and which have ``replace``, ``freeze``, ``fold``, ``diagnose`` and ``recalibrate`` for whole models;
``jbn.studies`` (what is claimed about batch normalization, measured), ``jbn.lab`` (what the command line runs),
``jbn.typing`` (what arguments may be). ``__version__`` is the version.
"""

from typing import TYPE_CHECKING, Any

from jbn.version import __version__

if TYPE_CHECKING:
    from jbn.public import *

_MODULES = {"lab", "linen", "nnx", "studies", "typing"}

__all__ = [
    "Call", "ComparedLayer", "Comparison", "Correction", "CountedState", "Diagnosis", "Finding", "Folds",
    "LayerStatistics", "Match", "Moments", "Params", "Proposal", "Report", "State", "__version__", "affine",
    "batch_norm", "bn_forward", "bn_init", "check", "compare", "convert", "convert_options", "cumulative", "debiased",
    "decay_mask", "diagnose", "fold", "freeze", "keep_statistics", "load_arrays", "merge", "merge_states", "mix",
    "moments", "norm_mask", "propose_names", "recalibrate", "record", "remat_policy", "renorm", "renorm_schedule",
    "save_arrays", "trainable_mask", "update",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Find a public name: not before one is asked for, as JAX takes long to import and can lose a Ctrl-C meanwhile.

    The command line hears it from its first line on, and this file comes before that.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jbn import public

    globals().update({each: getattr(public, each) for each in __all__ if each != "__version__"})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES & globals().keys()})
