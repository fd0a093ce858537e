"""The photographs of the paper's transfer learning, through TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from abflax.data import decoding
from abflax.data.image_files import ImageFiles
from abflax.data.tfds import data_folder, prepare
from abflax.errors import InputError, import_extra, unknown


def _prepare_scenes(name: str, where: Path) -> None:
    tfds = import_extra("tensorflow_datasets", "tfds")  # takes seconds to import

    from abflax.data.mit_indoor import MitIndoorScenes, require_files

    manual = where / "downloads" / "manual"
    require_files(manual)
    builder = MitIndoorScenes(data_dir=where, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual, register_checksums=False)
    )


IMAGE_DATASETS: Mapping[str, Callable[[str, Path], None]] = {
    "caltech_birds2011": prepare,
    "mit_indoor_scenes": _prepare_scenes,
}
"""Name -> what prepares it in a folder, where nothing is prepared.

`caltech_birds2011`: 200 species, 5,994 training and 5,794 test images, 30 of a class at most (Wah
et al. 2011). `mit_indoor_scenes`: 67 classes, 80 training and 20 test images each (Quattoni,
Torralba 2009).
"""


def load_image_files(
    name: str, split: str, data_dir: str | None = None, side: int = 224
) -> ImageFiles:
    """The photographs of that name; images stay on the disk, labels are read.

    Args:
      name: a name in `PHOTOGRAPHS`.
      split: "train" or "test".
      data_dir: where TensorFlow Datasets keeps its data; None: `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      side: of what a network sees, in pixels.

    Raises:
      ValueError: for an unknown name or split, or where the data is not prepared and cannot be.
    """
    if name not in IMAGE_DATASETS:
        raise unknown("dataset of photographs", name, IMAGE_DATASETS)
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    where = data_folder(data_dir)
    if not list(where.glob(f"{name}/*/dataset_info.json")):
        IMAGE_DATASETS[name](name, where)
    folder = str(max(where.glob(f"{name}/*/dataset_info.json")).parent)
    try:
        records = decoding.records(folder, split)
        labels = [int(record["label"]) for record in records]
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{name} in {where} cannot be read: {str(error).strip().splitlines()[0]} "
            "(it must be prepared with file_format='array_record')"
        ) from error
    classes = tuple(records.dataset_info.features["label"].names)
    places = tuple((folder, split, index) for index in range(len(labels)))
    named = name if side == 224 else f"{name}, {side}×{side}"
    return ImageFiles(places, np.array(labels), classes, named, side)
