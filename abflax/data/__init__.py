"""Data sets as arrays in memory, their subsets, order and augmentation.

`DATASETS` maps a name to a function (split, data directory or None) -> `Dataset`.
"""

from abflax.data.augmentation import Preprocessing, augment, draw_views, normalise, view
from abflax.data.dataset import Dataset, holdout, subset
from abflax.data.registry import DATASETS, load
from abflax.data.stream import Stream

__all__ = [
    "DATASETS",
    "Dataset",
    "Preprocessing",
    "Stream",
    "augment",
    "draw_views",
    "holdout",
    "load",
    "normalise",
    "subset",
    "view",
]
