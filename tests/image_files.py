"""Folders of small photographs, drawn: each class has a colour of its own, and noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"airplane": (90, 130, 210), "cat": (190, 120, 70), "ship": (60, 150, 130)}


def draw(colour, rng, width=48, height=40):
    """A noisy picture of a colour, brighter to the right."""
    pixels = np.asarray(colour) + rng.normal(0, 25, (height, width, 3))
    pixels += np.linspace(-40, 40, width)[None, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_folder(root: Path, train: int = 10, test: int = 4, suffix: str = ".png") -> Path:
    """`train/CLASS/…` and `test/CLASS/…`, so many of each of three classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                draw(colour, rng).save(root / split / name / f"{number:02}{suffix}")
    return root
