"""Image files: decoding by hand, and folders with mistakes."""

import dataclasses
import io
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from abflax import InputError
from abflax.data import (
    ImageFiles,
    Preprocessing,
    decoding,
    few_shot_subset,
    holdout,
    load_image_files,
    read_folder,
)
from abflax.data.decoders import inspect
from abflax.data.decoding import centre_crop, random_box, random_crop
from tests.image_files import draw, make_folder

BILINEAR = Image.Resampling.BILINEAR


def _encoded(image, format="PNG", **options):
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


@pytest.fixture(scope="module")
def picture():
    return draw((120, 90, 200), np.random.default_rng(3), 70, 50)


def test_random_boxes_have_their_share_and_ratio_and_lie_inside():
    boxes = np.array([random_box(400, 300, np.random.default_rng((0, i))) for i in range(2000)])
    left, top, wide, high = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + wide <= 400).all() and (top + high <= 300).all()
    share, ratio = wide * high / 120_000, wide / high
    assert 0.078 < share.min() < 0.1 and 0.95 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
    square = np.array([random_box(99, 99, np.random.default_rng((1, i))) for i in range(2000)])
    assert abs(np.log(square[:, 2] / square[:, 3]).mean()) < 0.02  # symmetric in the logarithm


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))]
)
def test_where_no_random_box_fits_it_is_the_largest_in_the_middle(size, box):
    found = [random_box(*size, np.random.default_rng(i)) for i in range(20)]
    assert all(each == box for each in found)


def test_a_random_crop_is_cut_out_and_resized(picture):
    left, top, wide, high = random_box(70, 50, np.random.default_rng((1, 2, 3)))
    cut = picture.crop((left, top, left + wide, top + high)).resize((24, 24), BILINEAR)
    found = random_crop(_encoded(picture), 24, 1, 2, 3)
    assert found.dtype == np.uint8 and np.array_equal(found, np.asarray(cut))
    assert not np.array_equal(found, random_crop(_encoded(picture), 24, 1, 3, 3))  # another epoch


