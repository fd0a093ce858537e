"""Loads data sets that fit in memory by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from abflax.data import digits, tfds
from abflax.data.dataset import Dataset
from abflax.data.dreamed import PREFIX, load_dreamed, read_story
from abflax.errors import require_instances

DATASETS: Mapping[str, Callable[[str, str | None], Dataset]] = {
    "cifar10": tfds.load_cifar10,
    "cifar10-64": tfds.load_cifar10_64,
    "cifar100": tfds.load_cifar100,
    "digits": digits.load_digits,
}
"""Name -> a function (split, data directory or None) -> `Dataset`."""


CLASSES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("cifar10", "cifar10-64"),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "digits": tuple("0123456789"),
}
"""Name -> the names of its classes, in the order of the labels, for some of `DATASETS`."""


def load(name: str, split: str, data_dir: str | None = None) -> Dataset:
    """Loads the data set of that name, once per process.

    Args:
      name: a name in `abflax.data.DATASETS`; or "dreamed:DIR", what `abflax.synthesis.dream` has
        made there, whose test split is that of the data set that it stands for.
      split: "train" or "test".
      data_dir: the data directory of TensorFlow Datasets; None: `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`. "digits" does not use it.

    Raises:
      ValueError: if the name or split is unknown, or the data is not prepared and cannot be.
    """
    require_instances({
        "name": (name, str), "split": (split, str), "data_dir": (data_dir, str | None)
    })  # fmt: skip
    return _load(name, split, data_dir)


@functools.lru_cache(maxsize=4)
def _load(name: str, split: str, data_dir: str | None) -> Dataset:
    if name.startswith(PREFIX):
        directory = name.removeprefix(PREFIX)
        if split == "train":
            return load_dreamed(directory, split)
        name = str(read_story(directory)["stands_for"])
    tfds.require_known("dataset", name, split, DATASETS)
    return DATASETS[name](split, data_dir)
