"""Reads images that `abflax.synthesis.dream` has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset
from abflax.errors import InputError

PREFIX = "dreamed:"
IMAGES, STORY = "dreamed.npz", "dreamed.json"


def load_dreamed(directory: str, split: str) -> Dataset:
    """Reads the finished dreams in a folder: training images, and none to test on.

    Args:
      directory: the `workdir` that `dream` was given.
      split: "train".

    Raises:
      ValueError: if there are none, or another split is asked for.
    """
    if split != "train":
        raise InputError(f"dreams are training images: there is no split '{split}' of them")
    story = read_story(directory)
    try:
        with np.load(Path(directory) / IMAGES) as file:
            images, labels = file["images"], file["labels"]
        fields = story["preprocessing"]
        mean, std = (tuple(map(float, fields[name])) for name in ("mean", "std"))
        preprocessing = Preprocessing(mean, std, fields["pad"], fields["flip"])
        classes = story["num_classes"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the dreams in {directory} are damaged: {error}") from error
    return Dataset(images, labels, classes, preprocessing, "dreamed")


def read_story(directory: str) -> dict[str, Any]:
    """Reads how the dreams in a folder were made. Raises `InputError` if there are none."""
    path = Path(directory) / STORY
    try:
        story: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"there are no finished dreams in {directory}: python -m experiments.dream makes some"
        ) from error
    return story
