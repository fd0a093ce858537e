"""Full, read-only or corrupted disks give readable errors, and the rerun resumes."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import chex
import jax
import numpy as np
import pytest

from abflax import DiskError, Interrupted, Resources, distill, load
from abflax.runtime.reporter import NullReporter
from abflax.storage.checkpoint import Checkpoints
from abflax.storage.files import write_whole
from abflax.training.record import read_record, require_writable
from tests.conftest import ROOT, Small

RESOURCES = Resources(devices=1, checkpoint_seconds=0.0)


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train").take(np.arange(48))


def _train(digits, workdir, **options):
    settings = {"method": "cross-entropy", "epochs": (0, 2), "batch_size": 16} | options
    return distill(Small(), None, digits, workdir=workdir, resources=RESOURCES, **settings)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """An undisturbed run."""
    return _train(digits, tmp_path_factory.mktemp("whole"))


class _At(NullReporter):
    """Calls a function after a number of steps."""

    def __init__(self, step, call):
        self.left, self.call = step, call

    def steps(self, count, images, epoch, loss):
        self.left -= count
        if self.left == 0:
            self.call()


# A child process, since the hard limit on the size of files cannot be raised again. The soft limit
# can: the disk is full and later it is not.
FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from abflax import load
from experiments.common import cli
from tests.storage import test_disks as here

step, bytes_, workdir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
digits = load("digits", "train").take(np.arange(48))

def train(console):
    here._train(digits, workdir, reporter=here._At(step, lambda: limit(bytes_)))

cli.main(train)
"""


def _child(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, timeout=300, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "size"),
    [pytest.param(*each, marks=pytest.mark.slow) for each in ((3, 0), (4, 300))],
    ids=["no room", "a little room"],
)
def test_a_disk_that_fills_up_while_training(digits, whole, tmp_path, step, size):
    done = _child(FULL, step, size, tmp_path)
    assert done.returncode == os.EX_IOERR, done.stderr
    assert done.stderr.startswith("error: cannot write a checkpoint in "), done.stderr
    assert "File too large; that of step" in done.stderr and done.stderr.count("\n") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "record.json").exists() and not (run / "lock").exists()
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest()["history"]["step"] == checkpoints.latest_step() >= step - 2
    resumed = _train(digits, tmp_path)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)
    names = sorted(path.name for path in resumed.directory.iterdir())
    assert names == ["config.json", "fingerprint.json", "record.json", "student.safetensors"]


# The file table is full after a step, but for a few files.
NO_FILES = """
import os, resource, sys
from pathlib import Path
import numpy as np
from abflax import load
from experiments.common import cli
from tests.storage import test_disks as here

room, workdir = int(sys.argv[1]), Path(sys.argv[2])

def limit():
    used = len(os.listdir("/proc/self/fd")) - 1
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, most))

digits = load("digits", "train").take(np.arange(48))
cli.main(lambda console: here._train(digits, workdir, reporter=here._At(1, limit)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 2, 5])
def test_a_file_table_that_is_full(digits, whole, tmp_path, room):
    """Orbax's threads would wait for five minutes."""
    began = time.monotonic()
    done = _child(NO_FILES, room, tmp_path)
    assert time.monotonic() - began < 100
    assert done.returncode == os.EX_IOERR, done.stderr
    assert re.fullmatch("error: cannot write .*Too many open files.*\n", done.stderr)
    assert not list(tmp_path.glob("runs/*/lock"))
    chex.assert_trees_all_equal(_train(digits, tmp_path).variables, whole.variables)


def test_a_full_file_table_is_not_the_paths_fault(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    (tmp_path / "record.json").write_bytes(b"{}")
    with pytest.raises(DiskError, match="record.json cannot be read: Too many open files"):
        read_record(tmp_path / "record.json")
    with pytest.raises(DiskError, match=f"cannot write to {tmp_path}: Too many open files"):
        require_writable(tmp_path)


@pytest.mark.parametrize("name", ["student.safetensors", "record.json"])
def test_a_disk_that_is_full_at_the_end(digits, whole, tmp_path, monkeypatch, name):
    """After training, the last checkpoint stays until the record is written."""
    fsync = os.fsync

    def full(file):
        fsync(file)
        if name in pending:
            raise OSError(28, "No space left on device")

    pending = []
    for module in ("abflax.weights", "abflax.training.record"):
        monkeypatch.setattr(f"{module}.write_whole", lambda path, content: (
            pending.append(path.name), write_whole(path, content)))  # fmt: skip
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=f"cannot write .*{name}: No space left on device"):
        _train(digits, tmp_path)
    monkeypatch.undo()
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / name).exists() and not list(run.glob("*.tmp"))
    steps = []
    count = _At(1, None)
    count.steps = lambda number, *_: steps.append(number)
    resumed = _train(digits, tmp_path, reporter=count)
    assert not steps
    chex.assert_trees_all_equal(resumed.variables, whole.variables)


