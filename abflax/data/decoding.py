"""Encoded images to pixels: what the decoding processes do (see `data.decoders`).

Run as a script this file is such a process. It knows NumPy and Pillow, and nothing of abflax or
JAX, so that a process is there in a quarter of a second and takes little memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import mmap
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource = str | tuple[str, str, int]
"""Where an encoded image lies: a file, or (folder of a prepared TFDS data set, split, record)."""

Box = tuple[float, float, float, float]
"""(left, top, width, height) in an upright image's pixels."""

_AREA = (0.08, 1.0)  # of a random crop, as a share of the image
_RATIO = (3 / 4, 4 / 3)  # of its width to its height
_ATTEMPTS = 10
_RESIZED, _CROPPED = 256, 224  # in evaluation; other sizes in proportion
_GAP = 2.0  # a JPEG is decoded at a fraction of its size that is this much larger than is asked for
_ORIENTATION = 0x0112  # the EXIF tag


def random_crop(data: bytes, side: int, *key: int) -> np.ndarray:
    """The crop of an image that a key stands for, `[side, side, 3]` uint8.

    RandomResizedCrop of Szegedy et al. (CVPR 2015) as torchvision has it: a share of 8 to 100 % of
    the area, a ratio of 3/4 to 4/3, bilinear with antialiasing.

    Args:
      data: the encoded image.
      side: height and width of the crop, in pixels.
      *key: (seed, epoch, example).
    """
    rng = np.random.default_rng(key)

    def box(width: int, height: int) -> Box:
        return random_box(width, height, rng)

    with _opened(data) as (image, turned):
        width, height = _upright_size(image, turned)
        left, top, wide, high = box(width, height)
        smaller = min(wide, high) / (_GAP * side)
        if smaller >= 2:  # as a phone's photographs are; other formats than JPEG stay as they are
            image.draft(None, (math.ceil(image.width / smaller), math.ceil(image.height / smaller)))
        pixels = _rgb(_upright(image, turned))
        x, y = pixels.width / width, pixels.height / height
        (left, right), (top, bottom) = (left * x, (left + wide) * x), (top * y, (top + high) * y)
        crop = pixels.crop((round(left), round(top), round(right), round(bottom)))
        return np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR))


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A crop of that share and ratio; after ten that do not fit, the largest central one."""
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
    """The centre of an image, `[side, side, 3]` uint8, as in evaluation.

    Its shorter side is resized to 256/224 of the crop's side, bilinear with antialiasing.
    """
    with _opened(data) as (image, turned):
        pixels = _rgb(_upright(image, turned))
    shorter, resized = min(pixels.size), round(side * _RESIZED / _CROPPED)
    width, height = (resized * length // shorter for length in pixels.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(pixels.crop((left, top, left + side, top + side)))


def inspect(data: bytes) -> str:
    """Decodes an image to its end and returns the SHA-256 of its bytes; raises where it cannot."""
    with _opened(data) as (image, _):
        image.draft(None, (1, 1))  # a JPEG is read to its end too, at an eighth of the size
        image.load()
    return hashlib.sha256(data).hexdigest()


def read(place: ImageSource) -> bytes:
    """The encoded image that lies there."""
    if isinstance(place, str):
        with open(place, "rb") as file:
            return file.read()
    folder, split, record = place
    return records(folder, split)[record]["image"]


@functools.lru_cache(maxsize=4)
def records(folder: str, split: str) -> Any:
    """Random access to a prepared TFDS data set, its images encoded."""
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
    """The image, not yet decoded, and its EXIF orientation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Pillow thinks of a file that it can read
        with Image.open(io.BytesIO(data)) as image:
            yield image, image.getexif().get(_ORIENTATION, 1)


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Five to eight are a quarter turn."""
    return image.size if orientation < 5 else (image.height, image.width)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Greyscale, palettes and CMYK too; of 16 bits the upper eight; transparency is dropped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


Task = tuple[str, int | None, ImageSource, tuple[Any, ...]]
"""What a process is told: (name, slot of the shared memory or None, place, further arguments)."""

_WORK: dict[str, Callable[..., Any]] = {
    "random crop": random_crop,
    "centre crop": centre_crop,
    "inspect": inspect,
}


def perform(task: Task, memory: np.ndarray) -> tuple[bool, Any]:
    """(True, what it gives, if that does not go into a slot), or (False, why it could not)."""
    name, slot, place, arguments = task
    try:
        found = _WORK[name](read(place), *arguments)
    except Exception as error:  # each decoder has its own for a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return False, "no image" if isinstance(error, UnidentifiedImageError) else reason[0]
    if slot is None:
        return True, found
    memory[slot] = found
    return True, None


def serve(connection: Connection, memory: np.ndarray) -> None:
    """Performs lists of tasks until nobody is at the other end any more."""
    for each in (signal.SIGINT, signal.SIGTERM):  # a group may get them; they are for who trains
        signal.signal(each, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send([perform(task, memory) for task in connection.recv()])


if __name__ == "__main__":
    _connection, _memory, _slots, _side = map(int, sys.argv[1:])
    _shape = (_slots, _side, _side, 3)
    _shared = mmap.mmap(_memory, math.prod(_shape))
    serve(Connection(_connection), np.ndarray(_shape, np.uint8, _shared))
