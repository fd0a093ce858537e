"""python -m experiments.analyse: what it finds, writes and refuses."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from abflax import Network, Resources, distill, load
from abflax.analysis import examine
from abflax.models import MODELS
from abflax.models.variables import init_variables
from abflax.weights import load_network, save_variables
from experiments import analyse
from experiments.analysis.report import arrays, examine_all, summarise, tables
from experiments.common import cli
from tests.conftest import Tiny

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two seeds of one step each, and their teacher's file."""
    workdir = tmp_path_factory.mktemp("workdir")
    model = MODELS["wrn10-1"]()
    teacher = Network(model, init_variables(model, jax.random.key(7), SHAPE))
    save_variables(workdir / "teacher.safetensors", teacher.variables)
    few = load("digits", "train").take(np.arange(32))
    for seed in (0, 1):
        distill(model, teacher, few, method="kd", epochs=(0, 1), batch_size=32, seeds=seed,
                workdir=workdir, resources=Resources(devices=1))  # fmt: skip
    return workdir


@pytest.fixture
def command(monkeypatch, capsys, workdir):
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["x", *arguments, "--workdir", str(workdir)])
        with pytest.raises(SystemExit) as left:
            cli.main(analyse.main)
        return left.value.code, *capsys.readouterr()

    return call


def _runs(workdir):
    return sorted(path.name for path in (workdir / "runs").iterdir())


COMMON = ("--dataset", "digits", "--examples", "60")


@pytest.mark.slow
def test_two_seeds_and_their_teacher(command, workdir):
    runs = _runs(workdir)
    taught = ("--teacher", "wrn10-1", "--teacher-weights", str(workdir / "teacher.safetensors"))
    code, out, err = command(*runs, *taught, *COMMON, "--distance-images", "3",
                             "--distance-neurons", "2", "--groups", "4")  # fmt: skip
    assert code == 0, err
    (folder,) = (workdir / "analysis").iterdir()
    assert folder.name == f"{runs[0]}-and-1-more"
    summary = json.loads((folder / "analysis.json").read_text())
    with np.load(folder / "analysis.npz") as file:
        arrays = dict(file)
    test = load("digits", "test").take(np.arange(60))
    teacher = load_network("wrn10-1", workdir / "teacher.safetensors")
    for index, run in enumerate(runs):
        network = load_network("wrn10-1", workdir / "runs" / run / "student.safetensors")
        found = examine(network, test, teacher)
        assert summary["error"][index] == found.student.wrong.mean()
        for layer, entry in summary["layers"].items():
            match = found.match[layer]
            assert entry["agreement"][index] == match.agreement
            assert entry["patterns"][index] == found.student.patterns[layer]
            assert entry["never"][index] == (found.student.firing_rate[layer] == 0).mean()
            np.testing.assert_array_equal(
                arrays[f"{index}/{layer}/agreement_by_neuron"], match.by_neuron
            )
            assert arrays[f"{index}/{layer}/distance"].shape == (3, 2)
        assert summary["groups"][index]["examples"] == [15, 15, 15, 15]
        wrong = np.dot(summary["groups"][index]["error"], [15] * 4)
        np.testing.assert_allclose(wrong, found.student.wrong.sum())
    mean = 100 * np.mean(summary["error"])
    assert f"and 1 more on 60 held-out images of digits: error {mean:.2f} ±" in out
    for name in ("agreement", "error", "firing", "distance"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] == 1440 and len(np.unique(picture)) > 20


@pytest.mark.slow
def test_a_network_alone(command, workdir):
    network = f"wrn10-1={workdir / 'teacher.safetensors'}"
    code, out, err = command(network, *COMMON, "--distance-images", "0", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["teacher"] is None and "groups" not in summary
    assert set(summary["layers"]) == {"layer1", "layer2", "layer3"}
    assert "agreement" not in summary["layers"]["layer1"]


@pytest.mark.slow
def test_mistakes(command, workdir):
    runs = _runs(workdir)
    mistakes = [
        ((runs[0],), "the teacher wrn10-1:"),
        (("wrn10-1",), "no wrn10-1 trained on digits is shipped"),
        (("0123456789ab",), "unknown model '0123456789ab'"),
        ((runs[0], "--teacher", "none", "--examples", "0"), "--examples must be between 1 and 500"),
        ((runs[0], "--teacher", "none", "--groups", "0"), "groups must be at least 1"),
    ]
    for arguments, sentence in mistakes:
        code, out, err = command("--dataset", "digits", *arguments)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1, err


def test_a_narrow_students_agreement_is_that_through_its_connectors(tmp_path):
    """Those of the run, and only with the teacher that they were trained for."""
    few, one = load("digits", "train").take(np.arange(16)), Resources(devices=1)
    teacher, other = (
        Network(Tiny(12), init_variables(Tiny(12), jax.random.key(seed), SHAPE)) for seed in (7, 8)
    )
    result = distill(Tiny(6), teacher, few, test=few, method="activation-boundary", epochs=(1, 0),
                     batch_size=16, workdir=tmp_path, resources=one)  # fmt: skip
    kept = analyse._connectors(result.directory, result.record, teacher)
    findings = examine_all([Network(Tiny(6), result.variables)], teacher, few, connectors=[kept])
    summary = summarise(findings, 2)
    assert summary["unmatched"] == []
    for layer, agreement in result.record["result"]["agreement"].items():
        assert summary["layers"][layer]["agreement"] == [pytest.approx(agreement, abs=1e-6)]
    named = {"networks": ["student"], "teacher": "teacher", "dataset": "digits"}
    assert tables(summary | named) and arrays(findings)["0/layer1/agreement_by_neuron"].size
    assert analyse._connectors(result.directory, result.record, other) is None
