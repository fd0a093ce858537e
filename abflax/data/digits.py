"""Optical recognition of handwritten digits (Alpaydin, Kaynak 1998), as scikit-learn ships it."""

from __future__ import annotations

import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset
from abflax.errors import import_extra

_TEST_EXAMPLES = 500


def load_digits(split: str, data_dir: str | None = None) -> Dataset:
    """Loads 1,797 real digits of 8×8 pixels with values 0 … 16: 1,297 for training, 500 held out.

    The split is stratified and fixed. Augmentation: pad 1 and crop, no flip.
    """
    del data_dir
    datasets = import_extra("sklearn.datasets", "digits")
    model_selection = import_extra("sklearn.model_selection", "digits")
    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
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
