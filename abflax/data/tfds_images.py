"""Loads the image data sets of the paper's transfer learning, from TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from abflax.data import decoding
from abflax.data.image_files import ImageFiles, exactly_named
from abflax.data.tfds import data_folder, prepare, reading, require_known
from abflax.errors import import_extra


def _prepare_scenes(name: str, folder: Path) -> None:
    tfds = import_extra("tensorflow_datasets", "tfds")  # takes seconds to import

    from abflax.data.mit_indoor import MitIndoorScenes, require_files

    manual = folder / "downloads" / "manual"
    require_files(manual)
    builder = MitIndoorScenes(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual, register_checksums=False)
    )


IMAGE_DATASETS: Mapping[str, Callable[[str, Path], None]] = {
    "caltech_birds2011": prepare,
    "mit_indoor_scenes": _prepare_scenes,
}
"""Name -> a function (name, folder) that prepares the data set in the folder.

`caltech_birds2011`: 200 species, 5,994 training and 5,794 test images, at most 30 per class (Wah
et al. 2011). `mit_indoor_scenes`: 67 classes, 80 training and 20 test images each (Quattoni,
Torralba 2009).
"""


def load_image_files(
    name: str, split: str, data_dir: str | None = None, side: int = 224
) -> ImageFiles:
    """Loads the labels of a data set in `IMAGE_DATASETS`, whose images stay on disk.

    The arguments are as for `abflax.data.load`; `side` is the height and width of the network's
    input, in pixels.

    Raises:
      ValueError: if the name or split is unknown, or the data is not prepared and cannot be.
    """
    require_known("dataset of photographs", name, split, IMAGE_DATASETS)
    root = data_folder(data_dir)
    if not list(root.glob(f"{name}/*/dataset_info.json")):
        IMAGE_DATASETS[name](name, root)
    folder = str(max(root.glob(f"{name}/*/dataset_info.json")).parent)
    with reading(name, split, root):
        records = decoding.records(folder, split)
        labels = [int(record["label"]) for record in records]
    classes = tuple(records.dataset_info.features["label"].names)
    places = tuple((folder, split, index) for index in range(len(labels)))
    files = ImageFiles(places, np.array(labels), classes, name, side)
    return exactly_named(files, name if side == 224 else f"{name}, {side}×{side}")
