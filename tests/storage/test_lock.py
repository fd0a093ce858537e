"""Only one process works on a run; the other exits and names the holder."""

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from abflax import BusyError, Interrupted, Resources, Result, distill, load
from abflax.runtime.reporter import NullReporter
from abflax.storage.lock import Lock
from experiments import run, search
from experiments.common import cli
from tests.conftest import Small

HOLD = """
import sys, time
from pathlib import Path
from abflax.storage.lock import Lock
with Lock(Path(sys.argv[1]), "run x"):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a lock until it is killed."""
    started = []

    def hold(path):
        command = [sys.executable, "-c", HOLD, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_held_by_another_process_then_stale(holder, tmp_path):
    path = tmp_path / "lock"
    other = holder(path)
    with pytest.raises(BusyError, match=rf"run x .* process {other.pid} on .*, which holds {path}"):
        Lock(path, "run x").__enter__()
    assert f"process {other.pid} on" in path.read_text()
    other.kill()  # by SIGKILL, so its file stays
    other.wait()
    assert path.exists()
    with Lock(path, "run x"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            Lock(path, "run x").__enter__()
    assert not path.exists()


def test_no_two_hold_it_at_once(tmp_path):
    """Eight threads, each with its own file descriptions, open, lock, remove and open again."""
    inside, most, entered, busy = 0, 0, 0, 0
    count = threading.Lock()

    def work():
        nonlocal inside, most, entered, busy
        for _ in range(300):
            try:
                with Lock(tmp_path / "lock", "run x"):
                    with count:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    with count:
                        inside -= 1
            except BusyError:
                with count:
                    busy += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == 1 and inside == 0
    assert entered + busy == 2400 and entered > 0 and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: make sure"):
        Lock(tmp_path / "lock", "run x").__enter__()


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train").take(np.arange(48))


def _train(digits, workdir, **options):
    settings = {"method": "cross-entropy", "epochs": (0, 1), "batch_size": 16} | options
    resources = Resources(devices=1, checkpoint_seconds=0.0)
    return distill(Small(), None, digits, workdir=workdir, resources=resources, **settings)


class _While(NullReporter):
    """Calls a function once, after the first step."""

    def __init__(self, call):
        self.call = call

    def steps(self, count, images, epoch, loss):
        if self.call:
            call, self.call = self.call, None
            call()


def test_a_running_run_is_not_started_again(digits, tmp_path):
    seen = []

    def again(**options):
        (run,) = (tmp_path / "runs").iterdir()
        before = sorted(path.name for path in run.iterdir())
        with pytest.raises(BusyError, match=f"run {run.name} .* process {os.getpid()} on"):
            _train(digits, tmp_path, **options)
        assert sorted(path.name for path in run.iterdir()) == before
        seen.append(options)

    def both():
        again()
        again(force=True)

    done = _train(digits, tmp_path, reporter=_While(both))
    assert seen == [{}, {"force": True}]
    names = sorted(path.name for path in done.directory.iterdir())
    assert names == ["config.json", "fingerprint.json", "record.json", "student.safetensors"]
    assert _train(digits, tmp_path).record == done.record


def test_a_record_written_before_the_lock_is_read(digits, tmp_path, monkeypatch):
    """The other process finishes after this one looked for the record and before its lock."""
    first = _train(digits, tmp_path)
    monkeypatch.setattr("abflax.distillation._finished", lambda *_: {})
    second = _train(digits, tmp_path, reporter=_While(lambda: pytest.fail("trained again")))
    assert second.record == first.record and second.trained is None


def test_killed_between_record_and_tidying_up(digits, tmp_path, monkeypatch):
    """The record is read, left-over files are removed, and `force` starts from step 0."""
    monkeypatch.setattr("abflax.training.run_directory.shutil.rmtree", lambda *_, **__: None)
    done = _train(digits, tmp_path)
    monkeypatch.undo()
    assert (done.directory / "checkpoints").exists()
    steps = []
    count = _While(None)
    count.steps = lambda number, *_: steps.append(number)
    assert _train(digits, tmp_path, reporter=count).record == done.record and not steps
    assert not (done.directory / "checkpoints").exists()
    monkeypatch.setattr("abflax.training.run_directory.shutil.rmtree", lambda *_, **__: None)
    _train(digits, tmp_path, force=True)
    monkeypatch.undo()
    _train(digits, tmp_path, force=True, reporter=count)
    assert sum(steps) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "at"), [("__init__", 0), ("_begin_phase", 0), ("_begin_phase", 1)]
)
def test_stopped_before_a_dispatch_that_would_compile(digits, tmp_path, monkeypatch, method, at):
    """After SIGTERM during the setup of a run or phase, it stops without another compilation."""
    from abflax import Network
    from abflax.models.variables import init_variables
    from abflax.training.run import Run

    teacher = Network(Small(), init_variables(Small(), jax.random.key(1), (8, 8, 1)), "teacher")
    options = {"method": "l2", "epochs": (1, 1), "resources": Resources(devices=1)}
    options |= {"teacher": teacher, "workdir": tmp_path, "batch_size": 16}
    whole = distill(Small(), data=digits, **options | {"workdir": None})
    original, calls, steps = getattr(Run, method), [], []

    def signalled(*arguments):
        done = original(*arguments)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        calls.append(1)
        return done

    count = NullReporter()
    count.steps = lambda number, *_: steps.append(number)
    with monkeypatch.context() as patch:
        patch.setattr(Run, method, signalled)
        with pytest.raises(Interrupted, match=f"goes on from step {3 * at}"):
            distill(Small(), data=digits, reporter=count, **options)
    assert sum(steps) == 3 * at
    chex.assert_trees_all_equal(distill(Small(), data=digits, **options).variables, whole.variables)


