"""TensorBoard events contain each entry of the record once, also in a resumed run."""

import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from abflax import Interrupted, Network, Resources, distill, load
from abflax.models.variables import init_variables
from abflax.runtime.reporter import NullReporter
from abflax.storage.tensorboard import EventLog
from tests.conftest import Tiny


def _scalars(folder):
    """Reads {(tag, step): value} of all event files; a record is [length, crc, data, crc]."""
    found = {}
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_an_entry_becomes_its_scalars(tmp_path):
    entry = {"epoch": 3, "epoch_of_phase": 1, "step": 7, "phase": "classify", "loss": 0.5,
             "agreement": {"layer1": 0.75}, "training": {}}  # fmt: skip
    with EventLog(tmp_path / "events", [entry]) as log:
        log.write(entry | {"step": 8, "loss": 0.25})
    assert _scalars(tmp_path / "events") == {
        ("loss", 7): 0.5, ("agreement/layer1", 7): 0.75,
        ("loss", 8): 0.25, ("agreement/layer1", 8): 0.75,
    }  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_logs_everything_once(tmp_path):
    class StopAtFirst(NullReporter):
        def evaluated(self, entry):
            import signal

            signal.raise_signal(signal.SIGTERM)

    variables = init_variables(Tiny(6), jax.random.key(1), (8, 8, 1))
    data = load("digits", "train").take(np.arange(16))

    def train(reporter=None):
        return distill(
            Tiny(6), Network(Tiny(6), variables), data, method="kd", epochs=(0, 3),
            batch_size=8, workdir=tmp_path, reporter=reporter,
            resources=Resources(devices=1, tensorboard=True),
        )  # fmt: skip

    with pytest.raises(Interrupted):
        train(StopAtFirst())
    result = train()
    found = _scalars(result.directory / "events")
    history = result.record["history"]
    assert [step for tag, step in found if tag == "loss"] == [2, 4, 6]
    for entry in history:
        assert found["loss", entry["step"]] == pytest.approx(entry["loss"], rel=1e-6)
        assert ("learning_rate", entry["step"]) in found
