"""An augmentation and metrics of the user's: what is computed, recorded, refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from abflax import (
    Dataset,
    InputError,
    Interrupted,
    Network,
    NonFiniteError,
    Resources,
    distill,
    evaluate,
)
from abflax.config import RunConfig
from abflax.data import OwnAugmentation, Preprocessing
from abflax.models.variables import init_variables
from abflax.training.record import read_record
from tests.conftest import Small
from tests.stopping import StopAt

ONE = Resources(devices=1)


@pytest.fixture(scope="module")
def data():
    """Sixteen images of noise, uint8; normalized."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (16, 8, 8, 1), np.uint8)
    return Dataset(images, np.arange(16) % 10, 10, Preprocessing((128.0,), (64.0,)))


@pytest.fixture(scope="module")
def teacher():
    return Network(Small(), init_variables(Small(), jax.random.key(7), (8, 8, 1)), "small")


def noise(key, images):
    return images + 20 * jax.random.normal(key, images.shape)


def mix(key, images):
    """Mixes each image with its neighbour in the batch, by one share for all of them."""
    share = jax.random.uniform(key)
    return share * images + (1 - share) * jnp.roll(images, 1, axis=0)


def trained(data, **settings):
    fixed = {"method": "cross-entropy", "batch_size": 8, "epochs": (0, 2), "resources": ONE}
    return distill(settings.pop("student", Small()), settings.pop("teacher", None), data,
                   **{**fixed, **settings})  # fmt: skip


def top2(logits, labels):
    return (jax.lax.top_k(logits, 2)[1] == labels[:, None]).any(axis=-1)