def test_a_stopped_run_releases_its_lock(digits, tmp_path):
    stop = _While(lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        _train(digits, tmp_path, reporter=stop)
    assert not list(tmp_path.glob("runs/*/lock"))
    _train(digits, tmp_path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; returns (exit code, stderr)."""
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main(module.main)
        return left.value.code, capsys.readouterr().err

    return call


def test_a_command_does_the_other_seeds_first(command, tmp_path, monkeypatch):
    weights_seeds = []

    def distill_group(runs, **_):
        (seed,) = (settings["seeds"].weights for settings in runs)
        weights_seeds.append(seed)
        if seed == 0:
            raise BusyError("run x is being worked on by process 7 on elsewhere")
        return [Result({}, None, None)]

    monkeypatch.setattr(run, "distill_group", distill_group)
    code, err = command(run, "--dataset", "digits", "--method", "cross-entropy", "--seeds", "3",
                        "--workdir", str(tmp_path))  # fmt: skip
    assert weights_seeds == [0, 1, 2] and code == 75
    assert err == (
        "error: 2 of 3 runs are finished; run x is being worked on by process 7 on elsewhere\n"
    )


def test_a_search_is_made_once(command, tmp_path, holder, monkeypatch):
    finished = Result({"result": {"test_error": 0.5}}, None, None)
    monkeypatch.setattr(search, "find_teacher", lambda *_: SimpleNamespace(name="wrn16-2:1"))
    monkeypatch.setattr(search, "distill_group", lambda runs, **_: [finished])
    arguments = ("--method", "nst", "--dataset", "digits", "--workdir", str(tmp_path))
    assert command(search, *arguments)[0] == 0
    (path,) = (tmp_path / "search").glob("nst-paper-digits-wrn16-2-wrn16-1-*.json")
    name = path.stem
    other = holder(path.with_suffix(".lock"))
    code, err = command(search, *arguments)
    assert code == 75 and f"the search {name} is being worked on by process {other.pid}" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("always")
def test_a_damaged_record_is_named_and_not_done_again_unasked(digits, tmp_path, command):
    done = _train(digits, tmp_path)
    path = done.directory / "record.json"
    text = path.read_text()
    for damaged in (text[: len(text) // 2], json.dumps({"schema": 2}), "\x00"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"{path} is "):
            _train(digits, tmp_path)
        code, err = command(run, "list", "--workdir", str(tmp_path))
        assert code == 0 and str(path) in err and err.count("\n") == 1
    assert _train(digits, tmp_path, force=True).record["hash"] == done.record["hash"]
