"""python -m experiments.export: exported files compute the student's logits, outside abflax too."""

import dataclasses
import json
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import safetensors
from flax import linen as nn
from PIL import Image

from abflax import Resources, RunConfig, distill, load
from abflax.data import Preprocessing
from abflax.data.decoding import centre_crop
from abflax.models import MODELS
from abflax.training.record import write_record
from abflax.weights import load_network, read_variables, save_variables, to_torch
from experiments import export
from tests.conftest import ROOT, draw_variables
from tests.experiments.conftest import plain

CONFIG = RunConfig("digits", "wrn10-1", method="cross-entropy")
RUN = CONFIG.hash


@pytest.fixture
def command(call_command):
    return lambda *arguments: call_command(export.main, *arguments)


def _write_run(workdir, **changes):
    """Writes as much of a run's folder as an export reads."""
    config = dataclasses.replace(CONFIG, **changes)
    folder = workdir / "runs" / config.hash
    record = {"schema": 1, "hash": config.hash, "config": config.as_json(), "state": "finished",
              "environment": {"device": "abacus"}, "finished": ""}  # fmt: skip
    write_record(folder / "record.json", record)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir")
    variables = draw_variables(MODELS["wrn10-1"](), (8, 8, 1))
    save_variables(_write_run(workdir) / "student.safetensors", variables)
    return workdir


def test_both_files_and_the_signature(command, workdir):
    code, out, err = command(RUN, "--workdir", workdir)
    assert (code, err) == (0, "") and out.count("read back") == 2
    folder, student = workdir / "exports" / RUN, workdir / "runs" / RUN / "student.safetensors"
    network, test = load_network("wrn10-1", student), load("digits", "test")
    with safetensors.safe_open(folder / "wrn10-1.safetensors", "np") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    chex.assert_trees_all_equal(weights, to_torch(network.model, network.variables))

    function = jax.export.deserialize(bytearray((folder / "wrn10-1.jaxexport").read_bytes()))
    assert function.platforms == ("cpu", "cuda", "tpu")
    pixels = (test.images[:4].astype(np.float32) - np.float32(4.88)) / np.float32(6.02)
    logits = jax.jit(lambda x: network.model.apply(network.variables, x, train=False))(pixels)
    largest = float(np.abs(logits).max())
    found = function.call(test.images[:4])
    chex.assert_trees_all_close(found, logits, rtol=0, atol=2e-6 * largest)

    signature = json.loads((folder / "signature.json").read_text())
    assert signature["images"] == {"shape": ["batch", 8, 8, 1], "dtype": "uint8"}
    assert signature["logits"] == {"shape": ["batch", 10], "dtype": "float32"}
    assert signature["normalised_inside"] == {"mean": [4.88], "std": [6.02]}
    assert signature["labels"] == list("0123456789") and signature["onnx"] is None
    assert signature["largest_difference"] < 1e-5


def test_weights_that_do_not_come_back(command, workdir, monkeypatch, tmp_path):
    def wrong(path, model, variables):
        changed = jax.tree.map(np.array, variables)
        changed["params"]["classifier"]["bias"][3] += 1
        export_as_it_is(path, model, changed)

    export_as_it_is = export.save_state_dict
    monkeypatch.setattr(export, "save_state_dict", wrong)
    (tmp_path / "runs").symlink_to(workdir / "runs")
    code, out, err = command(RUN, "--workdir", tmp_path)
    assert (code, out) == (74, "") and "does not give back 'fc.bias'" in err
    assert not (tmp_path / "exports" / RUN / "signature.json").exists()


@pytest.mark.slow
def test_a_function_that_does_not_come_back(command, workdir, monkeypatch, tmp_path):
    serialize = export.serialize
    other = Preprocessing((5.0,), (6.02,))
    monkeypatch.setattr(export, "serialize", lambda *given: serialize(*given[:3], other))
    (tmp_path / "runs").symlink_to(workdir / "runs")
    code, _, err = command(RUN, "--workdir", tmp_path)
    assert code == 74 and "gives other logits than the student" in err
    assert not (tmp_path / "exports" / RUN / "signature.json").exists()


IMAGES = {"shape": [16, 16, 3], "dtype": "uint8", "mean": [127.0], "std": [128.0],
          "classes": ["cat", "dog"], "shorter_side": 18}  # fmt: skip


