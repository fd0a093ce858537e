"""Programs compile for machines that are not here; what is counted of them is right."""

import itertools
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from abflax import BusyError, InputError
from experiments import bench
from experiments.benchmark import compile_ahead
from experiments.benchmark.report import compiled_section

_HLO = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %c = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0:T(256)} get-tuple-element(%p), index=1
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %r = f32[8]{0} all-reduce-start(%f), to_apply=%add
  %s = f32[8]{0} all-reduce-done(%r)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %s)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%x), condition=%cond, body=%body
  ROOT %y = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_the_instructions_of_a_step_are_those_of_the_loop():
    assert compile_ahead._step_of(_HLO) == ["fusion", "all-reduce-start"]
    alone = _HLO.replace(", body=%body", "").replace("while", "sort")
    assert compile_ahead._step_of(alone) == ["sort"]
    # Without a loop over steps, a smaller loop is one instruction.
    longer = "".join(f"  %e{i} = f32[8]{{0}} exponential(%x)\n" for i in range(3))
    step = compile_ahead._step_of(_HLO.replace("  %w =", f"{longer}  %w ="))
    assert step == ["exponential"] * 3 + ["while"]


def test_of_a_gathered_table_only_the_rows_are_read():
    """A gather inside a fusion is corrected; XLA counts one outside rightly."""
    text = """HloModule m

%fused (table: u8[200,16], rows: s32[4,1]) -> u8[4,1,16] {
  %table = u8[200,16]{1,0} parameter(0), metadata={name="t"}
  %rows = s32[4,1]{1,0} parameter(1)
  ROOT %g = u8[4,1,16]{2,1,0} gather(%table, %rows), offset_dims={1,2}
}

ENTRY %main (table: u8[200,16], rows: s32[4,1]) -> u8[4,1,16] {
  %table = u8[200,16]{1,0} parameter(0)
  %rows = s32[4,1]{1,0} parameter(1)
  %h = u8[4,1,16]{2,1,0} gather(%table, %rows), offset_dims={1,2}
  ROOT %f = u8[4,1,16]{2,1,0} fusion(%table, %rows), kind=kLoop, calls=%fused
}
"""
    assert compile_ahead._never_read(text) == 200 * 16 - 4 * 16
    assert compile_ahead._never_read(text.replace("u8", "bf16")) == 2 * (200 * 16 - 4 * 16)
    assert compile_ahead._never_read(text.replace("kLoop", "kCustom")) == 0
    assert compile_ahead._never_read(_HLO) == 0
    assert [compile_ahead._bytes(each) for each in ("pred[3]", "f32[]", "f8e4m3fn[2,3]")] == [
        3,
        4,
        6,
    ]


def test_the_table():
    row = {
        "name": "classify", "precision": "bfloat16", "compile_seconds": 61.25, "peak_bytes": 9.2e8,
        "flops": 1.5e11, "moved_bytes": 2.7e9, "kernels": 397, "collectives": 0,
    }  # fmt: skip
    lost = {"name": "evaluate", "precision": "float32", "failure": "exit code -6: Check failed"}
    made = {"jax": "1", "jaxlib": "2", "commit": "a" * 40}
    text = compiled_section({"target": "h100", "environment": made, "rows": [row, lost]})
    assert f"### h100 (jax 1, jaxlib 2, commit {'a' * 12})" in text
    assert "| classify | 150.0 | 61.2 | bfloat16 | 920 | 2,700 | 397 | 0 | 0.81 | – |" in text
    assert "| evaluate | – | – | float32 | – | – | – | – | – | exit code -6: Check failed |" in text


def test_the_roofline_is_of_the_precision_in_which_a_machine_multiplies():
    """By default an H100 multiplies float32 as TF32, a TPU as bfloat16 (`jax.lax.Precision`)."""
    h100, tpu = (compile_ahead.TARGETS[name].roofline for name in ("h100", "tpu-v5e-4"))
    assert h100("float32", 494.7e9, 1) == pytest.approx(1e-3)
    assert h100("bfloat16", 989.4e9, 1) == pytest.approx(1e-3)
    assert tpu("float32", 197e9, 1) == tpu("bfloat16", 197e9, 1) == pytest.approx(1e-3)
    assert h100("float32", 1, 3.35e9) == tpu("float32", 1, 0.819e9) == pytest.approx(1e-3)


