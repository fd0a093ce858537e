"""Measures hidden neurons of trained networks on held-out images, and how two networks agree."""

from abflax.analysis.examine import Activity, Examination, Match, boundary_distances, examine
from abflax.analysis.measures import (
    ErrorSplit,
    by_channel,
    by_class,
    dead_neurons,
    error_by_agreement,
    first_order_distance,
    matching,
    pattern_digests,
)

__all__ = [
    "Activity",
    "ErrorSplit",
    "Examination",
    "Match",
    "boundary_distances",
    "by_channel",
    "by_class",
    "error_by_agreement",
    "examine",
    "first_order_distance",
    "matching",
    "pattern_digests",
    "dead_neurons",
]
