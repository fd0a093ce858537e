"""Methods and protocols: a name, the phases that it stands for, and how a phase meets two networks.

`METHODS` maps a name to its phases, `PROTOCOLS` the choices that papers leave open.
"""

from abflax.methods.objective import Objective, bind
from abflax.methods.optimizer import SCHEDULES, Optimizer, PhaseSchedule
from abflax.methods.phase import Phase, Ramp
from abflax.methods.protocols import PROTOCOLS, Protocol, find_protocol
from abflax.methods.registry import METHODS, Method, register_method
from abflax.methods.views import VIEWS, boundary_samples

__all__ = [
    "METHODS",
    "PROTOCOLS",
    "SCHEDULES",
    "VIEWS",
    "Method",
    "Objective",
    "Optimizer",
    "Phase",
    "PhaseSchedule",
    "Protocol",
    "Ramp",
    "bind",
    "boundary_samples",
    "find_protocol",
    "register_method",
]
