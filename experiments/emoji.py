"""Make a folder of images, classes by folder, of the emoji that two vendors have drawn.

Google's drawings become the training images and Twitter's the test images, in nine classes such as
"Food & Drink". Both drew the same emoji, so what a network meets anew in the test is the hand. The
drawings come with two npm packages (MIT license), which are not part of this repository:

  npm pack emoji-datasource-google emoji-datasource-twitter
  for name in google twitter; do
      mkdir $name && tar xzf emoji-datasource-$name-*.tgz -C $name --strip-components 1; done

Examples:
  python -m experiments.emoji --google google --twitter twitter emoji
  python -m experiments.transfer --images emoji --size 64 --teacher efficientnet-lite0 \
      --student mobilenet-v2-0.35
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from rich.console import Console

from abflax.errors import InputError
from abflax.storage.files import write_whole
from abflax.training.record import require_writable
from experiments.common import cli

_TRAIN, _TEST = "google", "twitter"
_LEFT_OUT = ("Component",)  # five swatches of skin tones


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      out: folder that gets train/CLASS/FILE and test/CLASS/FILE.
      google: the unpacked package emoji-datasource-google.
      twitter: the unpacked package emoji-datasource-twitter.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    google: Path
    twitter: Path


def main(console: Console) -> None:
    """Writes the folder."""
    arguments = cli.parse(Arguments, "experiments.emoji", __doc__)
    require_writable(arguments.out)
    packages = {_TRAIN: arguments.google, _TEST: arguments.twitter}
    # Both are read before anything is written.
    entries = {vendor: read_entries(package, vendor) for vendor, package in packages.items()}
    for split, vendor in (("train", _TRAIN), ("test", _TEST)):
        for entry in entries[vendor]:
            picture = packages[vendor] / "img" / vendor / "64" / entry["image"]
            path = arguments.out / split / entry["category"] / entry["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, on_white(picture))
        console.print(f"{arguments.out / split}: {len(entries[vendor])} images", soft_wrap=True)


def read_entries(package: Path, vendor: str) -> list[dict[str, Any]]:
    """The emoji that a vendor has drawn, without variants of skin tone.

    Raises:
      ValueError: if the folder is not that package.
    """
    try:
        drawn = [
            entry
            for entry in json.loads((package / "emoji.json").read_text("utf-8"))
            if entry[f"has_img_{vendor}"] and entry["category"] not in _LEFT_OUT
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{package} is no unpacked package emoji-datasource-{vendor}: {error!r}"
        ) from error
    if not drawn:
        raise InputError(f"{package} is no unpacked package emoji-datasource-{vendor}: it is empty")
    return drawn


def on_white(picture: Path) -> bytes:
    """Puts a transparent picture on white, as `abflax.data` drops transparency; PNG."""
    content = io.BytesIO()
    try:
        with Image.open(picture) as image:
            drawn = image.convert("RGBA")
    except OSError as error:
        raise InputError(f"{picture} cannot be read: {error}") from error
    white = Image.new("RGBA", drawn.size, "white")
    Image.alpha_composite(white, drawn).convert("RGB").save(content, "PNG")
    return content.getvalue()


if __name__ == "__main__":
    cli.main(main)
