"""Data sets, in memory or as photographs on the disk, their subsets, order and augmentation.

`DATASETS` maps a name to a function (split, data directory or None) -> `Dataset`; `PHOTOGRAPHS`
maps a name to what prepares the photographs that `load_photographs` reads.
"""

from abflax.data.augmentation import Preprocessing, augment, draw_views, normalise, view
from abflax.data.dataset import Dataset, holdout, shots, subset
from abflax.data.decoders import Batches
from abflax.data.folder import Folder, read_folder
from abflax.data.photographs import Photographs
from abflax.data.published import PHOTOGRAPHS, load_photographs
from abflax.data.registry import DATASETS, load
from abflax.data.stream import Stream

__all__ = [
    "DATASETS",
    "PHOTOGRAPHS",
    "Batches",
    "Dataset",
    "Folder",
    "Photographs",
    "Preprocessing",
    "Stream",
    "augment",
    "draw_views",
    "holdout",
    "load",
    "load_photographs",
    "normalise",
    "read_folder",
    "shots",
    "subset",
    "view",
]
