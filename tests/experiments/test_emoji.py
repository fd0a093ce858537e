"""`python -m experiments.emoji`: a class folder of two unpacked packages."""

import json

import numpy as np
import pytest
from PIL import Image

from abflax.config import RunConfig
from abflax.data import read_folder
from experiments import emoji
from experiments.common.stats import mean_and_std
from tests.conftest import ROOT
from tests.experiments.conftest import plain

PICTURES = {"1f600.png": "Smileys & Emotion", "1f34e.png": "Food & Drink", "1f3fb.png": "Component"}


@pytest.fixture
def packages(tmp_path):
    """Both packages, with a half transparent picture for each emoji; Twitter lacks none."""
    for vendor in ("google", "twitter"):
        folder = tmp_path / vendor / "img" / vendor / "64"
        folder.mkdir(parents=True)
        entries = [
            {"image": name, "category": category, "has_img_google": True, "has_img_twitter": True}
            for name, category in PICTURES.items()
        ]
        entries.append({**entries[0], "image": "none.png", f"has_img_{vendor}": False})
        (tmp_path / vendor / "emoji.json").write_text(json.dumps(entries))
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[:, 32:] = (200, vendor == "google", 0, 255)
        for name in PICTURES:
            Image.fromarray(pixels).save(folder / name)
    return tmp_path


def test_the_folder(call_command, packages):
    flags = ("--google", packages / "google", "--twitter", packages / "twitter")
    code, out, err = call_command(emoji.main, *flags, packages / "out")
    assert (code, err) == (0, "") and out.count(": 2 images") == 2
    folder = read_folder(packages / "out", side=64, workers=1)
    assert folder.train.classes == ("Food & Drink", "Smileys & Emotion")
    with Image.open(packages / "out" / "train" / "Food & Drink" / "1f34e.png") as image:
        pixels = np.asarray(image)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 63].tolist() == [200, 1, 0]


@pytest.mark.parametrize("content", [None, "{}", "[3]", "no json", "[{}]"])
def test_no_package(call_command, packages, content):
    listed = packages / "twitter" / "emoji.json"
    listed.unlink() if content is None else listed.write_text(content)
    flags = ("--google", packages / "google", "--twitter", packages / "twitter")
    code, _, err = call_command(emoji.main, *flags, packages / "out")
    assert code == 2 and "is no unpacked package emoji-datasource-twitter" in plain(err)


def test_the_page_says_what_was_measured():
    records = [
        json.loads(path.read_text()) for path in (ROOT / "experiments/records/emoji").glob("*.json")
    ]
    page = (ROOT / "docs" / "transfer.md").read_text()
    for method in ("cross-entropy", "activation-boundary"):
        runs = [record for record in records if record["config"]["method"] == method]
        assert len({run["config"]["seeds"]["weights"] for run in runs}) == len(runs) == 2
        accuracy = mean_and_std([1 - run["result"]["test_error"] for run in runs])
        assert f"| {method} | {accuracy} |" in page
    assert all(RunConfig.from_json(run["config"]).hash == run["hash"] for run in records)
