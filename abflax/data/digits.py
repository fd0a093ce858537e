"""Loads scikit-learn's handwritten digits (Alpaydin, Kaynak 1998)."""

from __future__ import annotations

import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset
from abflax.data.image_files import exactly_named
from abflax.errors import import_extra


def load_digits(split: str, data_dir: str | None = None) -> Dataset:
    """Loads 1,797 real digits of 8×8 pixels with values 0 … 16: 1,297 for training, 500 held out.

    The split is stratified and fixed. The augmentation pads by 1 and crops, without flips.
    """
    del data_dir
    datasets = import_extra("sklearn.datasets", "digits")
    model_selection = import_extra("sklearn.model_selection", "digits")
    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
        np.arange(len(digits.target)),
        test_size=500,
        stratify=digits.target,
        random_state=0,
    )
    chosen = {"train": train, "test": test}[split]
    data = Dataset(
        images=digits.images[chosen, :, :, None].astype(np.uint8),
        labels=digits.target[chosen],
        num_classes=10,
        # The mean and standard deviation of the 1,297 training images.
        preprocessing=Preprocessing(mean=(4.88,), std=(6.02,), pad=1),
    )
    return exactly_named(data, "digits")
