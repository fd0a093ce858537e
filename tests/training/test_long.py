"""A run of 2,000 epochs: memory stays flat, steps stay as quick, record and checkpoints bounded."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from abflax import Resources, distill, load
from abflax.runtime.reporter import NullReporter
from tests.conftest import Small

EPOCHS, EVALUATE_EVERY = 2000, 20


class _Watch(NullReporter):
    """Memory and time at each evaluation."""

    def __init__(self, workdir):
        self.workdir = workdir
        self.resident, self.times, self.on_disk = [], [], []

    def evaluated(self, entry):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.times.append(time.process_time())
        found = self.workdir.glob("runs/*/checkpoints/*")
        self.on_disk.append(sum(path.name.isdigit() for path in found))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_two_thousand_epochs(tmp_path):
    data = load("digits", "train").take(np.arange(64))
    watch = _Watch(tmp_path)
    result = distill(
        Small(), None, data, test=data, method="cross-entropy", epochs=(0, EPOCHS), batch_size=16,
        evaluate_every=EVALUATE_EVERY, workdir=tmp_path, reporter=watch,
        resources=Resources(devices=1, checkpoint_seconds=1.0),
    )  # fmt: skip
    resident, seconds = np.array(watch.resident), np.diff(watch.times)
    quarter = len(resident) // 4
    first, last = resident[quarter : 2 * quarter].mean(), resident[-quarter:].mean()
    early, late = (np.median(part) for part in (seconds[quarter : 2 * quarter],
                                                seconds[-quarter:]))  # fmt: skip
    print(f"{result.record['history'][-1]['step']} steps; resident {first:.1f} -> {last:.1f} MiB; "
          f"{1e3 * early / 80:.2f} -> {1e3 * late / 80:.2f} ms of CPU a step; "
          f"record {(result.directory / 'record.json').stat().st_size} bytes")  # fmt: skip
    assert result.record["history"][-1]["step"] == EPOCHS * 4
    assert last < 1.02 * first
    assert late < 1.25 * early
    assert max(watch.on_disk) <= 3  # two, and one that is about to go
    assert len(result.record["history"]) == EPOCHS // EVALUATE_EVERY
