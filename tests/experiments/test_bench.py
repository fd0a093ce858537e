"""What the benchmark counts, and how it shows it; its clock is not tested."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax import load
from abflax.errors import InputError
from abflax.models import MODELS
from abflax.models.variables import abstract_variables
from abflax.taps import run_model
from experiments import bench, quickstart
from experiments.benchmark import (
    compile_ahead,
    convolution_work,
    jax_work,
    scaling,
    timing,
    whole,
)
from experiments.benchmark.report import page, section
from experiments.benchmark.timing import alternate, compiled, median_ratio
from experiments.common.flops import count_flops
from experiments.paper_tables.records import RECORDS


def test_flops_are_those_of_the_program_as_written():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7


def test_things_run_in_turn_and_the_first_round_is_not_counted():
    order = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_of_pairs():
    # 2, 4 and 0.5 times as long; the ratio of the medians would be 1.
    assert median_ratio([1.0, 2.0, 4.0], [2.0, 8.0, 2.0]) == 2.0


def test_a_line_is_by_least_squares():
    assert scaling.line((1, 2, 4), (5.0, 7.0, 11.0)) == pytest.approx((2.0, 3.0, 0.0))
    slope, intercept, away = scaling.line((0, 1, 2), (1.0, 4.0, 1.0))
    assert (slope, intercept, away) == pytest.approx((0.0, 2.0, 1.0))


def test_held_bytes_are_arguments_results_and_temporaries():
    run, seconds, held = compiled(jax.jit(lambda x: x + 1), jnp.zeros(1000, jnp.float32))
    assert held >= 8000 and seconds > 0
    assert float(run(jnp.zeros(1000, jnp.float32))[0]) == 1


@pytest.fixture
def found():
    row = {
        "name": "initialise", "seconds": [0.5, 0.25, 0.375], "images_per_second": 341.3,
        "flops": 2e11, "flops_per_second": 6e11, "bytes": 3e9, "compile_seconds": 12.25,
        "torch_seconds": [0.75, 0.5, 0.5], "ratio": 1.5,
    }  # fmt: skip
    return {
        "environment": {"device": "Some GPU", "devices": 2, "python": "3.12", "commit": "abc",
                        "jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12", "optax": "0.2",
                        "torch": None},
        "setting": {"teacher": "wrn22-4", "student": "wrn16-2", "batch": 128,
                    "precision": "float32", "repetitions": 3},
        "peak_flops": 2e12,
        "sections": {"steps": [row], "nst": [row | {"flops_per_second": None}]},
    }  # fmt: skip


def test_tables(found):
    lines = section("steps", found).splitlines()
    assert lines[2] == (
        "| work | ms | PyTorch, ms | ratio | images/s | GFLOP a step | GFLOP/s "
        "| % of matrix product | MB held | s to compile |"
    )
    assert lines[4] == (
        "| initialise | 375.0 (250.0 to 500.0) | 500.0 (500.0 to 750.0) | 1.50 | 341 | 200.0 | 600 "
        "| 30 | 3,000 | 12.2 |"
    )
    assert "% of matrix product" not in section("nst", found)


def test_where_a_step_goes(found):
    times = {
        "teacher": 4.0, "student forward": 1.0, "forward and backward, of the taps' squares": 3.0,
        "forward, connectors, loss": 1.25, "forward and backward, of the loss": 3.5,
        "whole step": 8.0,
    }  # fmt: skip
    rows = [{"name": name, "seconds": [9.0, seconds, 0.5]} for name, seconds in times.items()]
    assert section("parts", found | {"sections": {"parts": rows}}).endswith(
        "of a whole step: the teacher 50 %, the student's forward pass 12 %, its backward pass "
        "25 %, connectors and hinge 6 %, augmentation, optimiser and what the parts cost less "
        "alone 6 %.\n"
    )


def test_seconds_an_epoch(found):
    rows = [
        {"name": "1 in one program", "seconds": [0.5], "images_per_second": 250.0},
        {"name": "8 in one program", "seconds": [2.0], "images_per_second": 12.5},
        {"name": "a line: …"},
    ]
    assert section("seeds", found | {"sections": {"seeds": rows}}).endswith(
        "an epoch of 50,000 images takes 200 s (1 in one program), 4,000 s (8 in one program).\n"
    )


def test_the_page_is_rebuilt_from_what_is_kept(found, tmp_path, monkeypatch):
    folder = tmp_path / "records" / "bench"
    monkeypatch.setattr(bench, "PUBLISHED", folder)
    monkeypatch.setattr(bench, "COMPILED", folder.with_name("compiled"))
    written = bench.publish(found)
    assert written == tmp_path / "BENCH.md"
    (kept,) = folder.glob("*")
    assert kept.name == "some-gpu-wrn22-4-wrn16-2-128-float32.json"
    assert written.read_text() == page([json.loads(kept.read_text())])
    assert "## Some GPU: wrn22-4 → wrn16-2, batch 128, float32" in written.read_text()


def test_an_unknown_section_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--sections", "step"])
    with pytest.raises(InputError, match="unknown section 'step'; did you mean steps"):
        bench.main(None)


@pytest.fixture
def record():
    return whole.read(RECORDS / "af3560b5fe89.json")  # wrn16-2 -> wrn16-1, batch 128, 390 + 391


def test_a_whole_run_by_its_record(monkeypatch, record):
    monkeypatch.setattr(whole, "device_name", lambda device: record["environment"]["device"])
    monkeypatch.setattr(whole.Bench, "step_flops", lambda self, phase: len(phase.name) * 1e9)
    bench_of = whole.bench_of(record)
    assert (bench_of.teacher, bench_of.student, bench_of.batch) == ("wrn16-2", "wrn16-1", 128)
    initialise, classify, everything = whole.whole(record, bench_of)
    assert classify["name"] == "classify: 1 epochs, 391 steps"
    assert initialise["flops_per_second"] == pytest.approx(10e9 * 390 / 504.509)
    assert initialise["images_per_second"] == pytest.approx(128 * 390 / 504.509)
    assert everything["name"] == "all of it: run af3560b5fe89, 100 % of cifar10"
    assert everything["whole_seconds"] == 997.313 and everything["test_error"] == "36.49"


def test_a_run_on_another_device_or_of_other_images_is_named(monkeypatch, record, tmp_path):
    monkeypatch.setattr(whole, "device_name", lambda device: "Some GPU")
    with pytest.raises(InputError, match="the run was on AMD EPYC, 1 cores, and this is Some GPU"):
        whole.whole(record, whole.bench_of(record))
    with pytest.raises(InputError, match="no record of a run at"):
        whole.read(tmp_path / "record.json")
    shared = {**record, "environment": {**record["environment"], "abreast": 2}}
    (tmp_path / "record.json").write_text(json.dumps(shared))
    with pytest.raises(InputError, match="is of a run that was trained in one program"):
        whole.read(tmp_path / "record.json")
    record["config"]["teacher"] = None
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="is of a run without a teacher"):
        whole.read(tmp_path / "record.json")
    record["config"]["dataset"] = "digits"
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="is of digits: FLOP are counted for CIFAR's images"):
        whole.read(tmp_path / "record.json")


@pytest.fixture
def not_compiled(monkeypatch):
    """The benchmark's programs are lowered alone."""
    lowered = lambda function, *arguments: (function.lower(*arguments), 0.0, 0)  # noqa: E731
    monkeypatch.setattr(timing, "compiled", lowered)
    monkeypatch.setattr(jax_work, "compiled", lowered)


