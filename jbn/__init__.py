"""Batch normalization for JAX: exact statistics, one derivative, state in and state out.

The function: ``bn_init`` makes parameters and a state, ``bn_forward(params, state, x, train)`` normalizes x and returns
the new state; ``batch_norm`` and ``moments`` do without a state, ``merge`` joins moments of parts of a batch.

Modules: ``jbn.linen.BatchNorm`` and ``jbn.nnx.BatchNorm``, in the place of Flax's; and for whole models in both also
``replace``, ``freeze``, ``fold``, ``diagnose`` and ``recalibrate``.

Tools: ``recalibrate`` (exact statistics after training), ``diagnose`` (what is wrong with a model), ``convert``,
``convert_options``, ``load_arrays`` and ``save_arrays`` (from and to other libraries), ``affine`` and ``fold`` (a
normalization as a multiply-add), ``keep_statistics``, ``trainable_mask``, ``norm_mask`` and ``decay_mask`` (what moves
in training), ``remat_policy`` (what ``jax.checkpoint`` keeps), ``check`` (does it hold on these devices).
"""

from jbn.checking.check import check
from jbn.checking.report import Report
from jbn.converting.convert import convert
from jbn.converting.options import convert_options
from jbn.core.forward import Params, State, batch_norm, bn_forward, bn_init, moments
from jbn.core.saved import remat_policy
from jbn.core.statistics import Moments, merge
from jbn.files import load_arrays, save_arrays
from jbn.folding.kernel import affine, fold
from jbn.folding.links import Folds
from jbn.freezing import decay_mask, freeze, keep_statistics, norm_mask, trainable_mask
from jbn.observing.diagnose import Diagnosis, diagnose
from jbn.observing.findings import Finding, LayerStatistics
from jbn.observing.recalibrate import recalibrate
from jbn.version import __version__

__all__ = [
    "Diagnosis", "Finding", "Folds", "LayerStatistics", "Moments", "Params", "Report", "State", "__version__", "affine",
    "batch_norm", "bn_forward", "bn_init", "check", "convert", "convert_options", "decay_mask", "diagnose", "fold",
    "freeze", "keep_statistics", "load_arrays", "merge", "moments", "norm_mask", "recalibrate", "remat_policy",
    "save_arrays", "trainable_mask",
]  # fmt: skip
