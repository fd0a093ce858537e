"""Computes losses, elementwise or per example; the functions are pure and never reduce the batch.

Sums over neurons, divisions by the batch size, per-layer weights and constants belong to the
terms and the methods, which name their sources. Arguments are in the order `(student, teacher)`.
Inputs of lower precision than float32 are computed in float32. Shapes that differ raise
`ValueError`.
"""

from abflax.losses.activation import (
    activation_indicator,
    activation_transfer_hinge,
    activation_transfer_loss,
)
from abflax.losses.attention import attention_map, attention_transfer
from abflax.losses.classification import cross_entropy, knowledge_distillation
from abflax.losses.decoupled import decoupled_distillation
from abflax.losses.discrepancy import linear_time_discrepancy, maximum_mean_discrepancy
from abflax.losses.factors import factor_transfer
from abflax.losses.features import feature_difference, positions_pooled
from abflax.losses.gram import fsp, gram_between
from abflax.losses.images import (
    agreement_of_logits,
    batch_norm_statistics_loss,
    total_variation,
)
from abflax.losses.jacobian import (
    attention_pixel_cotangent,
    jacobian_difference,
    largest_attention_pixel,
)
from abflax.losses.logits import centred_logits_difference
from abflax.losses.nst import channel_patterns, neuron_selectivity
from abflax.losses.overhaul import overhaul_difference, overhaul_margin
from abflax.losses.pairs import (
    correlation_congruence,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from abflax.losses.review import hierarchical_context
from abflax.losses.standardized import correlation_distillation, standardized_logits
from abflax.losses.variational import variational_information

__all__ = [
    "activation_indicator",
    "activation_transfer_hinge",
    "activation_transfer_loss",
    "agreement_of_logits",
    "attention_map",
    "attention_pixel_cotangent",
    "attention_transfer",
    "batch_norm_statistics_loss",
    "centred_logits_difference",
    "channel_patterns",
    "correlation_congruence",
    "correlation_distillation",
    "cross_entropy",
    "decoupled_distillation",
    "factor_transfer",
    "feature_difference",
    "fsp",
    "gram_between",
    "hierarchical_context",
    "jacobian_difference",
    "knowledge_distillation",
    "largest_attention_pixel",
    "linear_time_discrepancy",
    "maximum_mean_discrepancy",
    "neuron_selectivity",
    "overhaul_difference",
    "overhaul_margin",
    "positions_pooled",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "standardized_logits",
    "total_variation",
    "variational_information",
]
