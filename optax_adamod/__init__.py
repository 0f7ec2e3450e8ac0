"""AdaMod, Adam with momental bounds on its learning rates, for Optax."""

from importlib.metadata import version as _version

from optax_adamod._adamod import ScaleByAdamodState as ScaleByAdamodState
from optax_adamod._adamod import adamod as adamod
from optax_adamod._adamod import adamodw as adamodw
from optax_adamod._adamod import scale_by_adamod as scale_by_adamod

__version__ = _version("optax-adamod")
