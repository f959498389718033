"""Batch normalization for JAX: exact statistics, one derivative, state in and state out."""

from ._check import check as check
from ._convert import convert as convert
from ._convert_options import convert_options as convert_options
from ._diagnose import Diagnosis as Diagnosis
from ._diagnose import diagnose as diagnose
from ._fold import affine as affine
from ._fold import fold as fold
from ._forward import Params as Params
from ._forward import State as State
from ._forward import batch_norm as batch_norm
from ._forward import bn_forward as bn_forward
from ._forward import bn_init as bn_init
from ._forward import moments as moments
from ._freeze import decay_mask as decay_mask
from ._freeze import freeze as freeze
from ._freeze import trainable_mask as trainable_mask
from ._moments import Moments as Moments
from ._moments import merge as merge
from ._recalibrate import recalibrate as recalibrate
from ._remat import remat_policy as remat_policy
from .files import load_arrays as load_arrays
from .files import save_arrays as save_arrays

__version__ = "0.1.0"
