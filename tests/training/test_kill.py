"""A run killed by SIGKILL again and again ends with the bits of one that never was."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import QUICK
from tests.conftest import ROOT, save_random_network

# 16 + 16 steps on 130 digits; a checkpoint after every step.
ARGUMENTS = (
    "--dataset", "digits", "--teacher", "wrn10-2", "--student", "wrn10-1", "--fraction", "0.1",
    "--batch-size", "32", "--epochs", "4+4", "--protocol", "official", "--evaluate-every", "2",
    "--devices", "1", "--checkpoint-seconds", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command in a workdir of its own name, with one compilation cache for all."""
    base = tmp_path_factory.mktemp("kill")
    weights = base / "teacher.npz"
    save_random_network("wrn10-2", weights)
    environment = os.environ | {"XLA_FLAGS": QUICK}
    (base / "compiled").mkdir()

    def begin(name):
        workdir = base / name
        workdir.mkdir(exist_ok=True)
        if not (workdir / "compiled").exists():
            (workdir / "compiled").symlink_to(base / "compiled")
        command = [sys.executable, "-m", "experiments.run", *ARGUMENTS,
                   "--teacher-weights", str(weights), "--workdir", str(workdir)]  # fmt: skip
        with (workdir / "log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True
            )
        return process, workdir

    return begin


def _last_step(workdir):
    steps = [int(p.name) for p in workdir.glob("runs/*/checkpoints/*") if p.name.isdigit()]
    return max(steps, default=-1)


def _finish(process, workdir):
    assert process.wait(timeout=300) == 0, (workdir / "log").read_text()
    (run,) = (workdir / "runs").iterdir()
    return (run / "student.safetensors").read_bytes(), json.loads((run / "record.json").read_text())


def _kill_after(process, workdir, step):
    deadline = time.monotonic() + 300
    while _last_step(workdir) < step:
        assert process.poll() is None, (workdir / "log").read_text()
        assert time.monotonic() < deadline, (workdir / "log").read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_in_either_phase_and_started_again(start):
    weights, record = _finish(*start("whole"))
    assert [phase["steps"] for phase in record["phases"]] == [16, 16]
    for step in (5, 11, 22):
        process, workdir = start("killed")
        _kill_after(process, workdir, step)
        assert not list(workdir.glob("runs/*/record.json"))
        assert step <= _last_step(workdir) < 32
    again, resumed = _finish(*start("killed"))
    assert again == weights
    for each in (record, resumed):
        for key in ("seconds", "finished"):
            del each[key]
        for phase in each["phases"]:
            del phase["seconds"]
    assert resumed == record


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_leaves_with_143(start):
    process, workdir = start("terminated")
    deadline = time.monotonic() + 300
    while _last_step(workdir) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert f"goes on from step {_last_step(workdir)}" in (workdir / "log").read_text()
