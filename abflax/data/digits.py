"""Optical recognition of handwritten digits (Alpaydin, Kaynak 1998), as scikit-learn ships it."""

from __future__ import annotations

import numpy as np
import sklearn.datasets
import sklearn.model_selection

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset

_TEST_EXAMPLES = 500


def load_digits(split: str, data_dir: str | None = None) -> Dataset:
    """1,797 real digits of 8×8 pixels with values 0 … 16: 1,297 to train on, 500 held out.

    The split is stratified and fixed. Augmentation: pad 1 and crop; a mirrored digit is none.
    """
    del data_dir
    digits = sklearn.datasets.load_digits()
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(digits.target)),
        test_size=_TEST_EXAMPLES,
        stratify=digits.target,
        random_state=0,
    )
    chosen = {"train": train, "test": test}[split]
    return Dataset(
        images=digits.images[chosen, :, :, None].astype(np.uint8),
        labels=digits.target[chosen],
        num_classes=10,
        # Mean and deviation of the 1,297 training images.
        preprocessing=Preprocessing(mean=(4.88,), std=(6.02,), pad=1),
        name="digits",
    )