@pytest.mark.slow
@pytest.mark.usefixtures("not_compiled")
def test_all_work_fits_the_engine():
    """The engine's programs take what the benchmark gives them."""
    bench_ = jax_work.Bench("wrn10-1", "wrn10-1", batch=8)
    assert bench_.train(bench_.phases[0]).flops > bench_.teacher_forward().flops > 1e6
    assert bench_.evaluate().images >= 1000
    assert compile_ahead._flops(bench_, "targets") > 1e6


@pytest.mark.slow
@pytest.mark.usefixtures("not_compiled")
def test_targets_that_need_labels_and_keys_fit_the_engine():
    bench_ = jax_work.Bench("wrn10-1", "wrn10-1", batch=8, method="bss")
    assert bench_.train(bench_.phases[0]).flops > bench_.teacher_forward().flops


def test_the_convolutions_of_a_network_are_found(monkeypatch):
    """Their FLOP are those of the network's forward pass, all but one percent."""
    found = convolution_work.convolutions("wrn16-2")
    assert sum(count for _, count in found) == 16  # the first, two a block, three shortcuts
    assert str(found[0][0]) == "3×3, 3 → 16, of 32²" and found[0][0].is_first
    assert "1×1, 32 → 64, of 32², stride 2" in [str(each) for each, _ in found]
    monkeypatch.setattr(timing, "compiled", lambda *_: (None, 0.0, 0))
    flops = sum(count * each.work(8, trained=False).flops for each, count in found)
    model = MODELS["wrn16-2"]()
    variables = abstract_variables(model, jax_work.SHAPE)
    images = jax.ShapeDtypeStruct((8, *jax_work.SHAPE), jnp.float32)
    forward = lambda v, x: run_model(model, v, x, train=False).logits
    assert 0.97 < flops / count_flops(forward, variables, images) < 1


@pytest.mark.slow
def test_every_section_runs(monkeypatch, tmp_path, capsys):
    """The whole command with little work, which still takes many minutes on one core."""
    from rich.console import Console

    arguments = ["--teacher", "wrn10-1", "--student", "wrn10-1", "--batch", "8"]
    arguments += ["--repetitions", "1", "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    monkeypatch.setattr(scaling, "IMAGES", (64, 128, 512))
    monkeypatch.setattr(scaling, "SEEDS", 2)
    few = {"train": np.arange(320), "test": np.arange(40)}
    monkeypatch.setattr(scaling, "load", lambda name, split: load(name, split).take(few[split]))
    monkeypatch.setattr(bench, "METHODS", ("cross-entropy", "activation-boundary", "nst"))
    monkeypatch.setattr(bench, "STUDENTS", (1, 2, 4))
    monkeypatch.setattr(quickstart, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(quickstart, "EPOCHS", (1, 1))
    bench.main(Console())
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["sections"]) == list(bench.SECTIONS)
    names = [row["name"] for row in found["sections"]["methods"]]
    assert names[0] == "cross-entropy: joint" and "nst: initialise" in names
    *kept, fitted = found["sections"]["cache"]
    assert [row["bytes"] / kept[0]["bytes"] for row in kept] == list(scaling.VIEWS)
    assert "at most 0% away" in fitted["name"]
    gram, full = found["sections"]["nst"]
    assert gram["bytes"] < full["bytes"] / 5
    assert "### Where an initialise step goes" in capsys.readouterr().out
