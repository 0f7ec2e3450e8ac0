"""AdaMod, Adam with momental bounds on its learning rates, for Optax."""

from importlib.metadata import version as _version

from optax_adamod._adamod import ScaleByAdamodState as ScaleByAdamodState
from optax_adamod._adamod import scale_by_adamod as scale_by_adamod
from optax_adamod._aliases import adamod as adamod
from optax_adamod._aliases import adamodw as adamodw
from optax_adamod._conversions import from_adam as from_adam
from optax_adamod._conversions import from_adamod as from_adamod
from optax_adamod._conversions import from_torch as from_torch
from optax_adamod._diagnostics import HeldByBound as HeldByBound
from optax_adamod._diagnostics import LearningRates as LearningRates
from optax_adamod._diagnostics import held_by_bound as held_by_bound
from optax_adamod._diagnostics import learning_rates as learning_rates
from optax_adamod._float8 import Float8Array as Float8Array
from optax_adamod._histogram import Log10Histogram as Log10Histogram
from optax_adamod._histogram import log10_histogram as log10_histogram
from optax_adamod._rounding import (
    RoundUpdatesStochasticallyState as RoundUpdatesStochasticallyState,
)
from optax_adamod._rounding import (
    round_updates_stochastically as round_updates_stochastically,
)

__version__ = _version("optax-adamod")
