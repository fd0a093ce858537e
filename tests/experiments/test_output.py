"""Commands in a shell: output that goes away, and terminals and places that are unusual."""

import json
import os
import subprocess

import pytest

from experiments.common.output import stream
from tests.conftest import ROOT
from tests.experiments.conftest import plain

TRAIN = ("--dataset digits --student wrn10-1 --method cross-entropy --epochs 0+1 --fraction 0.05 "
         "--batch-size 32 --devices 1")  # fmt: skip


def _shell(line, workdir, **environment):
    """Runs a line of bash; `$RUN` is the command."""
    run = f"python -m experiments.run --workdir {workdir}"
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + line.replace("$RUN", run)], cwd=ROOT, timeout=300,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_stream_never_raises(capfd):
    end, start = os.pipe()
    os.close(end)
    for text in ("gone", "\udcff"):
        print(text, file=stream(start), flush=True)
    with open("/dev/full", "wb", buffering=0) as full:
        print("gone", file=stream(full.fileno()), flush=True)
    print("1×1 \udcff", file=stream(1))
    assert capfd.readouterr().out == "1×1 \\udcff\n"
    os.close(start)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    assert _shell(f"$RUN {TRAIN}", folder)[0] == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"),
    [("| true", 0), (">&-", 0), (">&- 2>&-", 0), ("2>/dev/full", 0), (">/dev/full", 74),
     ("--json | head -c 1 | wc -c", 0), ("--json >/dev/full", 74), ("--json 2>&1 | true", 0)],
)  # fmt: skip
def test_output_that_goes_away(workdir, end, code):
    """Of a listing, and of training."""
    for command in ("list", TRAIN + " --force"):
        found, _, err = _shell(f"$RUN {command} {end}", workdir)
        assert found == code, err
        if code == 74:
            assert err.endswith("error: the results cannot be written to standard output: "
                                "No space left on device\n")  # fmt: skip
        (run,) = (workdir / "runs").iterdir()
        assert json.loads((run / "record.json").read_text())["state"] == "finished"


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "place", "code", "sentence"),
    [
        (ASCII, "w", 0, "test error"),
        (ASCII, "\u00e9", 2, "is not UTF-8"),
        ({}, "\u00e9", 0, "test error"),
        ({}, "\udcff", 2, "is not UTF-8"),
        ({"PYTHONOPTIMIZE": "2"}, "w", 0, "test error"),
        ({"JAX_PLATFORMS": "cuda"}, "w", 2, "JAX cannot start on JAX_PLATFORMS=cuda"),
        ({"JAX_PLATFORMS": "nonsense"}, "w", 2, "JAX cannot start on JAX_PLATFORMS=nonsense"),
        ({"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise",
          "JAX_TRANSFER_GUARD": "disallow"}, "w", 0, "test error"),
        ({"TERM": "dumb", "COLUMNS": "1"}, "w", 0, "test error"),
    ],
)  # fmt: skip
def test_unusual_places(tmp_path, environment, place, code, sentence):
    """Each works, or says in one sentence why not."""
    found, out, err = _shell(f"$RUN {TRAIN}", tmp_path / place, **environment)
    assert found == code, err
    assert sentence in (plain(err) if code else out)
