"""Runs networks for their taps, the named pre-activations, and finds what can be tapped."""

from abflax.taps.norms import run_with_norms
from abflax.taps.running import (
    Forward,
    Model,
    Tapped,
    abstract_forward,
    is_nnx,
    module_of,
    number_of_logits,
    require_model,
    run_model,
    side_of,
    sow_features,
    sow_tap,
    split_nnx,
    tap_shapes,
    with_side,
)
from abflax.taps.sides import SWITCHES, Side
from abflax.taps.suggestions import Candidate, marked, moved_statistics, rectified_taps, suggest

__all__ = [
    "SWITCHES",
    "Candidate",
    "Forward",
    "Model",
    "Side",
    "Tapped",
    "abstract_forward",
    "is_nnx",
    "marked",
    "module_of",
    "moved_statistics",
    "number_of_logits",
    "rectified_taps",
    "require_model",
    "run_model",
    "run_with_norms",
    "side_of",
    "sow_features",
    "sow_tap",
    "split_nnx",
    "suggest",
    "tap_shapes",
    "with_side",
]
