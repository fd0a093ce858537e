"""Decodes images: the work of the decoding processes (see `data.decoders`).

Each decoding process runs this file as a script. It imports NumPy and Pillow, but neither abflax
nor JAX, so that a process starts in a quarter of a second and takes little memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

ImageSource = str | tuple[str, str, int]
"""The location of an encoded image: a file, or (folder of a prepared TFDS data set, split, record).
"""

_AREA = (0.08, 1.0)  # of a random crop, as a share of the image
_RATIO = (3 / 4, 4 / 3)  # of its width to its height
_ATTEMPTS = 10
_RESIZED, _CROPPED = 256, 224  # pixels in evaluation; other sizes in proportion
_GAP = 2.0  # a reduced JPEG has at least this many times the resolution of the crop
_LONGEST = 16  # times the shorter side: more of an image is not resized, since none of it is shown
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""


def random_crop(data: bytes, side: int, *key: int) -> np.ndarray:
    """Decodes a random crop of an image, a function of the key.

    This is torchvision's RandomResizedCrop (Szegedy et al., CVPR 2015): 8 to 100 % of the area, a
    ratio of 3/4 to 4/3, bilinear resizing with antialiasing.

    Args:
      data: the encoded image.
      side: height and width of the crop, in pixels.
      *key: (seed, epoch, example).

    Returns:
      `[side, side, 3]`, uint8.
    """
    with _opened(data) as (image, turned):
        # Orientations 5 to 8 are quarter turns.
        width, height = image.size if turned < 5 else (image.height, image.width)
        left, top, wide, high = random_box(width, height, np.random.default_rng(key))
        smaller = min(wide, high) / (_GAP * side)
        if smaller >= 2:  # for large photographs; `draft` has no effect on formats other than JPEG
            image.draft(None, (math.ceil(image.width / smaller), math.ceil(image.height / smaller)))
        pixels = _upright_rgb(image, turned)
        x, y = pixels.width / width, pixels.height / height
        (left, right), (top, bottom) = (left * x, (left + wide) * x), (top * y, (top + high) * y)
        crop = pixels.crop((round(left), round(top), round(right), round(bottom)))
        return np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR))


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws a crop (left, top, width, height) of an upright image, in pixels.

    Its area and ratio are random. After ten that do not fit it is the largest central crop.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = rng.integers(0, (width - wide + 1, height - high + 1))
            return int(left), int(top), wide, high
    wide = min(width, round(height * _RATIO[1]))
    high = min(height, round(width / _RATIO[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high


def centre_crop(data: bytes, side: int) -> np.ndarray:
    """Decodes the center of an image for evaluation, `[side, side, 3]` uint8.

    The image's shorter side is resized to 256/224 of the crop's side, bilinear with antialiasing.
    """
    with _opened(data) as (image, turned):
        pixels = _upright_rgb(image, turned)
    shorter, resized = min(pixels.size), resized_side(side)
    left, top = (max(0, length - _LONGEST * shorter) // 2 for length in pixels.size)
    if left or top:
        pixels = pixels.crop((left, top, pixels.width - left, pixels.height - top))
    width, height = (resized * length // shorter for length in pixels.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(pixels.crop((left, top, left + side, top + side)))


def resized_side(side: int) -> int:
    """The shorter side that an image is resized to before its central crop of that side."""
    return round(side * _RESIZED / _CROPPED)


def inspect(data: bytes) -> str:
    """Decodes an image to its end, as training does, and returns the SHA-256 of its bytes."""
    with _opened(data) as (image, turned):
        image.draft(None, (1, 1))  # decodes a JPEG at an eighth of its size, also to its end
        _upright_rgb(image, turned)
    return hashlib.sha256(data).hexdigest()


def read(place: ImageSource) -> bytes:
    """Reads an encoded image."""
    if isinstance(place, str):
        with open(place, "rb") as file:
            return file.read()
    folder, split, record = place
    return records(folder, split)[record]["image"]


@functools.lru_cache(maxsize=4)
def records(folder: str, split: str) -> Any:
    """Opens a prepared TFDS data set for random access, with encoded images."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    skipped = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split, decoders=skipped)


@contextlib.contextmanager
def _opened(data: bytes) -> Any:
    """Opens an image without decoding it; gives the image and its EXIF orientation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about files that it can read
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(_ORIENTATION)
            yield image, turned if turned in range(9) else 1


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Rotates and converts to RGB; keeps the upper eight of 16 bits, and drops transparency.

    Raises:
      ValueError: for whole numbers beyond 16 bits, and for floats beyond [0, 1].
    """
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow would clip them to 255
        pixels, largest = np.asarray(image), 1.0 if image.mode == "F" else 65535
        if not (pixels.min() >= 0 and pixels.max() <= largest):
            raise ValueError(
                f"an image of mode {image.mode} must lie in [0, {largest:g}], not in "
                f"[{pixels.min():g}, {pixels.max():g}]"
            )
        image = Image.fromarray((pixels / largest * 255).astype(np.uint8))
    return image.convert("RGB")


Task = tuple[str, int | None, ImageSource, tuple[Any, ...]]
"""A task of a process: (name, slot of the shared memory or None, image, further arguments)."""

_WORK: dict[str, Callable[..., Any]] = {
    "random crop": random_crop,
    "centre crop": centre_crop,
    "inspect": inspect,
}


def perform(task: Task, memory: np.ndarray) -> tuple[bool, Any]:
    """Performs a task; returns (True, its result) or (False, the reason for the failure).

    If the task has a slot, the result is written there, and None is returned in its place.
    """
    name, slot, place, arguments = task
    try:
        result = _WORK[name](read(place), *arguments)
    except Exception as error:  # each decoder raises its own errors for a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return False, "no image" if isinstance(error, UnidentifiedImageError) else reason[0]
    if slot is None:
        return True, result
    memory[slot] = result
    return True, None


def serve(connection: Connection, memory: np.ndarray) -> None:
    """Performs lists of tasks until the other end of the connection is closed."""
    # Signals to the whole process group are handled by the process that trains.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send([perform(task, memory) for task in connection.recv()])


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, whatever it is waiting for."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _connection, _memory, _slots, _side = map(int, sys.argv[1:])
    _shape = (_slots, _side, _side, 3)
    _shared = mmap.mmap(_memory, math.prod(_shape))
    serve(Connection(_connection), np.ndarray(_shape, np.uint8, _shared))
