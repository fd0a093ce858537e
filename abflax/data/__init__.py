"""Loads data sets, in memory or as image files on disk; selects, orders and augments examples.

`DATASETS` maps a name to a function (split, data directory or None) -> `Dataset`.
`IMAGE_DATASETS` maps a name to the function that prepares the data for `load_image_files`.
"""

from abflax.data.augmentation import (
    Augment,
    OwnAugmentation,
    Preprocessing,
    augment,
    draw_views,
    normalize,
    view,
)
from abflax.data.batches import Batches, BatchReader
from abflax.data.dataset import Dataset, DataSets, few_shot_subset, holdout, subset
from abflax.data.decoders import DecodedBatches
from abflax.data.folder import Folder, read_folder
from abflax.data.image_files import ImageFiles
from abflax.data.registry import CLASSES, DATASETS, load
from abflax.data.stream import Stream
from abflax.data.tfds_images import IMAGE_DATASETS, load_image_files

TrainData = Dataset | ImageFiles | Batches
"""What a run can be trained on."""

__all__ = [
    "CLASSES",
    "DATASETS",
    "IMAGE_DATASETS",
    "Augment",
    "BatchReader",
    "Batches",
    "DecodedBatches",
    "DataSets",
    "Dataset",
    "Folder",
    "ImageFiles",
    "OwnAugmentation",
    "Preprocessing",
    "Stream",
    "TrainData",
    "augment",
    "draw_views",
    "holdout",
    "load",
    "load_image_files",
    "normalize",
    "read_folder",
    "few_shot_subset",
    "subset",
    "view",
]
