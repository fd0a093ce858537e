"""The idea in two dimensions."""

import numpy as np
import pytest
from PIL import Image

from experiments import figure1


def test_spiral():
    # φ/π + 0.8 r: 0.8, 1.3, 1.8, 0.3, and a turn further out 0 + 1.6, −0.25 + 1.6 √2 = 2.01.
    points = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [2, 0], [2, -2.0]])
    np.testing.assert_array_equal(figure1.arm(points), [1, 0, 0, 1, 0, 1])
    data = figure1.spiral(500, 0)
    assert data.image_shape == (1, 1, 2) and 1.9 < np.abs(data.images).max() <= 2
    assert len(np.unique(data.images[:, 0, 0], axis=0)) == 500


@pytest.mark.slow
def test_figure_of_a_few_steps(call_command, monkeypatch, tmp_path):
    points = {"teacher": 128, "student": 64, "test": 100}
    small = {"TEACHER_EPOCHS": 1, "EPOCHS": (1, 1), "_GRID": 20, "POINTS": points}
    for name, value in small.items():
        monkeypatch.setattr(figure1, name, value)
    _, out, _ = call_command(figure1.main, "--seeds", "4,", "--workdir", tmp_path)
    assert "l2" in out and "activation-boundary" in out and "seeds: [4]" in out
    with Image.open(tmp_path / "figure1.png") as picture:
        assert picture.size[0] == 1440 and len(np.unique(picture)) > 20


@pytest.mark.slow
def test_activation_boundaries_agree_more_on_every_seed():
    teacher, teacher_run = figure1.train_teacher()
    assert teacher_run.record["result"]["test_error"] < 0.03
    runs = {
        method: [figure1.train_student(teacher, method, seed) for seed in (3, 4, 5)]
        for method in figure1.TRANSFER_WEIGHTS
    }
    ours, theirs = (figure1.shares(runs[m], "agreement") for m in ("activation-boundary", "l2"))
    assert min(ours) > max(theirs)
    assert min(figure1.shares(runs["activation-boundary"], "initialise_agreement")) > 0.97
