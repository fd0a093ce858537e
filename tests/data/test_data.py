"""Data sets, subsets, the order of examples, augmentation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax.data import Dataset, Preprocessing, Stream, augment, holdout, load, normalize, subset
from abflax.errors import InputError


def test_digits():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert (train.image_shape, train.num_classes) == ((8, 8, 1), 10)
    assert train.images.dtype == np.uint8 and train.images.max() == 16
    for part in (train, test):  # stratified
        share = np.bincount(part.labels) / len(part)
        assert share.min() > 0.09 and share.max() < 0.11
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in test.images)
    # The stated mean and deviation are those of the training images.
    (mean,), (std,) = train.preprocessing.mean, train.preprocessing.std
    assert abs(train.images.mean() - mean) < 0.005 and abs(train.images.std() - std) < 0.005


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1)), np.zeros(3, int), r"\(2, 4, 4, 1\) and \(3,\)"),
        (np.zeros((2, 4, 4)), np.zeros(2, int), r"\(2, 4, 4\)"),
        (np.zeros((0, 4, 4, 1)), np.zeros(0, int), "at least one"),
        (np.zeros((2, 4, 4, 1)), np.zeros(2), "integers, not float64"),
        (np.zeros((2, 4, 4, 1)), np.array([0, -1]), "from -1 to 0"),
        (np.array([0, np.nan])[:, None, None, None], np.zeros(2, int), "image 1 has a pixel"),
    ],
)
def test_bad_data_is_named(images, labels, message):
    with pytest.raises(InputError, match=message):
        Dataset(images, labels)


def test_custom_data_is_named_by_its_contents():
    images, labels = np.arange(32.0).reshape(2, 4, 4, 1), np.array([0, 2])
    one, same = Dataset(images, labels), Dataset(images.copy(), labels.copy())
    assert one.name == same.name != Dataset(images + 1, labels).name
    assert one.num_classes == 3
    variants = {
        "labels": labels[::-1], "images": images + 1, "num_classes": 11,
        "preprocessing": Preprocessing(pad=1),
    }  # fmt: skip
    for data in (one, Dataset(images, labels, name="mine"), load("digits", "test").take([0, 1])):
        changed = [dataclasses.replace(data, **{name: new}) for name, new in variants.items()]
        names = {each.name for each in (data, *changed, data.take([1, 0]), data.take([0]))}
        assert len(names) == 7
        assert dataclasses.replace(data).name == data.name
    assert Dataset(images, labels, name="mine").name == one.name.replace("custom", "mine")
    assert dataclasses.replace(load("digits", "test"), name="digits").name != "digits"


def test_data_is_not_shared_with_who_gave_it():
    """Neither by the array itself, nor by a read-only view of it. What nobody can write is."""
    images, labels = np.zeros((2, 4, 4, 1)), np.array([0, 1], np.int32)
    view = images.view()
    view.flags.writeable = False
    for given in (images, view, images[::-1]):
        data = Dataset(given, labels)
        images[0, 0, 0, 0] = labels[0] = 1
        assert not data.images.any() and data.labels.tolist() == [0, 1]
        images[0, 0, 0, 0] = labels[0] = 0
        with pytest.raises(ValueError, match="read-only"):
            data.images[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            data.labels[0] = 1
    images.flags.writeable = False
    assert Dataset(images, labels).images is images
    assert np.shares_memory(Dataset(view, labels).images, images)
    assert np.shares_memory(data.take(slice(1)).images, data.images)


def test_subset_is_balanced_nested_and_a_function_of_its_seed():
    train = load("digits", "train")
    tenth = subset(train, 0.1, seed=3)
    counts, all_counts = np.bincount(tenth.labels), np.bincount(train.labels)
    chex.assert_trees_all_equal(counts, np.round(0.1 * all_counts).astype(int))
    contents = lambda data: {image.tobytes() for image in data.images}
    assert contents(tenth) < contents(subset(train, 0.2, seed=3))
    chex.assert_trees_all_equal(tenth.images, subset(train, 0.1, seed=3).images)
    assert contents(tenth) != contents(subset(train, 0.1, seed=4))
    assert np.bincount(subset(train, 1e-6, seed=0).labels).tolist() == [1] * 10
    assert subset(train, 1.0, seed=0) is train


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_fractions(fraction):
    with pytest.raises(InputError, match="fraction"):
        subset(load("digits", "train"), fraction, seed=0)


def test_stream_is_epochs_without_a_gap():
    stream = Stream(examples=10, batch_size=4, seed=1)
    examples, epochs = stream.batches(0, 5)
    assert examples.shape == epochs.shape == (5, 4)
    for epoch in (0, 1):
        assert sorted(examples.ravel()[epochs.ravel() == epoch]) == list(range(10))
    assert epochs[2].tolist() == [0, 0, 1, 1]  # a step may span two epochs
    # Cut anywhere, it is the same stream.
    again = Stream(10, 4, 1).batches(3, 2)
    chex.assert_trees_all_equal(again, (examples[3:], epochs[3:]))
    assert examples[:2].tolist() != Stream(10, 4, 2).batches(0, 2)[0].tolist()


def test_a_batch_may_hold_more_than_all_examples():
    examples, epochs = Stream(examples=3, batch_size=8, seed=0).batches(1, 1)
    assert np.bincount(epochs[0]).tolist() == [0, 0, 1, 3, 3, 1]
    assert sorted(examples[0][epochs[0] == 3]) == [0, 1, 2]


PREPROCESSING = Preprocessing(pad=2, flip=True)


@pytest.fixture(scope="module")
def augmented():
    images = jnp.arange(64 * 6 * 6, dtype=jnp.int32).reshape(64, 6, 6, 1)
    run = jax.jit(lambda images, examples, epochs: augment(
        images, examples, epochs, jax.random.key(0), PREPROCESSING))  # fmt: skip
    return images, run, run(images, jnp.arange(64), jnp.zeros(64, jnp.int32))


def test_augmentation_depends_on_epoch_and_example_alone(augmented):
    images, run, found = augmented
    order = np.random.default_rng(0).permutation(64)
    shuffled = run(images[order], jnp.asarray(order), jnp.zeros(64, jnp.int32))
    chex.assert_trees_all_equal(shuffled, found[order])
    later = run(images, jnp.arange(64), jnp.ones(64, jnp.int32))
    assert (later != found).any(axis=(1, 2, 3)).mean() > 0.9


def test_every_augmented_image_is_a_crop_or_its_mirror(augmented):
    images, _, found = augmented
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    corners, mirrored = set(), 0
    for index, image in enumerate(np.asarray(found)):
        views = {
            (flip, row, column): padded[index, row : row + 6, column : column + 6][:, ::step]
            for flip, step in ((0, 1), (1, -1)) for row in range(5) for column in range(5)
        }  # fmt: skip
        matches = [view for view, pixels in views.items() if (pixels == image).all()]
        assert matches, index
        mirrored += matches[0][0]
        corners.add(matches[0][1:])
    assert 20 < mirrored < 44 and len(corners) > 18


def test_normalize(x64):
    images = np.array([[[[0, 255]]]], np.uint8)
    found = normalize(jnp.asarray(images), Preprocessing(mean=(100.0, 55.0), std=(50.0, 2.0)))
    chex.assert_trees_all_equal(found, np.array([[[[-2.0, 100.0]]]]))
    assert found.dtype == jnp.float64


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean cifar10"):
        load("cifar-10", "train")
    with pytest.raises(InputError, match="unknown split 'tset'; did you mean test"):
        load("digits", "tset")


def test_an_empty_data_dir_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorflow" else found(name)
    )
    with pytest.raises(InputError, match=r'pip install "tensorflow>=2.16"'):
        load("cifar10", "train", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_holdout_is_balanced_and_disjoint():
    train = load("digits", "train")
    fitted, held = holdout(train, 0.1, seed=0)
    assert len(fitted) + len(held) == len(train)
    contents = lambda data: {image.tobytes() for image in data.images}
    assert not contents(fitted) & contents(held)
    chex.assert_trees_all_equal(
        np.bincount(held.labels), np.round(0.1 * np.bincount(train.labels)).astype(int)
    )
    assert fitted.name == "digits, 0.1 held out by seed 0" != train.name
    with pytest.raises(InputError, match="between 0 and 1"):
        holdout(train, 1.0, seed=0)
    with pytest.raises(InputError, match="leaves a class without"):
        holdout(train.take(np.arange(3)), 0.5, seed=0)


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", 10), ("cifar10_64", 10), ("cifar100", 100)]
)
def test_cifar_is_read_from_tfds(tmp_path, monkeypatch, name, classes):
    """Reads the format of TensorFlow Datasets, without its data and without TensorFlow."""
    import tensorflow_datasets as tfds

    from abflax.data import tfds as reader

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 32, 32, 3), np.uint8)

    class Source:
        def __len__(self):
            return 7

        def __getitems__(self, indices):
            return [{"id": b"", "image": images[i], "label": classes - 1 - i} for i in indices]

    asked = []
    monkeypatch.setattr(tfds, "data_source", lambda *a, **k: asked.append((a, k)) or Source())
    monkeypatch.setattr(reader, "_CHUNK", 3)
    stored = name.removesuffix("_64")
    (tmp_path / stored / "3.0.2").mkdir(parents=True)
    (tmp_path / stored / "3.0.2" / "dataset_info.json").write_text("{}")
    found = reader.__dict__[f"load_{name}"]("test", str(tmp_path))
    assert asked == [((stored,), {"split": "test", "data_dir": tmp_path})]
    if name == stored:
        chex.assert_trees_all_equal(found.images, images)
    else:  # a large pixel is near the small one that it is in the middle of
        small = found.images.reshape(7, 32, 2, 32, 2, 3).mean((2, 4))
        assert found.image_shape == (64, 64, 3) and np.abs(small - images).mean() < 20
    assert found.labels.tolist() == [classes - 1 - i for i in range(7)]
    assert (found.name, found.num_classes, found.preprocessing.pad) == (
        name.replace("_", "-"),
        classes,
        8 if name == "cifar10_64" else 4,
    )
