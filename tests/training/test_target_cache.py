"""Views, and the targets of each asked of the teacher once."""

import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax import InputError, Interrupted, Network, Reporter, Resources, distill, load
from abflax.data import Preprocessing, augment, draw_views, view
from abflax.models.variables import init_variables
from abflax.training import target_cache
from tests.conftest import Tiny

ONE, KEPT = Resources(devices=1), Resources(devices=1, cache_targets=True)


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train").take(np.arange(40))


@pytest.fixture(scope="module")
def teacher():
    return Network(Tiny(12), init_variables(Tiny(12), jax.random.key(7), (8, 8, 1)), "teacher")


def _distill(digits, teacher, **options):
    settings = {"protocol": "paper", "epochs": (1, 1), "batch_size": 16, "views": 3} | options
    return distill(Tiny(6), teacher, digits, **settings)


@pytest.mark.parametrize("views", [None, 18])
def test_every_view_is_a_crop_or_its_mirror_and_comes_once(views):
    preprocessing = Preprocessing(pad=1, flip=True, views=views)
    assert preprocessing.all_views == preprocessing.shown_views == 18
    image = np.arange(9.0).reshape(1, 3, 3, 1)
    padded = np.pad(image, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")[0]
    crops = [padded[r : r + 3, c : c + 3] for r in range(3) for c in range(3)]
    expected = {crop.tobytes() for each in crops for crop in (each, each[:, ::-1].copy())}
    number = jnp.arange(18)
    found = view(jnp.repeat(image, 18, 0), jnp.full(18, 5), number, preprocessing)
    assert {np.asarray(each, np.float64).tobytes() for each in found} == expected
    other = view(jnp.repeat(image, 18, 0), jnp.full(18, 6), number, preprocessing)
    in_order = views is None  # else each example has an order of its own
    assert (
        np.asarray(found) == [crop[:, ::f] for crop in crops for f in (1, -1)]
    ).all() == in_order
    assert np.array_equal(found, other) == in_order


@pytest.mark.parametrize(("views", "count", "shown"), [(4, 64, 4), (None, 640, 18)])
def test_augmenting_shows_the_views_that_are_drawn(views, count, shown):
    preprocessing = Preprocessing(pad=1, flip=True, views=views)
    images = jax.random.normal(jax.random.key(0), (count, 4, 4, 1))
    examples, epochs, key = jnp.arange(count), jnp.full(count, 2), jax.random.key(1)
    drawn = draw_views(examples, epochs, key, preprocessing)
    assert np.bincount(drawn, minlength=shown).min() >= 5 and drawn.max() == shown - 1
    chex.assert_trees_all_equal(
        augment(images, examples, epochs, key, preprocessing),
        view(images, examples, drawn, preprocessing),
    )


@pytest.mark.parametrize(
    ("method", "epochs", "views"),
    [
        ("activation-boundary", (1, 0), 3),  # bits
        pytest.param("kd", (0, 2), None, marks=pytest.mark.slow),  # all views
        pytest.param("activation-boundary", (1, 1), 3, marks=pytest.mark.slow),  # then logits
        pytest.param("l2", (1, 0), 3, marks=pytest.mark.slow),  # activations
    ],
)
def test_cache_targets_give_the_same_losses(digits, teacher, method, epochs, views):
    options = {"method": method, "epochs": epochs, "views": views}
    asked, kept_ = (
        _distill(digits, teacher, resources=each, **options).record for each in (ONE, KEPT)
    )
    assert asked["hash"] == kept_["hash"] and asked["config"]["views"] == views
    for one, other in zip(asked["history"], kept_["history"], strict=True):
        chex.assert_trees_all_close(one["loss"], other["loss"], rtol=1e-5)


@pytest.mark.slow
def test_devices_and_dispatches_change_nothing(digits, teacher):
    many = Resources(devices=2, steps_per_dispatch=2, cache_targets=True)
    runs = [
        _distill(digits, teacher, precision="float64", resources=each).variables
        for each in (ONE, many)
    ]
    chex.assert_trees_all_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_teacher_is_asked_once_for_all_seeds_and_margins(digits, teacher, monkeypatch):
    monkeypatch.setattr(target_cache, "_cache", {})
    filled = []
    replicate = target_cache.replicate
    monkeypatch.setattr(
        target_cache,
        "replicate",
        lambda tree, d: (filled.append(tree), replicate(tree, d))[1],
    )
    asked = lambda: sum(isinstance(jax.tree.leaves(tree)[0], np.ndarray) for tree in filled)
    _distill(digits, teacher, resources=KEPT)
    first, entries = asked(), list(target_cache._cache)
    assert len(entries) == 2
    bits, logits = (jax.tree.leaves(target_cache._cache[key]) for key in entries)
    # 40 images · 3 views; the teacher's taps on 8×8: 12·64, 24·16 neurons, eight to a byte; and
    # whether the taps behind the bits are finite.
    assert [leaf.shape for leaf in bits] == [(120, 96), (120, 48), (120, 1)]
    assert (bits[-1] == 128).all()
    assert [(leaf.shape, leaf.dtype) for leaf in logits] == [((120, 10), np.float32)]
    del first
    _distill(digits, teacher, resources=KEPT, seeds=1, margin=2.0)
    assert list(target_cache._cache) == entries


class StopsInTargets(Reporter):
    """Stops the process while it computes the second batch of targets."""

    def __init__(self):
        self.phases = []

    def phase(self, label, name, steps, done, epochs):
        self.phases.append((name, steps))

    def steps(self, count, images, epoch, loss):
        if self.phases[-1][0] == "targets":
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_ends_the_computation_of_targets(digits, teacher, monkeypatch, tmp_path):
    monkeypatch.setattr(target_cache, "_cache", {})
    options = {"resources": KEPT, "method": "kd", "epochs": (0, 1), "workdir": tmp_path}
    reporter = StopsInTargets()
    with pytest.raises(Interrupted, match="stopped while the targets of .* were computed"):
        _distill(digits, teacher, reporter=reporter, **options)
    assert reporter.phases == [("targets", 8)]  # 40 images · 3 views in batches of 16
    assert _distill(digits, teacher, **options).record["state"] == "finished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "official"}, "phase initialise of this protocol .* cannot be cached"),
        ({"method": "bss", "epochs": (0, 1)}, "reads other images at every step"),
        ({"views": 10}, "an image has 9 views .* so there cannot be 10"),
        ({"views": 0}, "there cannot be 0"),
    ],
)
def test_what_cannot_be_cache_is_named(digits, teacher, options, message):
    with pytest.raises(InputError, match=message):
        _distill(digits, teacher, resources=KEPT, **options)


def test_what_does_not_fit_is_refused_with_what_would(digits, teacher, monkeypatch):
    monkeypatch.setattr(target_cache, "_cache", {})
    monkeypatch.setattr(target_cache, "_free_bytes", lambda device: 2.5 * 40 * 144)
    with pytest.raises(InputError, match="3 views of 40 images .*: 2 views would fit"):
        _distill(digits, teacher, resources=KEPT)
