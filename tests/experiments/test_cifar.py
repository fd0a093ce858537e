"""Tests that need the CIFAR-10 images: TFDS_DATA_DIR=… python -m pytest -m cifar"""

import numpy as np
import pytest

from abflax import evaluate, load
from abflax.weights import load_network
from experiments.common.networks import SHIPPED

pytestmark = pytest.mark.cifar


def test_cifar10_is_read_without_tensorflow():
    train, test = load("cifar10", "train"), load("cifar10", "test")
    assert train.images.shape == (50000, 32, 32, 3) and test.images.shape == (10000, 32, 32, 3)
    assert train.images.dtype == np.uint8
    assert np.bincount(train.labels).tolist() == [5000] * 10
    # The stated mean and deviation of the training images, to their one decimal.
    pixels = train.images.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0), train.preprocessing.mean, atol=0.06)
    np.testing.assert_allclose(pixels.std(0), train.preprocessing.std, atol=0.06)


def test_the_shipped_teacher_has_its_stated_error():
    network = load_network("wrn16-2", SHIPPED / "wrn16-2-cifar10.npz")
    measured = evaluate(network, load("cifar10", "test"), devices=1)
    assert (measured["errors"], measured["examples"]) == (898, 10000)
