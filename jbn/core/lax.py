"""``jax.lax`` as it was when jbn was imported.

JAX keeps the programs of jbn from call to call. What somebody puts into ``jax.lax`` while the first call is traced, as
exporters do, would stay in them.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jax import lax as lax
else:
    lax = SimpleNamespace(**vars(jax.lax))
