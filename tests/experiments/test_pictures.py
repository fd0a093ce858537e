"""The pictures of the pages show what the networks do."""

import numpy as np

from experiments import pictures


def test_channels_are_laid_out_in_rows_with_gaps_between_them():
    fires = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    found = pictures._square(fires)  # the first four of five channels
    assert found.shape == (5, 7)
    assert np.isnan(found[2]).all() and np.isnan(found[:, 3]).all()
    np.testing.assert_array_equal(found[:2, :3], fires[:, :, 0])
    np.testing.assert_array_equal(found[:2, 4:], fires[:, :, 1])
    np.testing.assert_array_equal(found[3:, :3], fires[:, :, 2])


def test_a_record_without_agreement_is_no_point(tmp_path):
    record = {"config": {"method": "fsp"}, "result": {"test_error": 0.5}}
    measured = {"initialise_agreement": {"layer1": 0.5, "layer2": 0.7}, "test_error": 0.25}
    pictures._draw_agreement(
        [record, {"config": {"method": "l2"}, "result": measured}], tmp_path / "picture.png"
    )
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_losses_are_drawn(tmp_path):
    pictures._draw_losses(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