@pytest.fixture
def of_photographs(tmp_path):
    """A run on a folder of photographs: its record says what they are."""
    folder = _write_run(tmp_path, dataset="photographs:0123")
    record = json.loads((folder / "record.json").read_text())
    write_record(folder / "record.json", {**record, "images": IMAGES})
    variables = draw_variables(MODELS["wrn10-1"](num_classes=2), (16, 16, 3))
    save_variables(folder / "student.safetensors", variables)
    return folder


def test_the_record_describes_photographs(command, of_photographs, tmp_path):
    code, _, err = command(of_photographs, "--workdir", tmp_path)
    assert (code, err) == (0, "")
    exported = tmp_path / "exports" / of_photographs.name
    signature = json.loads((exported / "signature.json").read_text())
    assert signature["images"] == {"shape": ["batch", 16, 16, 3], "dtype": "uint8"}
    assert (signature["labels"], signature["shorter_side"]) == (["cat", "dog"], 18)
    assert signature["normalised_inside"] == {"mean": [127.0], "std": [128.0]}

    # The page's example names the class that the library's own evaluation does.
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/transfer.md").read_text(), re.DOTALL | re.MULTILINE
    )
    names = {}
    exec(block.replace("workdir/exports/RUN", str(exported))
         .replace("photo.jpg", str(tmp_path / "photo.png")), names)  # fmt: skip
    pixels = centre_crop((tmp_path / "photo.png").read_bytes(), 16)
    np.testing.assert_array_equal(names["pixels"], pixels)
    network = load_network("wrn10-1", of_photographs / "student.safetensors")
    run_student = jax.jit(lambda x: network.model.apply(network.variables, x, train=False))
    logits = run_student((pixels[None] - np.float32(127)) / np.float32(128))
    chex.assert_trees_all_close(names["logits"], np.asarray(logits[0]), rtol=1e-4, atol=1e-5)
    assert names["label"] == ["cat", "dog"][int(logits[0].argmax())]


@pytest.mark.slow
@pytest.mark.parametrize("student", ["wrn10-1", "mobilenet-v1-0.25", "mobilenet-v2-0.35"])
def test_onnx_runtimes_give_the_students_logits(command, tmp_path, student):
    """Written and read back by the command, whose tolerance is 1e-5 of the largest logit."""
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    folder = _write_run(tmp_path, dataset="photographs:0123", student=student)
    record = json.loads((folder / "record.json").read_text())
    write_record(folder / "record.json", {**record, "images": IMAGES})
    variables = draw_variables(MODELS[student](num_classes=2), (16, 16, 3))
    save_variables(folder / "student.safetensors", variables)
    code, out, err = command(folder, "--onnx", "--workdir", tmp_path)
    assert code == 0 and out.count("read back") == 3, err
    exported = tmp_path / "exports" / folder.name
    signature = json.loads((exported / "signature.json").read_text())
    session = runtime.InferenceSession(exported / signature["onnx"])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    (logits,) = session.run(["logits"], {"images": pixels})
    function = jax.export.deserialize(bytearray((exported / signature["function"]).read_bytes()))
    largest = np.abs(logits).max()
    assert largest > 0 and np.abs(logits - function.call(pixels)).max() < 1e-5 * largest


