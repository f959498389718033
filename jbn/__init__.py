"""Batch normalization for JAX: exact statistics, one derivative, state in and state out."""

from jbn.checking import check as check
from jbn.converting.convert import convert as convert
from jbn.converting.options import convert_options as convert_options
from jbn.core.forward import Params as Params
from jbn.core.forward import State as State
from jbn.core.forward import batch_norm as batch_norm
from jbn.core.forward import bn_forward as bn_forward
from jbn.core.forward import bn_init as bn_init
from jbn.core.forward import moments as moments
from jbn.core.saved import remat_policy as remat_policy
from jbn.core.statistics import Moments as Moments
from jbn.core.statistics import merge as merge
from jbn.files import load_arrays as load_arrays
from jbn.files import save_arrays as save_arrays
from jbn.folding.kernel import affine as affine
from jbn.folding.kernel import fold as fold
from jbn.freezing import decay_mask as decay_mask
from jbn.freezing import freeze as freeze
from jbn.freezing import trainable_mask as trainable_mask
from jbn.observing.diagnose import Diagnosis as Diagnosis
from jbn.observing.diagnose import diagnose as diagnose
from jbn.observing.recalibrate import recalibrate as recalibrate
from jbn.version import __version__ as __version__
