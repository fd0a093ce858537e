"""Reads a folder of images, `train/CLASS/…` and `test/CLASS/…`, and checks it for mistakes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from abflax.data.dataset import holdout
from abflax.data.decoders import inspect
from abflax.data.image_files import ImageFiles, exactly_named
from abflax.errors import InputError

MOST_BROKEN = 0.01
"""The share of files that may be broken, by default."""

_NAMED = 3  # a message names at most this many files or classes
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A class folder's images.

    Attributes:
      train: the training images.
      test: the held-out images.
      notes: what was skipped or looks wrong, a sentence each.
    """

    train: ImageFiles
    test: ImageFiles
    notes: tuple[str, ...]


def read_folder(
    root: str | Path,
    *,
    side: int = 224,
    held_out: float | None = None,
    most_broken: float = MOST_BROKEN,
    workers: int | None = None,
) -> Folder:
    """Reads a folder of images, and decodes each image once to check it.

    The folder holds `train/CLASS/FILE` and `test/CLASS/FILE`; with `held_out` it holds only
    `train/CLASS/FILE` or `CLASS/FILE`. Files may have any format that Pillow reads. Hidden files,
    pipes, sockets and devices are skipped. The images are sorted by their paths, the classes by
    their names.

    Args:
      root: the folder.
      side: height and width of the network's input, in pixels.
      held_out: the share of each class that is held out for testing if there is no test folder;
        with seed 0 (see `abflax.data.holdout`).
      most_broken: the share of files that may be damaged or no images; they are skipped.
      workers: processes that decode; None: one per core.

    Raises:
      ValueError: if the folder has another structure, or too many files are broken.
    """
    root = Path(root)
    if not 0 <= most_broken < 1:
        raise InputError(f"the share of broken files must be in [0, 1), not {most_broken}")
    folders = _splits(root, held_out)
    files = {split: _files(folder) for split, folder in folders.items()}
    classes = sorted({path.parent.name for path in files["train"]})
    if len(classes) < 2:
        raise InputError(
            f"{folders['train']} has the one class {classes[0]}; it needs at least two"
        )
    if unknown := sorted({path.parent.name for path in files.get("test", ())} - set(classes)):
        raise InputError(f"{folders['test']} has the class {_several(unknown)}, which train lacks")
    all_files = [path for paths in files.values() for path in paths]
    checked = dict(zip(all_files, inspect(list(map(str, all_files)), workers), strict=True))
    broken = [f"{path} ({reason})" for path, (good, reason) in checked.items() if not good]
    if len(broken) > most_broken * len(all_files):
        raise InputError(
            f"{len(broken)} of {len(all_files)} files cannot be read as images, more than the "
            f"{100 * most_broken:g} % that may be broken: {_several(broken)}"
        )
    notes = []
    if broken:
        notes.append(f"{len(broken)} of {len(all_files)} files were skipped: {_several(broken)}")
    notes += _in_several_classes(checked)
    parts: dict[str, ImageFiles] = {}
    for split, paths in files.items():
        good = [path for path in paths if checked[path][0]]
        if unreadable := sorted({p.parent for p in paths} - {p.parent for p in good}):
            raise InputError(f"the class {unreadable[0]} has no image that can be read")
        labels = [classes.index(path.parent.name) for path in good]
        places = tuple(str(path.absolute()) for path in good)
        contents = (
            f"{label} {checked[path][1]}\n" for label, path in zip(labels, good, strict=True)
        )
        name = f"photographs:{hashlib.sha256(''.join(contents).encode()).hexdigest()[:12]}"
        read = ImageFiles(places, np.array(labels), tuple(classes), name, side)
        parts[split] = exactly_named(read, f"{name}, {side}×{side}")
    if held_out is not None:
        return Folder(*holdout(parts["train"], held_out, seed=0), tuple(notes))
    train_digests = {checked[path][1] for path in files["train"] if checked[path][0]}
    if both := [str(path) for path in files["test"] if checked[path][1] in train_digests]:
        notes.append(f"{len(both)} test images are training images too: {_several(both)}")
    return Folder(parts["train"], parts["test"], tuple(notes))


def _in_several_classes(checked: Mapping[Path, tuple[bool, str]]) -> list[str]:
    """A note on files with the same bytes in different classes, if there are any."""
    same: dict[str, list[Path]] = {}
    for path, (good, digest) in checked.items():
        if good:
            same.setdefault(digest, []).append(path)
    names = [
        " = ".join(map(str, paths))
        for paths in same.values()
        if len({path.parent.name for path in paths}) > 1
    ]
    many = f"{len(names)} images are in more than one class: {_several(names)}"
    return [many] if names else []


def _splits(root: Path, held_out: float | None) -> dict[str, Path]:
    """Finds the folder of each split."""
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    folders = {name: root / name for name in ("train", "test") if (root / name).is_dir()}
    offer = "--holdout 0.2 holds out a fifth of each class"
    if "test" in folders and "train" not in folders:
        raise InputError(f"{root} has a test folder but no train folder")
    if "test" in folders and held_out is not None:
        raise InputError(f"{root} has a test folder, so nothing is held out for testing")
    if "test" not in folders and folders and held_out is None:
        raise InputError(f"{root} has a train folder but no test folder; {offer}")
    if folders:
        return folders
    if not any(path.is_dir() for path in _visible(root)):
        raise InputError(f"{root} has no train and test folders, and no folder of a class either")
    if held_out is None:
        raise InputError(f"{root} is not split into train and test folders; {offer}")
    return {"train": root}


def _files(folder: Path) -> list[Path]:
    """Lists the files of a split's classes."""
    files = []
    for path in _visible(folder):
        if not path.is_dir():
            if path.suffix.lower() not in _SUFFIXES:
                continue  # such as a list or a license
            raise InputError(f"{path} lies beside the folders of the classes, so it has no class")
        images = [each for each in _visible(path) if not _is_special(each)]
        if not images:
            raise InputError(f"the class {path} is empty")
        if subfolders := [image for image in images if image.is_dir()]:
            raise InputError(f"{subfolders[0]} is a folder, where the images of a class should be")
        files += images
    if not files:
        raise InputError(f"{folder} has no folder of a class")
    return files


def _is_special(path: Path) -> bool:
    """Whether this is a pipe, a socket or a device; a link that leads nowhere is not."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _several(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
