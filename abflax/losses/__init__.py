"""Pure functions of arrays: elementwise or per example, never reduced over the batch.

Sums over neurons, divisions by the batch size, per-layer weights and constants belong to the
terms and the methods, which name their sources. Arguments come as `(student, teacher)`. Inputs
below float32 are computed in float32. Shapes that differ raise `ValueError`.
"""

from abflax.losses.activation import (
    activation_indicator,
    activation_transfer_hinge,
    activation_transfer_loss,
)
from abflax.losses.classification import cross_entropy, knowledge_distillation

__all__ = [
    "activation_indicator",
    "activation_transfer_hinge",
    "activation_transfer_loss",
    "cross_entropy",
    "knowledge_distillation",
]
