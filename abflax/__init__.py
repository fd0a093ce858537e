"""Knowledge distillation for JAX and Flax, centred on activation boundaries."""

from abflax.config import Resources, RunConfig, Seeds
from abflax.data import Dataset, load
from abflax.errors import BusyError, DiskError, InputError, LostError, NonFiniteError
from abflax.evaluation import evaluate
from abflax.interrupt import Interrupted
from abflax.loop import Result, distill
from abflax.networks import Network
from abflax.taps import Tapped

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "Dataset",
    "DiskError",
    "InputError",
    "Interrupted",
    "LostError",
    "Network",
    "NonFiniteError",
    "Resources",
    "Result",
    "RunConfig",
    "Seeds",
    "Tapped",
    "distill",
    "evaluate",
    "load",
]