def test_what_one_of_several_devices_computes(monkeypatch):
    """As on four hosts of two chips: evaluation is not divided, targets are in each process."""
    devices = jax.devices("cpu") * 8
    monkeypatch.setattr(compile_ahead, "local_devices", lambda devices: devices[:2])
    shares = [compile_ahead._shares(devices[:8], program) for program in compile_ahead.PROGRAMS]
    assert shares == [8, 8, 8, 1, 2]


def test_unknown_targets_and_missing_wheels_are_named(monkeypatch):
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: None)
    for given, sentence in (("h200", "did you mean h100"), ("tpu-v5e-4", r"\[aot-tpu\]")):
        monkeypatch.setattr("sys.argv", ["bench", "--compile-for", given])
        with pytest.raises(InputError, match=sentence):
            bench.main(None)


def test_flags_that_do_not_go_with_compiling_are_named(monkeypatch):
    for given, sentence in (
        (["--batch", "64"], "takes no --batch"),
        (["--precision", "bfloat16"], "takes no --precision"),
        (["--record", "record.json"], "takes no --record"),
        (["--teacher", "wrn16-2", "--publish"], "name no networks"),
        (["--student", "wrn16"], "unknown"),
    ):
        monkeypatch.setattr("sys.argv", ["bench", "--compile-for", "h100", *given])
        with pytest.raises(InputError, match=sentence):
            bench.main(None)


def test_a_killed_command_compiles_only_what_is_missing(monkeypatch, tmp_path):
    calls, commit = [], "a" * 40

    def in_child(target, precision, program, *networks):
        calls.append((precision, program))
        if len(calls) == 4:
            raise KeyboardInterrupt
        row = {"target": target, "precision": precision, "name": program}
        return row | ({"failure": "exit code -6"} if len(calls) == 2 else {})

    def call():
        made = {"jax": "1", "jaxlib": "1", "commit": commit}
        monkeypatch.setattr(bench, "environment", lambda devices: made)
        bench._compile_target(Console(quiet=True), bench.Arguments(workdir=tmp_path), "h100")

    monkeypatch.setattr(compile_ahead, "in_child", in_child)
    programs = list(itertools.product(compile_ahead.PRECISIONS, compile_ahead.PROGRAMS))
    with pytest.raises(KeyboardInterrupt):
        call()
    call()
    assert calls == [*programs[:4], programs[1], *programs[3:]]
    call()
    assert len(calls) == 4 + 8
    commit = "b" * 40 + "+"
    call()
    call()  # what changed code compiled to is not known
    assert calls[12:] == programs * 2


def test_a_lock_of_libtpu_is_no_result(monkeypatch):
    said = 'JaxRuntimeError: ABORTED: Run "$ sudo rm /tmp/libtpu_lockfile".'
    done = subprocess.CompletedProcess((), 1, "", said)
    monkeypatch.setattr(compile_ahead.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(BusyError, match="another process compiles for a TPU"):
        compile_ahead.in_child("tpu-v5e-4", "float32", "evaluate")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "tpu-v5e-4"])
@pytest.mark.parametrize("precision", compile_ahead.PRECISIONS)
def test_a_small_pair_compiles_for_it(target, precision):
    if not compile_ahead.is_installed(target):
        pytest.skip(f"pip install -e '.[{compile_ahead.TARGETS[target].extra}]'")
    row = compile_ahead.in_child(target, precision, "initialise", "wrn10-2", "wrn10-1")
    assert "failure" not in row, row
    assert row["kernels"] > 50 and row["flops"] > 1e9 and row["moved_bytes"] > 1e8


_MINIMAL = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from experiments.benchmark.compile_ahead import TARGETS, _devices
from abflax.models.convolution import convolve

def f(x, w, k):
    x = jax.nn.relu(x)
    numbers = ("NHWC", "HWIO", "NHWC")
    one = convolve(x, w, (2, 2), "VALID", dimension_numbers=numbers)
    three = convolve(x, k, (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
    return (one + three).sum()

s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
shapes = s(1, 128, 32, 32, 64), s(1, 1, 64, 128), s(3, 3, 64, 128)
mapped = jax.pmap(f, in_axes=(0, None, None), devices=_devices(TARGETS["h100"]))
mapped.lower(*shapes).compile()
"""


@pytest.mark.slow
def test_the_case_that_aborted_compiles():
    """A strided 1×1 beside a strided 3×3 convolution of the same ReLU (openxla/xla#47381)."""
    if not compile_ahead.is_installed("h100"):
        pytest.skip("pip install -e '.[aot-cuda]'")
    environment = {**compile_ahead.os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _MINIMAL], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
