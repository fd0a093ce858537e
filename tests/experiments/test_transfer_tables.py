"""Tables 4 and 5: their runs, their networks, and what they say where weights are not given."""

import dataclasses
import os
import sys

import pytest

from abflax import BusyError, Network
from abflax.methods import METHODS
from abflax.models import MODELS
from experiments import table
from experiments.common import cli
from experiments.common.networks import architecture, pretrained
from experiments.paper_tables.cells import fill, markdown, seeded
from experiments.paper_tables.definitions import TABLES
from experiments.paper_tables.plan import jobs
from tests.tiny_tables import record, run_of

SCENES, BIRDS = TABLES["paper"]["4"], TABLES["paper"]["5"]
TAUGHT, BEGUN = "resnet50:0123456789ab", "mobilenet-v1:ba9876543210"


def test_their_runs():
    for each, dataset in ((SCENES, "mit_indoor_scenes"), (BIRDS, "caltech_birds2011")):
        assert len(each.runs) == 8 * 5 and each.teachers == ("resnet50",)
        assert each.given == ("resnet50", "mobilenet-v1 (ImageNet)")
        assert {(run.dataset, run.setting, run.epochs, run.batch_size) for run in each.runs} == {
            (dataset, "transfer", (60, 40), 32)
        }
    steps = {
        (job.run.method, job.run.per_class): job.steps for job in jobs([SCENES], [0])
        if job.run.student == "mobilenet-v1"
    }  # fmt: skip
    # 5 · 67 images, 60 and 40 epochs of batches of 32
    assert steps["activation-boundary", 5] == {"initialise": 628, "classify": 418}
    assert steps["attention", 80] == {"joint": 16750}
    assert not any(job.teaches for job in jobs([SCENES, BIRDS], [0]))
    assert {job.examples for job in jobs([BIRDS], [0])} == {200, 1000, 2000, 4000, 6000}
    assert METHODS[run_of(SCENES, "random", "5").method](setting="transfer")[0].name == "joint"


def test_the_papers_numbers():
    assert SCENES.paper["activation-boundary", "5"] == 43.36
    assert SCENES.paper["imagenet pre-trained", "80"] == 69.78
    assert BIRDS.paper["random", "1"] == 2.4 and BIRDS.paper["dtl", "30"] == 62.05


def test_networks_have_their_identities():
    run = run_of(SCENES, "imagenet pre-trained", "5")
    assert run.student == pretrained("mobilenet-v1") and run.teacher is None
    assert architecture(run.student) == "mobilenet-v1" == architecture("mobilenet-v1")
    assert seeded(run, {"resnet50": TAUGHT}, 3) is None
    known = seeded(run, {run.student: BEGUN}, 3)
    assert (known.student, known.teacher, known.seeds.weights) == (BEGUN, None, 3)
    taught = run_of(SCENES, "fitnet", "5")
    assert seeded(taught, {}, 3) is None
    assert seeded(taught, {"resnet50": TAUGHT}, 3).teacher == TAUGHT


def _record(row, error, seed, **changes):
    run = dataclasses.replace(run_of(SCENES, row, "20"), **changes)
    return record(run, seed, error, teacher=TAUGHT)


def test_accuracies_and_what_is_not_available():
    part = SCENES.select(columns=["20"])
    records = dict(
        _record("activation-boundary", error, seed) for seed, error in ((0, 0.3), (1, 0.32))
    )
    shown = markdown(fill(part, records))
    assert "| activation-boundary: with DTL | 66.34 │ 69.00 ± 1.41 (2) |" in shown
    assert "| imagenet pre-trained | 52.99 │ not available |" in shown
    assert "| random | 30.37 │ not run |" in shown and shown.count("Test accuracy, %") == 1
    # Once there are records of students that began with weights, they are found, by their name.
    records |= dict(
        _record("imagenet pre-trained", error, seed, student=BEGUN)
        for seed, error in ((0, 0.24), (1, 0.26))
    )
    shown = markdown(fill(part, records))
    assert "| imagenet pre-trained | 52.99 │ **75.00 ± 1.41** (2) |" in shown
    assert "1 reversed (imagenet pre-trained before activation-boundary at 20)" in shown


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["x", *arguments, "--workdir", str(tmp_path / "workdir")])
        with pytest.raises(SystemExit) as left:
            cli.main(table.main)
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


def test_without_published_weights_they_are_left(command, monkeypatch):
    monkeypatch.setattr(table, "read", lambda *_: pytest.fail("nothing can be run"))
    line = ("4", "--columns", "5", "--seeds", "1", "--rows", "fitnet,imagenet pre-trained")
    code, out, err = command(*line)
    assert code == os.EX_TEMPFAIL and "2 of 2 runs are left for another call" in err
    assert (
        "the published weights of resnet50 are not given (--teacher-weights resnet50=FILE)" in out
    )
    assert "of mobilenet-v1 are not given (--student-weights mobilenet-v1=FILE)" in out
    code, out, err = command("4,5", "--dry-run", "--seeds", "2")
    assert code == 0 and "160 runs, 0 of them of teachers; 0 finished, 160 to run in" in out


def test_a_student_begins_with_what_is_given(command, monkeypatch):
    seen = []
    given = Network(MODELS["wrn10-1"](), {"params": {}}, BEGUN)
    monkeypatch.setattr(
        table, "pretrained_backbone", lambda name, path: seen.append((name, path)) or given
    )
    monkeypatch.setattr(table, "MODELS", {"mobilenet-v1": MODELS["wrn10-1"]})
    monkeypatch.setattr(table, "read", lambda *asked: seen.append(asked) or _Classes)

    def distill_group(runs, student, teacher, data, **_):
        (run,) = runs
        network = (run["student"].name, run["student"].model.num_classes)
        seen.append((*network, teacher, run["per_class"], run["seeds"].weights))
        raise BusyError("run 0123 is being done by process 7")

    monkeypatch.setattr(table, "distill_group", distill_group)
    command("4", "--columns", "5", "--seeds", "1", "--rows", "imagenet pre-trained",
            "--student-weights", "mobilenet-v1=v1.pth")  # fmt: skip
    assert seen == [
        ("mobilenet-v1", "v1.pth"),
        ("mit_indoor_scenes", "train", None),
        ("mit_indoor_scenes", "test", None),
        (BEGUN, 67, None, 5, 0),
    ]


class _Classes:
    num_classes = 67