def test_a_file_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"good")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(DiskError, match=f"cannot write {path}: I/O error"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


# Root can write everywhere unless it drops the capability to override permissions. (Another user
# could not read an environment below /root.)
ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []


@pytest.mark.slow
@pytest.mark.skipif(bool(ORDINARY) and not shutil.which("setpriv"), reason="root, and no setpriv")
@pytest.mark.parametrize(
    ("mode", "cannot"), [(0o555, "cannot write to"), (0o000, "cannot be read")]
)
def test_a_workdir_that_may_only_be_read(mode, cannot, tmp_path):
    """Tests a workdir that is read-only, and one that cannot be read."""
    tmp_path.chmod(mode)
    done = subprocess.run(
        [*ORDINARY, sys.executable, "-m", "experiments.run", "--dataset", "digits", "--method",
         "cross-entropy", "--devices", "1", "--workdir", tmp_path / "workdir"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    tmp_path.chmod(0o755)
    assert done.returncode == 2, done.stderr
    *warned, sentence = done.stderr.splitlines()  # of the compilation cache, first
    assert all(each.startswith("warning: ") for each in warned)
    assert re.match(rf"error: .*{cannot}.*: Permission denied$", sentence)
    assert not list(tmp_path.iterdir())


def _flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def _files(folder):
    """Lists the files that are not empty, the largest first."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(files, key=lambda path: (-path.stat().st_size, path.name))


def test_a_flipped_bit_in_the_newest_checkpoint(digits, whole, tmp_path):
    """Orbax does not detect that a weight has changed."""
    with pytest.raises(Interrupted):
        _train(digits, tmp_path, reporter=_At(3, lambda: signal.raise_signal(signal.SIGTERM)))
    (newest,) = tmp_path.glob("runs/*/checkpoints/3")
    largest = _files(newest / "state")[0]
    _flip(largest, 4 * largest.stat().st_size)
    with pytest.warns(UserWarning, match=f"{newest} cannot be read .its arrays are not the ones"):
        resumed = _train(digits, tmp_path)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Writes a folder of two checkpoints; returns it with their contents."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    held = {}
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            draw = np.random.default_rng(step)
            state = {"kernel": draw.normal(size=(3, 3, 8, 16)).astype(np.float32),
                     "zeros": np.zeros(300, np.float32), "step": np.int32(step)}  # fmt: skip
            meta = {"journal": {"step": step, "history": [{"loss": 0.1 * step}]}}
            checkpoints.save(step, state, meta)
            held[step] = (meta, state)
        checkpoints.wait()
    return folder, held


def _survives(two, folder, damage):
    """Restores from a damaged copy: the newest checkpoint or the one before, intact."""
    original, held = two
    shutil.copytree(original, folder)
    damage(_files(folder / "2"))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), held[1][1])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Checkpoints(folder) as checkpoints:
            meta, state = checkpoints.restore(lambda meta: target)
            kept = checkpoints.latest_step()
    step = int(state["step"])
    assert kept == step
    assert any(f"{folder / '2'} cannot be read" in str(each.message) for each in told) == (
        step == 1
    )
    assert meta == held[step][0]
    chex.assert_trees_all_equal(state, held[step][1])
    shutil.rmtree(folder)
    return step


def _flips(two, folder, count, seed):
    draw = random.Random(seed)

    def damage(files):
        path = draw.choice(files)
        _flip(path, draw.randrange(8 * path.stat().st_size))

    return [_survives(two, folder, damage) for _ in range(count)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    """Silences the unfinished reads that Orbax abandons after an error."""

    def test_flipped_bits(self, two, tmp_path):
        assert set(_flips(two, tmp_path / "c", 20, seed=0)) == {1, 2}

    @pytest.mark.slow
    def test_a_thousand_flipped_bits(self, two, tmp_path):
        found = _flips(two, tmp_path / "c", 1000, seed=1)
        print(f"{found.count(1)} of {len(found)} flips made the one before be taken")

    def test_every_file_cut_short_emptied_or_gone(self, two, tmp_path):
        count = len(_files(two[0] / "2"))
        for index in range(count):
            for change in (
                lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
                lambda path: path.write_bytes(b""),
                lambda path: path.unlink(),
            ):
                _survives(two, tmp_path / "c", lambda files, c=change, i=index: c(files[i]))