def test_without_jax2onnx(command, workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    (tmp_path / "runs").symlink_to(workdir / "runs")
    code, _, err = command(RUN, "--onnx", "--workdir", tmp_path)
    assert code == 2 and "pip install --no-deps jax2onnx" in err
    assert not (tmp_path / "exports" / RUN / "signature.json").exists()


SIZE = ("--image-size", "8", "--std", "1")
MISTAKES = [
    (("abc",), f"unknown run 'abc'; known: {RUN}"),
    ((RUN, "--image-size", "8"), "give --image-size, --mean and --std"),
    ((RUN, *SIZE, "--mean", "1,2"), "mean has 2 entries for 1 channels"),
    ((RUN, "--image-size", "0", "--mean", "0", "--std", "1"), "--image-size must be at least 1"),
    ((RUN, *SIZE, "--mean", "a"), "'a' is no list of numbers"),
    ((RUN, "--image-sise", "8"), "Perhaps you meant: --image-size"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=lambda x: " ".join(x)[:40])
def test_mistakes(command, workdir, tmp_path, arguments, sentence):
    (tmp_path / "runs").symlink_to(workdir / "runs")
    code, out, err = command(*arguments, "--workdir", tmp_path)
    assert (code, out) == (2, "") and sentence in plain(err)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_cannot_be_exported(command, tmp_path):
    assert "there is no finished run in" in command(RUN, "--workdir", tmp_path)[2]
    other = _write_run(tmp_path, student="Net( width = 4 )").name
    code, _, err = command(other, "--workdir", tmp_path)
    assert code == 2 and "trained a Net, which abflax.models.MODELS does not name" in err
    for factory, why in (
        ("tests.nothing:make", "makes no model"),
        ("tests.conftest:under", "makes no model"),
        ("builtins:dict", "makes a dict, no Flax module"),
    ):
        code, _, err = command(other, "--workdir", tmp_path, "--model", factory)
        assert code == 2 and why in plain(err)


class Own(nn.Module):
    """A model of one's own, without published names."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(images.shape[0], -1))


def test_a_model_of_ones_own_by_its_path(command, tmp_path):
    variables = draw_variables(Own(), (8, 8, 1))
    folder = _write_run(tmp_path, student="Own( )")
    save_variables(folder / "student.safetensors", variables)
    code, out, err = command(folder, "--model", f"{__name__}:Own", "--workdir", tmp_path / "other")
    assert (code, err) == (0, "") and out.count("read back") == 1
    exported = tmp_path / "other" / "exports" / folder.name
    function = jax.export.deserialize(bytearray((exported / "Own.jaxexport").read_bytes()))
    test = load("digits", "test")
    images = (test.images[:3] - test.preprocessing.mean) / test.preprocessing.std
    chex.assert_trees_all_close(function.call(test.images[:3]),
                                Own().apply(variables, images), rtol=1e-4)  # fmt: skip
    read = read_variables(exported / "Own.safetensors")
    chex.assert_trees_all_equal(read, {"batch_stats": {}, **variables})


WITHOUT_ABFLAX = """
import pathlib, sys
import jax, numpy as np
function = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.asarray(function.call(images)))
assert not {"abflax", "flax"} & set(sys.modules)
"""


@pytest.mark.slow
def test_a_mobilenet_outside_abflax(command, tmp_path):
    """A trained MobileNet: the function without abflax, the weights in PyTorch's own layers."""
    torch = pytest.importorskip("torch")
    from torch import nn

    few, test = load("digits", "train").take(np.arange(32)), load("digits", "test")
    model = MODELS["mobilenet-v1-0.25"](num_classes=10)
    result = distill(model, None, few, method="cross-entropy", epochs=(0, 2), batch_size=32,
                     workdir=tmp_path, resources=Resources(devices=1))  # fmt: skip
    run = result.record["hash"]
    measured = ("--image-size", "8", "--mean", "4.88", "--std", "6.02")
    code, _, err = command(run, *measured, "--workdir", tmp_path)
    assert code == 0, err
    name = tmp_path / "exports" / run / "mobilenet-v1-0.25"
    np.save(tmp_path / "images.npy", test.images[:6])
    files = (f"{name}.jaxexport", tmp_path / "images.npy", tmp_path / "logits.npy")
    subprocess.run([sys.executable, "-c", WITHOUT_ABFLAX, *files], check=True, cwd="/")
    pixels = (test.images[:6].astype(np.float32) - np.float32(4.88)) / np.float32(6.02)
    run_student = jax.jit(lambda x: model.apply(result.variables, x, train=False))
    logits = np.asarray(run_student(pixels))
    chex.assert_trees_all_close(np.load(tmp_path / "logits.npy"), logits, rtol=1e-4, atol=1e-5)

    def unit(inputs, outputs, kernel, stride, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    widths = [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]
    parts = [nn.Sequential(*unit(1, 8, 3, 2))]
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        stride = 2 if number in (2, 4, 6, 12) else 1
        parts.append(nn.Sequential(*unit(inputs, inputs, 3, stride, inputs),
                                   *unit(inputs, outputs, 1, 1)))  # fmt: skip
    network = nn.Module()
    network.model, network.fc = nn.Sequential(*parts), nn.Linear(256, 10)
    from safetensors.torch import load_file

    network.load_state_dict(load_file(f"{name}.safetensors"), strict=True)
    network.eval()
    with torch.no_grad():
        maps = network.model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        theirs = network.fc(maps.mean(dim=(2, 3))).numpy()
    chex.assert_trees_all_close(theirs, logits, rtol=1e-3, atol=1e-4)
