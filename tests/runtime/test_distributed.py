"""Several processes at one run: shared results, and the same numbers as one process."""

import json
import signal
import socket
import subprocess
import sys

import pytest

from abflax import BusyError
from abflax.runtime import distributed
from tests import several
from tests.conftest import ROOT

# Each of two processes prints the results of its shared calls as JSON.
TOGETHER = """
import json, sys
import numpy as np
from abflax import BusyError, InputError
from abflax.training.devices import replicate, shard_batch, usable_devices
from abflax.runtime import distributed

_, port, process = sys.argv
distributed.initialize_distributed(f"127.0.0.1:{port}", 2, int(process))
did = []

@distributed.on_process_zero
def mine(value):
    did.append(value)
    if value < 0:
        raise BusyError(f"{value} is taken")
    return {"array": np.full(3, value), "by": process}

def refused(do, *arguments):
    try:
        do(*arguments)
    except InputError as error:
        return [type(error).__name__, str(error)]

given = mine(int(process) + 7)
devices = usable_devices()
batch = np.arange(8).reshape(2, 4)
print(json.dumps({
    "given": [given["array"].tolist(), given["by"]],
    "raised": refused(mine, -3 - int(process)),
    "did": did,
    "highest": distributed.max_over_processes(5 * int(process)),
    "same": refused(distributed.require_same, "colour", "blue"),
    "other": refused(distributed.require_same, "colour", process),
    "split": shard_batch(batch, devices).tolist(),
    "held": np.asarray(replicate(batch, devices)).tolist(),
}))
"""


@pytest.mark.slow
def test_two_processes_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, port, str(process)], cwd=ROOT,
            env=several.SETTINGS, stdout=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    ours, theirs = (json.loads(each.communicate(timeout=300)[0].split("\n", 1)[-1])
                    for each in started)  # fmt: skip
    assert (ours.pop("did"), theirs.pop("did")) == ([7, -3], [])  # only process 0 ran it
    assert (ours.pop("split"), theirs.pop("split")) == ([[[0, 1], [4, 5]]], [[[2, 3], [6, 7]]])
    assert ours == theirs == {
        "given": [[7, 7, 7], "0"],
        "raised": ["BusyError", "-3 is taken"],
        "highest": 5,
        "same": None,
        "other": ["InputError", "process 1 differs from process 0 in colour"],
        "held": [[0, 1, 2, 3], [4, 5, 6, 7]],
    }  # fmt: skip


def test_one_process_needs_no_communication():
    def taken():
        raise BusyError("taken")

    assert distributed.on_process_zero(lambda value: value + 1)(2) == 3
    with pytest.raises(BusyError, match="taken"):
        distributed.on_process_zero(taken)()
    assert distributed.max_over_processes(15) == 15
    distributed.require_same("colour", "blue")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    *_, last = several.observe(tmp_path_factory.mktemp("several"))
    return last


def _require(facts):
    """Reads the claims of RELIABILITY.md."""
    for found in facts["numbers"].values():
        assert found["history"] < 1e-9 and found["weights"] < 1e-9
    assert several.written(facts) == []
    killed, coordinator, stopped = facts["strikes"]
    for strike in facts["strikes"]:
        assert several.holds(strike) and strike["on_disk"] >= strike["step"]
        assert strike["seconds"] < distributed.SILENCE + 10
    assert killed["exits"] == [69, -signal.SIGKILL]
    # Without its coordinator a process is ended by JAX's runtime, or raises the error first.
    assert coordinator["exits"] in ([-signal.SIGKILL, 69], [-signal.SIGKILL, -signal.SIGABRT])
    assert stopped["exits"] == [143, 143]
    assert "another process of this run was lost" in killed["last_words"][0][0]
    for words in stopped["last_words"]:
        assert f"the same command goes on from step {stopped['on_disk']}" in words[0]


@pytest.mark.slow
def test_two_and_four_processes_are_as_good_as_one_even_when_struck(facts):
    assert set(facts["numbers"]) == {"2", "4"}
    _require(facts)


def test_what_is_reported_of_several_processes_holds():
    _require(json.loads(several.FACTS.read_text()))
