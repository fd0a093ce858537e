"""The data sets that have a name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from abflax.data.dataset import Dataset
from abflax.data.digits import load_digits
from abflax.data.tfds import load_cifar10, load_cifar100
from abflax.errors import unknown

DATASETS: Mapping[str, Callable[[str, str | None], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": load_digits,
}
"""Name -> a function (split, data directory or None) -> `Dataset`."""


@functools.lru_cache(maxsize=4)
def load(name: str, split: str, data_dir: str | None = None) -> Dataset:
    """The data set of that name, read into memory once per process.

    Args:
      name: a name in `abflax.data.DATASETS`.
      split: "train" or "test".
      data_dir: where TensorFlow Datasets keeps its data; None: `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`. Data sets that come with a package need none.

    Raises:
      ValueError: for an unknown name or split, or where the data is not prepared and cannot be.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    return DATASETS[name](split, data_dir)
