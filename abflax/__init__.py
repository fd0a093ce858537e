"""Knowledge distillation for JAX and Flax, centred on activation boundaries."""

from abflax.config import Resources, RunConfig, Seeds
from abflax.data import Batches, Dataset, load
from abflax.distillation import distill, distill_group
from abflax.errors import BusyError, DiskError, InputError, LostError, NonFiniteError
from abflax.models.network import Network
from abflax.runtime.preemption import Interrupted
from abflax.runtime.reporter import Reporter
from abflax.taps import Tapped
from abflax.training.evaluation import evaluate
from abflax.training.run_directory import Result

__version__ = "0.2.0"

__all__ = [
    "Batches",
    "BusyError",
    "Dataset",
    "DiskError",
    "InputError",
    "Interrupted",
    "LostError",
    "Network",
    "NonFiniteError",
    "Reporter",
    "Resources",
    "Result",
    "RunConfig",
    "Seeds",
    "Tapped",
    "distill",
    "distill_group",
    "evaluate",
    "load",
]