def test_it_sees_stored_pixels_behind_the_crop_and_before_the_normalization(data):
    """Twice the pixels through `augment` are twice the pixels in the data."""
    cropping = dataclasses.replace(data.preprocessing, pad=1, flip=True)
    one, other = (Dataset(factor * data.images, data.labels, 10, cropping) for factor in (1.0, 2.0))
    seen = trained(one, augment=lambda key, images: 2 * images)
    chex.assert_trees_all_close(seen.variables, trained(other).variables, rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_and_one_give_the_same_numbers(data, teacher):
    """Of an augmentation that needs the whole batch; teacher and student see the same images."""
    one, eight = (
        trained(data, teacher=teacher, method="kd", augment=mix, resources=Resources(devices=count))
        for count in (1, 8)
    )
    for ours, theirs in zip(one.record["history"], eight.record["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    chex.assert_trees_all_close(one.variables, eight.variables, rtol=1e-4, atol=1e-6)


def test_it_is_labelled_and_resumes_to_the_same_bits(data, tmp_path):
    whole = trained(data, augment=noise)
    assert whole.record["config"]["augment"] == OwnAugmentation.of(noise).label
    with pytest.raises(Interrupted):
        trained(data, augment=noise, workdir=tmp_path, reporter=StopAt(3))
    resumed = trained(data, augment=noise, workdir=tmp_path)
    chex.assert_trees_all_equal(whole.variables, resumed.variables)
    record = read_record(resumed.directory / "record.json", resumed.record["hash"])
    assert record["config"]["augment"].startswith("custom:")
    plain = trained(data)
    assert plain.record["hash"] != whole.record["hash"]
    assert plain.record["history"][0]["loss"] != whole.record["history"][0]["loss"]


def test_it_is_known_by_what_it_computes(data, tmp_path):
    """Both of these fail on the four images of the label, and so have the same."""
    one, other = (lambda key, images, c=c: images * jnp.full((8, 8, 1), c) for c in (1.0, 2.0))
    settings = {"workdir": tmp_path, "epochs": (0, 1)}
    assert OwnAugmentation.of(one).label == OwnAugmentation.of(other).label == "custom:other"
    first = trained(data, augment=one, **settings)
    assert trained(data, augment=one, **settings).record == first.record
    with pytest.raises(InputError, match="another augmentation's computation"):
        trained(data, augment=other, **settings)
    labels = {OwnAugmentation.of(each).label for each in (noise, mix, lambda key, images: images)}
    assert len(labels) == 3
    OwnAugmentation.of(clipped).require_fits(2, (8, 8, 1))
    with pytest.raises(InputError, match="the label in a record"):
        OwnAugmentation("custom:other").require_fits(2, (8, 8, 1))


def test_metrics_count_every_example_once(data, tmp_path):
    """Thirteen of them, which fill no batch; also of averaged weights."""
    test = data.take(np.arange(13))
    metrics = {"top2": top2, "largest": lambda logits, labels: logits.max(axis=-1)}
    settings = {"test": test, "metrics": metrics, "ema": 0.9, "workdir": tmp_path}
    result = trained(data, **settings)
    logits = Small().apply(result.variables, (test.images.astype(np.float32) - 128) / 64,
                           train=False)  # fmt: skip
    expected = {
        "top2": float(top2(logits, test.labels).mean()),
        "largest": float(logits.max(axis=-1).mean()),
    }
    entry = result.record["history"][-1]
    assert entry["metrics"] == pytest.approx(expected, rel=1e-5)
    assert result.record["result"]["metrics"] == entry["metrics"]
    assert entry["ema"]["metrics"].keys() == metrics.keys()
    measured = evaluate(Network(Small(), result.variables), test, 8, metrics)
    assert measured["metrics"] == pytest.approx(expected, rel=1e-5)
    assert read_record(result.directory / "record.json", result.record["hash"]) == result.record
    assert trained(data, **settings).record == result.record
    with pytest.raises(InputError, match="made with a metric (top2|largest)'s computation"):
        trained(data, **settings | {"metrics": None})
    with pytest.raises(InputError, match="another metric top2's computation"):
        trained(data, **settings | {"metrics": metrics | {"top2": lambda logits, labels: labels}})


def test_a_metric_that_is_no_number_is_an_error(data):
    network = Network(Small(), init_variables(Small(), jax.random.key(7), (8, 8, 1)))
    with pytest.raises(NonFiniteError, match="the metric log is not a finite number"):
        evaluate(network, data, 1, {"log": lambda logits, labels: jnp.log(0.0 * logits[:, 0])})


class _Times:
    """An object that is changed between two runs."""

    factor = 1.0

    def __call__(self, *arguments):
        return self.factor * (arguments[1] if len(arguments[1].shape) == 4 else arguments[0][:, 0])


def test_an_object_that_was_changed_is_another_function(data, tmp_path):
    metric, augment = _Times(), _Times()
    settings = {"test": data, "metrics": {"m": metric}, "epochs": (0, 1)}
    first = trained(data, workdir=tmp_path, **settings).record["result"]["metrics"]["m"]
    plain = trained(data, augment=augment, epochs=(0, 1)).record["history"][0]["loss"]
    metric.factor = augment.factor = 2.0
    with pytest.raises(InputError, match="another metric m's computation"):
        trained(data, workdir=tmp_path, **settings)
    forced = trained(data, workdir=tmp_path, force=True, **settings)
    assert forced.record["result"]["metrics"]["m"] == 2 * first
    assert trained(data, augment=augment, epochs=(0, 1)).record["history"][0]["loss"] != plain


def clipped(key, images):
    """A custom gradient, whose name JAX does not write twice the same."""
    return jax.nn.relu(images)


def impure(key, images):
    return images + np.random.default_rng().uniform()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "flip"}, "augment is a function"),
        ({"augment": lambda key, images: images[:, 1:]}, r"must return floating images \(8, 8"),
        ({"augment": lambda key, images: images > 0}, "must return floating images"),
        ({"augment": lambda images: images}, "augment fails on images"),
        ({"augment": impure}, "by jax.random"),
        ({"augment": noise, "views": 1, "resources": Resources(devices=1, cache_targets=True),
          "method": "kd"}, "cannot be cached"),
        ({"metrics": {"top2": top2}}, "give test"),
        ({"metrics": [top2], "test": "data"}, "functions by name"),
        ({"metrics": {"m": lambda logits, labels: logits}, "test": "data"}, "one number for each"),
        ({"metrics": {"m": lambda logits: logits}, "test": "data"}, "metric m fails on logits"),
        ({"metrics": {1: top2}, "test": "data"}, "a metric's name must be str, not 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_said_in_a_sentence(data, teacher, settings, message):
    settings = {**settings, **({"test": data} if "test" in settings else {})}
    with pytest.raises(InputError, match=message) as error:
        trained(data, teacher=teacher, **settings)
    assert len(str(error.value)) <= 400


def test_a_setting_that_is_not_given_changes_no_hash():
    config = RunConfig.create(dataset="d", student="s")
    read = RunConfig.from_json({k: v for k, v in config.as_json().items() if k != "augment"})
    assert read.hash == config.hash
    own = config.replace(augment=noise)
    assert RunConfig.from_json(own.as_json()).hash == own.hash == own.replace(augment=noise).hash
    assert own.replace(optimizer=optax.sgd(0.1)).augment == own.augment
