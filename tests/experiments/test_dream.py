"""Dreams from the command line, students of them, and routes of anchors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from abflax import Network, load
from abflax.models import MODELS
from abflax.models.variables import init_variables
from abflax.weights import save_variables
from experiments import dream, quickstart, run
from experiments.common import plots
from experiments.common.networks import find_anchors, greedy_anchors
from tests.conftest import ROOT, save_random_network
from tests.experiments.conftest import plain

TEACHER = ("--teacher", "wrn10-1", "--dataset", "digits")


def test_a_contact_sheet_has_a_row_a_class(tmp_path):
    images = np.arange(3.0).reshape(3, 1, 1, 1).repeat(2, 1).repeat(2, 2) * 8
    plots.contact_sheet(images, np.array([0, 1, 1]), (0.0, 16.0), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 3 * 24, 2 * 3 * 24)
        pixels = np.asarray(sheet.convert("L"))[::24, ::24]
    middle = pixels[3, 0]
    assert pixels[0].tolist() == [0, 0, 255, 255, 255, 255] and 100 < middle < 150
    assert pixels[3].tolist() == [middle, middle, 255, 255, 255, 255]


@pytest.mark.parametrize("name", dream.STUDIES)
def test_the_pages_table_is_the_studys(name):
    summary = json.loads((ROOT / "experiments" / f"dreamed_{name}.json").read_text())
    page = (ROOT / "docs" / "relatives.md").read_text()
    assert dream.page_table(summary) in page
    assert summary["how"] == dataclasses.asdict(dream.STUDIES[name].how)


@pytest.mark.slow
def test_a_study_has_every_source_method_and_seed(call_command, tmp_path, monkeypatch):
    study = dream.STUDIES["digits"]
    how = dataclasses.replace(study.how, steps=2)
    short = dataclasses.replace(study, count=20, epochs=(1, 1), batch_size=16, how=how)
    monkeypatch.setitem(dream.STUDIES, "digits", short)
    monkeypatch.setattr(quickstart, "TEACHER_EPOCHS", 1)
    code, out, err = call_command(
        dream.main, "--study", "digits", "--seeds", "2", "--workdir", tmp_path
    )
    assert code == 0, err
    summary = json.loads((tmp_path / "dreamed_digits.json").read_text())
    assert summary["how"] == dataclasses.asdict(short.how)
    sources = ("dreamed digits", "real digits", "noise")
    names = [f"{source}, {method}" for source in sources for method in dream.METHODS]
    assert list(summary["test_errors"]) == list(summary["records"]) == names
    hashes = [each for hashes in summary["records"].values() for each in hashes]
    assert len(set(hashes)) == len(hashes) == 12
    for name, (first, second) in summary["records"].items():
        for seed, each in enumerate((first, second)):
            record = json.loads((tmp_path / "runs" / each / "record.json").read_text())
            assert record["config"]["method"] == name.split(", ")[1]
            assert record["config"]["seeds"]["weights"] == seed
            assert record["result"]["test_error"] == summary["test_errors"][name][seed]


@pytest.mark.slow
def test_a_student_of_dreams(call_command, tmp_path):
    weights = tmp_path / "teacher.npz"
    save_random_network("wrn10-1", weights)
    common = (*TEACHER, "--teacher-weights", weights, "--workdir", tmp_path)
    making = ("--count", "12", "--steps", "2", "--batch-size", "16", "--devices", "1")
    code, out, err = call_command(dream.main, *common, *making)
    assert code == 0, err
    (folder,) = (tmp_path / "dreams").iterdir()
    assert f"12 images: {folder}" in out.replace("\n", " ")
    assert {path.name for path in folder.iterdir()} >= {"dreamed.npz", "dreams.png"}
    assert len(load(f"dreamed:{folder}", "train")) == 12
    training = ("--dataset", f"dreamed:{folder}", "--method", "kd", "--epochs", "0+1", "--json",
                "--batch-size", "12", "--devices", "1", "--student", "wrn10-1")  # fmt: skip
    code, out, err = call_command(run.main, *common[:2], *common[4:], *training)
    assert code == 0, err
    (record,) = json.loads(out)
    assert record["config"]["test"] == "digits" and "test_error" in record["result"]


def test_mistakes(call_command, tmp_path):
    for arguments, sentence in (
        (("--dataset", "cifar11"), "unknown dataset 'cifar11'; did you mean cifar10"),
        ((*TEACHER, "--teacher-weights", "no.npz"), "there is no weights file no.npz"),
        (("--steps", "0"), "must be at least 1"),
    ):
        code, out, err = call_command(dream.main, *arguments, "--workdir", tmp_path / "w")
        assert (code, out) == (2, "") and sentence in plain(err)
    digits = ("--dataset", "digits", "--method", "cross-entropy")
    for arguments, sentence in (
        ((*digits, "--anchors", "2"), "--anchors are a run's: name it"),
        (("--dataset", f"dreamed:{tmp_path}", "--method", "kd"), "there are no finished dreams"),
    ):
        code, out, err = call_command(run.main, *arguments, "--workdir", tmp_path / "w")
        assert (code, out) == (2, "") and sentence in plain(err)


def test_anchors_at_equal_distances_and_greedily(tmp_path):
    folder = tmp_path / "runs" / "run" / "anchors"
    folder.mkdir(parents=True)
    model = MODELS["wrn10-1"]()
    for epoch in (2, 4, 6, 8):
        variables = init_variables(model, jax.random.key(0), (8, 8, 1))
        scale = epoch / 2 if epoch < 8 else 3
        head = variables["params"]["classifier"]
        head["kernel"] = head["kernel"] * scale
        save_variables(folder / f"{epoch:06}.safetensors", variables)
    found = find_anchors("wrn10-1", "run", tmp_path, 2)
    everyone = find_anchors("wrn10-1", "run", tmp_path, 4)
    assert [each.name for each in found] == [everyone[1].name, everyone[3].name]
    with pytest.raises(ValueError, match="holds 4 anchors, not 5: train that run with --keep"):
        find_anchors("wrn10-1", "run", tmp_path, 5)
    data = load("digits", "train").take(range(16))
    assert greedy_anchors(everyone, data, 1e-9) == everyone[:3] + everyone[3:]
    assert greedy_anchors(everyone, data, 1e9) == [everyone[0], everyone[3]]
    assert all(isinstance(each, Network) for each in everyone)
