"""A folder of photographs: `train/CLASS/…` and `test/CLASS/…`, and the mistakes one makes in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from abflax.data.dataset import holdout
from abflax.data.decoders import inspect
from abflax.data.image_files import ImageFiles, contents_name
from abflax.errors import InputError

MOST_BROKEN = 0.01
"""The share of files that may be broken, unless told otherwise."""

_NAMED = 3  # of several mistakes of one kind, so many are named
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `read_folder` found.

    Attributes:
      train, test: the photographs.
      notes: sentences on what was skipped or looks wrong.
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
    """The photographs of a folder, every one decoded once to see whether it can be.

    It holds `train/CLASS/FILE` and `test/CLASS/FILE`, or with `held_out` `train/CLASS/FILE` or
    `CLASS/FILE` alone. Files may be whatever Pillow reads; hidden ones are passed over. The order
    is that of the sorted paths, the labels that of the sorted names of the classes.

    Args:
      root: the folder.
      side: of what a network sees, in pixels.
      held_out: the share of each class that is held out for testing, where there is no test folder;
        by seed 0 (see `abflax.data.holdout`).
      most_broken: the share of files that may be no images, or damaged; they are skipped.
      workers: processes that decode; None: one a core.

    Raises:
      ValueError: naming what is not as it should be.
    """
    root = Path(root)
    if not 0 <= most_broken < 1:
        raise InputError(f"the share of broken files must be in [0, 1), not {most_broken}")
    folders = _splits(root, held_out)
    files = {split: _files(folder) for split, folder in folders.items()}
    classes = sorted({path.parent.name for path in files["train"]})
    if len(classes) < 2:
        raise InputError(f"{folders['train']} has the one class {classes[0]}; two are the least")
    if unknown := sorted({path.parent.name for path in files.get("test", ())} - set(classes)):
        raise InputError(f"{folders['test']} has the class {_several(unknown)}, which train lacks")
    everything = [path for paths in files.values() for path in paths]
    found = dict(zip(everything, inspect(list(map(str, everything)), workers), strict=True))
    broken = [f"{path} ({reason})" for path, (good, reason) in found.items() if not good]
    if len(broken) > most_broken * len(everything):
        raise InputError(
            f"{len(broken)} of {len(everything)} files cannot be read as images, more than the "
            f"{100 * most_broken:g} % that may be broken: {_several(broken)}"
        )
    notes = []
    if broken:
        notes.append(f"{len(broken)} of {len(everything)} files were skipped: {_several(broken)}")
    parts: dict[str, ImageFiles] = {}
    for split, paths in files.items():
        good = [path for path in paths if found[path][0]]
        _require_every_class(folders[split], paths, good)
        labels = [classes.index(path.parent.name) for path in good]
        name = contents_name("photographs", labels, [found[path][1] for path in good], side)
        parts[split] = ImageFiles(
            tuple(str(path.absolute()) for path in good), np.array(labels), tuple(classes), name,
            side,
        )  # fmt: skip
    if held_out is not None:
        return Folder(*holdout(parts["train"], held_out, seed=0), tuple(notes))
    seen = {found[path][1] for path in files["train"] if found[path][0]}
    if both := [str(path) for path in files["test"] if found[path][1] in seen]:
        notes.append(f"{len(both)} test images are training images too: {_several(both)}")
    return Folder(parts["train"], parts["test"], tuple(notes))


def _splits(root: Path, held_out: float | None) -> dict[str, Path]:
    """Split -> its folder."""
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    train, test = root / "train", root / "test"
    offer = "--holdout 0.2 holds out a fifth of each class"
    if train.is_dir() and test.is_dir():
        if held_out is not None:
            raise InputError(f"{root} has a test folder, so nothing is held out for testing")
        return {"train": train, "test": test}
    if train.is_dir():
        if held_out is None:
            raise InputError(f"{root} has a train folder but no test folder; {offer}")
        return {"train": train}
    if test.is_dir():
        raise InputError(f"{root} has a test folder but no train folder")
    if not any(path.is_dir() for path in _visible(root)):
        raise InputError(f"{root} has no train and test folders, and no folder of a class either")
    if held_out is None:
        raise InputError(f"{root} is not split into train and test folders; {offer}")
    return {"train": root}


def _files(folder: Path) -> list[Path]:
    """The files of a split's classes."""
    found = []
    for place in _visible(folder):
        if not place.is_dir():
            if place.suffix.lower() not in _SUFFIXES:
                continue  # a list or a licence, as data sets come with
            raise InputError(f"{place} lies beside the folders of the classes, so it has no class")
        inside = _visible(place)
        if not inside:
            raise InputError(f"the class {place} is empty")
        if deeper := [path for path in inside if path.is_dir()]:
            raise InputError(f"{deeper[0]} is a folder, where the images of a class should be")
        found += inside
    if not found:
        raise InputError(f"{folder} has no folder of a class")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _require_every_class(folder: Path, paths: list[Path], good: list[Path]) -> None:
    if left := sorted({p.parent.name for p in paths} - {p.parent.name for p in good}):
        raise InputError(f"the class {folder / left[0]} has no image that can be read")


def _several(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
