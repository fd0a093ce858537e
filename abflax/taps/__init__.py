"""Taps: a network's named pre-activations, and the one way to run a network for them."""

from abflax.taps.running import (
    Forward,
    Model,
    Tapped,
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
