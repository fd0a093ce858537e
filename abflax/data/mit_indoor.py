"""Builds the MIT indoor scenes for TensorFlow Datasets, which does not include them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from abflax.errors import InputError

_ARCHIVE = "indoorCVPR_09.tar"
_LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}
_PAGE = "https://web.mit.edu/torralba/www/indoor.html"


class MitIndoorScenes(tfds.core.GeneratorBasedBuilder):
    """67 classes of indoor scenes, 80 training and 20 test images each, by the published lists.

    The images are stored encoded, as published. The builder needs neither TensorFlow nor a
    download, only the files that the instructions name.

    References:
      Quattoni, Torralba, Recognizing Indoor Scenes, CVPR 2009.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {_ARCHIVE}, {_LISTS['train']} and {_LISTS['test']}, from {_PAGE}, into this folder."
    )

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Indoor scenes, 67 classes, the published training and test lists.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names=None),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage=_PAGE,
        )

    def _split_generators(self, dl_manager: Any) -> Any:
        folder = Path(dl_manager.manual_dir)
        lists = {split: _listed(folder / name) for split, name in _LISTS.items()}
        classes = sorted({name.split("/")[0] for names in lists.values() for name in names})
        self.info.features["label"].names = classes
        return {
            split: self._generate_examples(folder / _ARCHIVE, names)
            for split, names in lists.items()
        }

    def _generate_examples(self, archive: Path, names: list[str]) -> Iterator[Any]:
        """Yields (file name, example), in the order of the archive."""
        left = set(names)
        with tarfile.open(archive) as files:
            for member in files:
                name = "/".join(member.name.split("/")[-2:])
                if name not in left or (file := files.extractfile(member)) is None:
                    continue
                left.remove(name)
                label = name.split("/")[0]
                yield name, {"image": file.read(), "label": label, "file_name": name}
        if left:
            raise InputError(
                f"{archive} lacks {len(left)} of the {len(names)} images of a list: {min(left)}"
            )


def require_files(folder: Path) -> None:
    """Raises `InputError` if one of the files is missing, with the address to get it from."""
    for name in (_ARCHIVE, *_LISTS.values()):
        if not (folder / name).is_file():
            raise InputError(
                f"MIT indoor scenes are not prepared yet, and there is no {folder / name}: put "
                f"{_ARCHIVE}, {_LISTS['train']} and {_LISTS['test']} there, from {_PAGE}"
            )


def _listed(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
