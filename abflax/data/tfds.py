"""Loads CIFAR from TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset
from abflax.data.image_files import exactly_named
from abflax.errors import InputError, import_extra, local_path, unknown

_CIFAR10 = Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), pad=4, flip=True)
_CIFAR100 = Preprocessing(mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4), pad=4, flip=True)
# Pixels as EfficientNet-Lite's published weights see them.
_ENLARGED = Preprocessing(mean=(127.0,) * 3, std=(128.0,) * 3, pad=8, flip=True)
_CHUNK = 5000


def load_cifar10(split: str, data_dir: str | None = None) -> Dataset:
    """Loads CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images, 32×32×3, uint8."""
    images, labels = _read("cifar10", split, data_dir)
    return exactly_named(Dataset(images, labels, 10, _CIFAR10), "cifar10")


def load_cifar10_64(split: str, data_dir: str | None = None) -> Dataset:
    """Loads CIFAR-10 enlarged to 64×64 by Pillow's bicubic filter, for networks of ImageNet.

    Pixels are normalized as EfficientNet-Lite's, (x − 127)/128. The training images take 614 MB.
    """
    small = load_cifar10(split, data_dir)
    images = np.empty((len(small), 64, 64, 3), np.uint8)
    for large, image in zip(images, small.images, strict=True):
        large[:] = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    images.flags.writeable = False
    return exactly_named(Dataset(images, small.labels, 10, _ENLARGED), "cifar10-64")


def load_cifar100(split: str, data_dir: str | None = None) -> Dataset:
    """Loads CIFAR-100 (Krizhevsky 2009): as CIFAR-10, with the hundred fine labels."""
    images, labels = _read("cifar100", split, data_dir)
    return exactly_named(Dataset(images, labels, 100, _CIFAR100), "cifar100")


def _read(name: str, split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images and labels of a data set; prepares it first if that is not done yet."""
    tfds = import_extra("tensorflow_datasets", "tfds")  # takes seconds to import
    folder = data_folder(data_dir)
    if not list(folder.glob(f"{name}/*/dataset_info.json")):
        prepare(name, folder)
    examples = []
    with reading(name, split, folder):
        source = tfds.data_source(name, split=split, data_dir=folder)
        for start in range(0, len(source), _CHUNK):
            examples += source.__getitems__(range(start, min(start + _CHUNK, len(source))))
    images = np.stack([example["image"] for example in examples])
    images.flags.writeable = False  # so that the data set need not copy them
    return images, np.asarray([example["label"] for example in examples])


def require_known(kind: str, name: str, split: str, names: Collection[str]) -> None:
    """Raises `UnknownNameError` unless the data set is one of the names, and the split exists."""
    if name not in names:
        raise unknown(kind, name, names)
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))


def data_folder(data_dir: str | None) -> Path:
    """Returns the data directory: the given one, else `TFDS_DATA_DIR`, else the default of TFDS."""
    return local_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def prepare(name: str, folder: Path) -> None:
    """Downloads and prepares a data set as ArrayRecord, which needs TensorFlow."""
    tfds = import_extra("tensorflow_datasets", "tfds")
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"there is no prepared {name} in {folder}, and preparing it needs TensorFlow: "
            'pip install "tensorflow>=2.16"  (or name the right place with --data-dir or '
            "TFDS_DATA_DIR)"
        )
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


@contextlib.contextmanager
def reading(name: str, split: str, folder: Path) -> Iterator[None]:
    """Reads a prepared data set inside a `with` block.

    Raises:
      ValueError: if it cannot be read; the message names the file that is damaged.
    """
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # hides the advice to install OpenCV
    try:
        yield
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        for path in sorted(folder.glob(f"{name}/*/{name}-{split}.array_record*")):
            if damage := _damage(path):
                raise InputError(f"{path} is damaged: {damage}; prepare {name} again") from error
        raise InputError(
            f"{name} in {folder} cannot be read: {reason} "
            "(it must be prepared with file_format='array_record')"
        ) from error
    finally:
        absl.setLevel(level)


def _damage(path: Path) -> str | None:
    """Says why a file of records cannot be read to its end; None: it can."""
    module = import_extra("array_record.python.array_record_module", "tfds")
    try:
        records = module.ArrayRecordReader(str(path)).read_all()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None if records else "it holds nothing"
