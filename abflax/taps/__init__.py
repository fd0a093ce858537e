"""Runs networks for their taps, the named pre-activations, and finds what can be tapped."""

from abflax.taps.running import (
    Forward,
    Model,
    Tapped,
    abstract_forward,
    depth_order,
    in_mode,
    module_of,
    number_of_logits,
    run_model,
    sow_features,
    sow_tap,
    tap_shapes,
)
from abflax.taps.suggestions import Candidate, marked, suggest

__all__ = [
    "Candidate",
    "Forward",
    "Model",
    "Tapped",
    "abstract_forward",
    "depth_order",
    "in_mode",
    "marked",
    "module_of",
    "number_of_logits",
    "run_model",
    "sow_features",
    "sow_tap",
    "suggest",
    "tap_shapes",
]
