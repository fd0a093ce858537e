"""CIFAR through TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset
from abflax.errors import InputError, import_extra

_CIFAR10 = Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), pad=4, flip=True)
_CIFAR100 = Preprocessing(mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4), pad=4, flip=True)
_CHUNK = 5000


def load_cifar10(split: str, data_dir: str | None = None) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images, 32×32×3, uint8."""
    images, labels = _read("cifar10", split, data_dir)
    return Dataset(images, labels, num_classes=10, preprocessing=_CIFAR10, name="cifar10")


def load_cifar100(split: str, data_dir: str | None = None) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009): as CIFAR-10, with the hundred fine labels."""
    images, labels = _read("cifar100", split, data_dir)
    return Dataset(images, labels, num_classes=100, preprocessing=_CIFAR100, name="cifar100")


def _read(name: str, split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a prepared data set; prepares it first where nothing lies there."""
    tfds = import_extra("tensorflow_datasets", "tfds")  # takes seconds to import

    logging.getLogger("absl").setLevel(logging.ERROR)  # it would rather have OpenCV, and says so
    where = data_folder(data_dir)
    if not list(where.glob(f"{name}/*/dataset_info.json")):
        prepare(name, where)
    try:
        source = tfds.data_source(name, split=split, data_dir=where)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{name} in {where} cannot be read: {str(error).strip().splitlines()[0]} "
            "(it must be prepared with file_format='array_record')"
        ) from error
    images, labels = [], []
    for start in range(0, len(source), _CHUNK):
        for example in source.__getitems__(range(start, min(start + _CHUNK, len(source)))):
            images.append(example["image"])
            labels.append(example["label"])
    return np.stack(images), np.asarray(labels)


def data_folder(data_dir: str | None) -> Path:
    """Where TensorFlow Datasets keeps its data: as told, else by `TFDS_DATA_DIR`, else at home."""
    where = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    return where.expanduser()


def prepare(name: str, where: Path) -> None:
    """Downloads and prepares a data set as ArrayRecord, which needs TensorFlow."""
    tfds = import_extra("tensorflow_datasets", "tfds")

    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"there is no prepared {name} in {where}, and preparing it needs TensorFlow: "
            'pip install "tensorflow>=2.16"  (or name the right place with --data-dir or '
            "TFDS_DATA_DIR)"
        )
    builder = tfds.builder(name, data_dir=where, file_format="array_record")
    builder.download_and_prepare()
