"""Data sets as arrays in memory, their subsets, order and augmentation."""

from abflax.data.augmentation import Preprocessing, augment, normalise
from abflax.data.dataset import Dataset, holdout, subset
from abflax.data.registry import DATASETS, load
from abflax.data.stream import Stream

__all__ = [
    "DATASETS",
    "Dataset",
    "Preprocessing",
    "Stream",
    "augment",
    "holdout",
    "load",
    "normalise",
    "subset",
]