@pytest.mark.parametrize(("side", "shorter"), [(224, 256), (64, 73), (16, 18)])
def test_the_centre_crop_is_that_of_evaluation(picture, side, shorter):
    resized = picture.resize((shorter * 70 // 50, shorter), BILINEAR)
    left, top = round((resized.width - side) / 2), round((shorter - side) / 2)
    wanted = np.asarray(resized.crop((left, top, left + side, top + side)))
    assert np.array_equal(centre_crop(_encoded(picture), side), wanted)


def test_exif_orientation_is_respected(picture):
    method = Image.Transpose
    stored = {2: method.FLIP_LEFT_RIGHT, 3: method.ROTATE_180, 4: method.FLIP_TOP_BOTTOM,
              5: method.TRANSPOSE, 6: method.ROTATE_90, 7: method.TRANSVERSE,
              8: method.ROTATE_270}  # fmt: skip
    for tag, how in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        turned = _encoded(picture.transpose(how), exif=exif)
        for crop in (
            lambda data: random_crop(data, 24, 1, 2, 3),
            lambda data: centre_crop(data, 24),
        ):
            assert np.array_equal(crop(turned), crop(_encoded(picture))), tag


@pytest.mark.parametrize(
    ("kind", "value"),
    [(2, b"6\0\0\0"), (3, bytes(4)), (3, b"\11\0\0\0"), (4, b"\6\0\6\0"), (7, b"\6\6")],
    ids=["text", "zero", "nine", "large", "bytes"],
)
def test_an_exif_orientation_that_is_none_is_passed_over(picture, tmp_path, kind, value):
    """What passes inspection can be decoded in training."""
    entry = struct.pack("<HHI", 0x0112, kind, len(value) if kind in (2, 7) else 1)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + value.ljust(4, b"\0") + bytes(4)
    data = _encoded(picture, exif=exif)
    (tmp_path / "odd.png").write_bytes(data)
    ((good, _),) = inspect([str(tmp_path / "odd.png")], workers=1)
    assert good and np.array_equal(centre_crop(data, 24), centre_crop(_encoded(picture), 24))
    assert np.array_equal(random_crop(data, 24, 1, 2), random_crop(_encoded(picture), 24, 1, 2))


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_long_thin_image_takes_little_memory(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    thin = _encoded(Image.effect_noise(size, 50))
    for crop in (centre_crop(thin, 224), random_crop(thin, 224, 0, 0)):
        assert crop.shape == (224, 224, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_every_kind_of_image_becomes_rgb(picture):
    grey = np.asarray(picture.convert("L"))
    sixteen = Image.fromarray((grey.astype(np.uint16) << 8) + 7)
    repeated = np.asarray(Image.fromarray(grey).convert("RGB"))
    for image in (picture.convert("L"), sixteen):
        data = _encoded(image)
        assert np.array_equal(
            centre_crop(data, 24), centre_crop(_encoded(Image.fromarray(repeated)), 24)
        )
    kinds = (("P", "GIF"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP"))
    for mode, format in kinds:
        found = centre_crop(_encoded(picture.convert(mode), format), 24).astype(int)
        assert found.shape == (24, 24, 3)
        assert abs(found - centre_crop(_encoded(picture), 24)).mean() < 8, format


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    large = draw((120, 90, 200), np.random.default_rng(4), 70, 50).resize((840, 600), BILINEAR)
    jpeg, png = _encoded(large, "JPEG", quality=95), _encoded(large)
    for epoch in range(4):
        crops = (random_crop(data, 16, 0, epoch, 0).astype(int) for data in (jpeg, png))
        assert abs(np.subtract(*crops)).mean() < 1.5


def test_what_cannot_be_decoded_is_reported(picture, tmp_path):
    whole = _encoded(picture, "JPEG")
    files = {"good.jpg": whole, "cut.jpg": whole[:-500], "empty.jpg": b"", "notes.txt": b"a list"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = inspect([str(tmp_path / name) for name in (*files, "gone.jpg")], workers=2)
    assert [good for good, _ in found] == [True, False, False, False, False]
    (_, sha), (_, cut), (_, empty), (_, text), (_, gone) = found
    assert len(sha) == 64 and "truncated" in cut and empty == text == "no image"
    assert "No such file" in gone


def test_decoding_processes_end_with_their_parent(tmp_path):
    """Also while they wait for a file that never comes."""
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import os, signal, sys; from abflax.data.decoders import Decoders\n"
        "decoders = Decoders(0, 1, 1); decoders.ask([('inspect', None, sys.argv[1], ())])\n"
        "print(decoders._processes[0].pid, flush=True); import time; time.sleep(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    decoder = int(subprocess.run(command, capture_output=True, text=True).stdout)
    for _ in range(100):
        if not psutil.pid_exists(decoder) or psutil.Process(decoder).status() == "zombie":
            return
        time.sleep(0.1)
    os.kill(decoder, signal.SIGKILL)
    pytest.fail("it was still there after ten seconds")


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "photos", train=3, test=2)


def test_a_folder(root):
    draw((0, 0, 0), np.random.default_rng(1)).save(root / "train" / "cat" / ".hidden.png")
    (root / "train" / "LICENCE").write_text("free")
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "test" / "cat" / "device.png").symlink_to("/dev/zero")
    found = read_folder(root, side=16, workers=1)
    assert found.train.classes == ("airplane", "cat", "ship") and found.notes == ()
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (len(found.test), found.train.image_shape) == (6, (16, 16, 3))
    assert found.train.places[4].endswith("photos/train/cat/01.png")
    # The name depends on the contents, not on paths or file names.
    moved = root.rename(root.parent / "moved")
    (moved / "test" / "cat" / "01.png").rename(moved / "test" / "cat" / "0.png")
    again = read_folder(moved, side=16, workers=2)
    assert again.train.name == found.train.name != found.test.name
    assert again.test.name != found.test.name  # in another order
    assert read_folder(moved, side=24, workers=1).train.name != found.train.name


def test_broken_files_are_named_skipped_and_counted(root):
    (root / "train" / "cat" / "00.png").write_bytes(b"no")
    (root / "test" / "ship" / "list.txt").write_text("00.png")
    with pytest.raises(InputError, match=r"2 of 16 files cannot be .* more than the 1 % .*00.png"):
        read_folder(root, workers=1)
    found = read_folder(root, workers=1, most_broken=0.125)
    assert (len(found.train), len(found.test)) == (8, 6)
    (note,) = found.notes
    assert note.startswith("2 of 16 files were skipped: ") and "list.txt (no image)" in note


def test_held_out_where_there_is_no_test_folder(root):
    for split in ("root", "train"):
        shutil.rmtree(root / "test", ignore_errors=True)
        where = root / "train" if split == "root" else root
        with pytest.raises(InputError, match="--holdout 0.2 holds out a fifth of each class"):
            read_folder(where, workers=1)
        found = read_folder(where, held_out=1 / 3, workers=1)
        assert np.bincount(found.train.labels).tolist() == [2, 2, 2]
        assert np.bincount(found.test.labels).tolist() == [1, 1, 1]
        assert not set(found.train.places) & set(found.test.places)


def test_a_test_image_in_the_training_set_is_reported(root):
    shutil.copy(root / "train" / "cat" / "00.png", root / "test" / "ship" / "copy.png")
    _, note = read_folder(root, workers=1).notes  # the first: it is in two classes
    assert note.startswith("1 test images are training images too: ") and "copy.png" in note


def test_a_file_in_two_classes_is_reported(root):
    shutil.copy(root / "train" / "cat" / "00.png", root / "train" / "ship" / "copy.png")
    (note,) = read_folder(root, workers=1).notes
    assert note.startswith("1 images are in more than one class: ")
    assert "train/cat/00.png = " in note and note.endswith("train/ship/copy.png")


def _mistake(root, kind):
    if kind == "class":
        (root / "test" / "dog").mkdir()
        shutil.copy(root / "test" / "cat" / "00.png", root / "test" / "dog")
    elif kind == "empty":
        (root / "train" / "dog").mkdir()
    elif kind == "unreadable":
        for path in (root / "test" / "cat").iterdir():
            path.write_bytes(b"no")
    elif kind == "beside":
        shutil.copy(root / "test" / "cat" / "00.png", root / "train" / "00.JPG")
    elif kind == "deeper":
        (root / "train" / "cat" / "small").mkdir()
    elif kind == "no train":
        shutil.rmtree(root / "train")
    elif kind == "one":
        for name in ("cat", "ship"):
            shutil.rmtree(root / "train" / name)
    elif kind == "nothing":
        for path in root.iterdir():
            shutil.rmtree(path)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("class", r"test has the class dog, which train lacks"),
        ("empty", r"the class .*train/dog is empty"),
        ("unreadable", r"the class .*test/cat has no image that can be read"),
        ("beside", r"train/00.JPG lies beside the folders of the classes, so it has no class"),
        ("deeper", r"cat/small is a folder, where the images of a class should be"),
        ("no train", r"has a test folder but no train folder"),
        ("one", r"has the one class airplane"),
        ("nothing", r"no train and test folders, and no folder of a class"),
    ],
)
def test_mistakes_of_folders(root, kind, sentence):
    _mistake(root, kind)
    with pytest.raises(InputError, match=sentence):
        read_folder(root, workers=1, most_broken=0.5)


def test_mistakes_of_calls(root):
    with pytest.raises(InputError, match="there is no folder"):
        read_folder(root / "nowhere")
    with pytest.raises(InputError, match="workers must be at least 1, not 0"):
        read_folder(root, workers=0)
    with pytest.raises(InputError, match="has a test folder, so nothing is held out"):
        read_folder(root, held_out=0.2)
    with pytest.raises(InputError, match=r"must be in \[0, 1\), not 1"):
        read_folder(root, most_broken=1.0)


PLACES = tuple(map(str, range(7)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"labels": np.zeros(6, int)}, r"7 images and labels of shape \(6,\)"),
        ({"labels": np.zeros(7)}, "integers, not float64"),
        ({"labels": np.arange(7)}, "from 0 to 6"),
        ({"side": 0}, "above 0, not 0"),
        ({"preprocessing": Preprocessing(pad=1)}, "are not padded"),
    ],
)
def test_invalid_image_files_are_refused(options, sentence):
    given = {"places": PLACES, "labels": np.zeros(7, int), "classes": ("a", "b"), "name": "n"}
    with pytest.raises(InputError, match=sentence):
        ImageFiles(**given | options)


def test_few_shot_subsets_are_balanced_and_nested():
    data = ImageFiles(PLACES, np.array([0, 1, 0, 0, 1, 0, 0]), ("a", "b"), "n")
    three, four = few_shot_subset(data, 3, seed=1), few_shot_subset(data, 4, seed=1)
    assert np.bincount(three.labels).tolist() == [3, 2]
    assert three.name == f"{data.name}, 3 of each class by seed 1" != data.name
    assert set(three.places) < set(four.places)
    assert few_shot_subset(data, 3, seed=2).places != three.places
    fitted, held = holdout(data, 0.4, seed=0)
    assert np.bincount(held.labels).tolist() == [2, 1] and len(fitted) == 4
    assert data.take(np.array([1])).name != data.take(np.array([2])).name


def test_image_files_are_named_by_what_they_are(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"1")
    data = ImageFiles((str(path), *PLACES), np.array([0, 1, 0, 0, 1, 0, 0, 1]), ("a", "b"), "n")
    again = lambda **fields: dataclasses.replace(data, **fields).name
    changed = {
        again(labels=data.labels[::-1]), again(places=data.places[::-1]), again(side=32),
        again(classes=("a", "b", "c")), data.take(np.arange(8), "n").name,
    }  # fmt: skip
    assert len(changed | {data.name}) == 6 and again() == data.name
    path.write_bytes(b"two")
    assert again() not in changed | {data.name}


@pytest.fixture
def scenes(tmp_path):
    """Writes the archive and lists in the published format: three classes of five tiny images."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    rng, lists = np.random.default_rng(0), {"TrainImages.txt": [], "TestImages.txt": []}
    with tarfile.open(manual / "indoorCVPR_09.tar", "w") as archive:
        for name in ("bar", "attic", "casino"):
            for number in range(5):  # one of them is not a JPEG, despite its name
                data = _encoded(draw((9, 9, 9), rng), "JPEG" if number else "GIF")
                member = tarfile.TarInfo(f"Images/{name}/x{number}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
                chosen = "TrainImages.txt" if number < 3 else "TestImages.txt"
                lists[chosen].append(f"{name}/x{number}.jpg")
    for name, lines in lists.items():
        (manual / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_mit_indoor_scenes(scenes, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(scenes))
    train, test = (
        load_image_files("mit_indoor_scenes", split, side=24) for split in ("train", "test")
    )
    assert train.classes == ("attic", "bar", "casino") and train.name == "mit_indoor_scenes, 24×24"
    assert np.bincount(train.labels).tolist() == [3, 3, 3]
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert all(good for good, _ in inspect(train.places + test.places, workers=1))
    (folder,) = {place[0] for place in train.places}
    records = tfds.builder_from_directory(folder).as_data_source("test")
    names = sorted((str(each["file_name"], "ascii"), int(each["label"])) for each in records)
    assert names == [(f"{name}/x{number}.jpg", label)
                     for label, name in enumerate(train.classes) for number in (3, 4)]  # fmt: skip


def test_mit_indoor_scenes_that_are_not_there(scenes):
    lists = scenes / "downloads" / "manual" / "TestImages.txt"
    lists.write_text("bar/x3.jpg\nbar/x9.jpg\n")
    with pytest.raises(InputError, match="lacks 1 of the 2 images of a list: bar/x9.jpg"):
        load_image_files("mit_indoor_scenes", "train", str(scenes))
    lists.unlink()
    with pytest.raises(InputError, match=r"no .*manual/TestImages.txt: put .* there, from https"):
        load_image_files("mit_indoor_scenes", "train", str(scenes))


def test_birds_are_read_by_random_access(tmp_path, monkeypatch):
    """Reads a prepared data set with these features, without decoding its masks."""
    import tensorflow_datasets as tfds

    class CaltechBirds2011(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("0.2.0")

        def _info(self):
            features = tfds.features
            return self.dataset_info_from_configs(
                features=features.FeaturesDict({
                    "image": features.Image(),
                    "label": features.ClassLabel(num_classes=200),
                    "segmentation_mask": features.Image(shape=(None, None, 1)),
                })
            )  # fmt: skip

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for number in range(4):
                image = draw((9, 50 * number, 9), np.random.default_rng(number))
                yield number, {"image": _encoded(image), "label": number + 196,
                               "segmentation_mask": b"no image"}  # fmt: skip

    CaltechBirds2011(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    train = load_image_files("caltech_birds2011", "train", str(tmp_path))
    assert sorted(train.labels) == [196, 197, 198, 199] and train.num_classes == 200
    assert train.name == "caltech_birds2011"
    greens = [image[..., 1].mean() for image in _decoded(train)]
    np.testing.assert_allclose(greens, 50 * (train.labels - 196), atol=15)


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_shard_is_named(scenes, damage):
    load_image_files("mit_indoor_scenes", "train", str(scenes))
    decoding.records.cache_clear()
    (shard,) = scenes.glob("mit_indoor_scenes/*/*-train.array_record*")
    content = shard.read_bytes()
    middle = len(content) // 2
    end = b"" if damage == "cut" else bytes(4096) + content[middle + 4096 :]
    shard.write_bytes(content[:16_000] + bytes(96) + content[16_096:middle] + end)
    with pytest.raises(InputError, match=f"^{shard} is damaged: .*; prepare mit_indoor_scenes"):
        load_image_files("mit_indoor_scenes", "train", str(scenes))


def _decoded(data):
    from abflax.data import DecodedBatches

    images = np.zeros((len(data), data.side, data.side, 3), np.uint8)
    everything = list(range(len(data)))
    batches = DecodedBatches(
        data, lambda _: ("centre crop", everything, [()] * len(data)), len(data), 1, 1
    )
    batches.into(0, images)
    batches.close()
    return images


def test_unknown_photographs(tmp_path):
    with pytest.raises(InputError, match="unknown dataset of photographs 'birds'"):
        load_image_files("birds", "train")
    with pytest.raises(InputError, match="unknown split 'tset'; did you mean test"):
        load_image_files("mit_indoor_scenes", "tset")
