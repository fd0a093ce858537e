"""Methods and protocols: a name, the phases that it stands for, and how a phase meets two networks.

`METHODS` maps a name to its phases, `PROTOCOLS` the choices that papers leave open.
"""

from abflax.methods.objective import Objective, bind
from abflax.methods.optimizer import SCHEDULES, Optimizer, PhaseSchedule
from abflax.methods.phase import Phase
from abflax.methods.protocols import PROTOCOLS, Protocol, find_protocol
from abflax.methods.registry import METHODS, Method, register_method
from abflax.methods.views import TARGET_DOMAIN, VIEWS, boundary_samples
from abflax.methods.weights import Progressive, Ramp, Schedule

__all__ = [
    "METHODS",
    "PROTOCOLS",
    "SCHEDULES",
    "TARGET_DOMAIN",
    "VIEWS",
    "Method",
    "Objective",
    "Optimizer",
    "Phase",
    "PhaseSchedule",
    "Progressive",
    "Protocol",
    "Ramp",
    "Schedule",
    "bind",
    "boundary_samples",
    "find_protocol",
    "register_method",
]
