"""The public names, from the rooms that they are in: what ``import jbn`` gives when the first is asked for."""

from jbn.checking.check import check
from jbn.checking.report import Report
from jbn.choosing import mix, renorm, renorm_schedule
from jbn.comparing.compare import ComparedLayer, Comparison, compare
from jbn.comparing.record import Call, record
from jbn.converting.convert import convert
from jbn.converting.options import convert_options
from jbn.converting.pairing import Match
from jbn.converting.propose import Proposal, propose_names
from jbn.core.choice import Correction
from jbn.core.forward import batch_norm, bn_forward, bn_init, moments
from jbn.core.saved import remat_policy
from jbn.core.state import CountedState, Params, State
from jbn.core.statistics import Moments, merge
from jbn.files import load_arrays, save_arrays
from jbn.folding.kernel import affine, fold
from jbn.folding.links import Folds
from jbn.freezing import decay_mask, freeze, keep_statistics, norm_mask, trainable_mask
from jbn.momentum import cumulative, debiased
from jbn.observing.diagnose import Diagnosis, diagnose
from jbn.observing.findings import Finding, LayerStatistics
from jbn.observing.recalibrate import recalibrate
from jbn.states import merge_states, update
