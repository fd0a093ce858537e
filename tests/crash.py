"""Kill real runs at random moments, start them again, and compare them with an undisturbed run.

Each run is the command line in a process of its own: wrn10-2 teaches wrn10-1 on a tenth of the
digits, 4 + 4 epochs, 32 steps, a checkpoint after each. It is killed several times, then left to
finish. Its weights must then have the same bits as those of an undisturbed run, and its record the
same content except for times. Writes tests/reliability.json, and tests/RELIABILITY.md from it.
Half an hour on two cores.

Examples:
  python -m tests.crash
  python -m tests.crash --strikes 200 --seed 1
  python -m tests.crash --page      only rebuild tests/RELIABILITY.md
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from abflax.storage.files import write_whole
from abflax.training.record import environment, read_record, write_record
from experiments.common import cli
from experiments.paper_tables.records import short
from tests import identity, several
from tests.conftest import save_random_network

HERE = Path(__file__).parent
FACTS, PAGE = HERE / "reliability.json", HERE / "RELIABILITY.md"
STEPS = 32
ARGUMENTS = (
    "--dataset", "digits", "--teacher", "wrn10-2", "--student", "wrn10-1", "--fraction", "0.1",
    "--batch-size", "32", "--epochs", "4+4", "--protocol", "official", "--evaluate-every", "2",
    "--devices", "1", "--checkpoint-seconds", "0",
)  # fmt: skip
STARTING, STEPPING = "while starting", "between two steps"
SAVING, RECORDING = "while a checkpoint is written", "while weights and record are written"
# The moments at which one run is killed: seven drawn from these, then the end, three times.
DRAWN = {STARTING: 2, STEPPING: 4, SAVING: 4}
STRIKES_A_RUN, AT_THE_END = 10, 3


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      strikes: how many times runs are killed, in all.
      seed: of the moments.
      page: only rebuild the page.
    """

    strikes: int = 50
    seed: int = 0
    page: bool = False


def main(console: Console) -> None:
    """Kills runs, and writes what happened."""
    arguments = cli.parse(Arguments, "tests.crash", __doc__)
    if not arguments.page:
        with tempfile.TemporaryDirectory() as folder:
            for facts in strike(Path(folder), arguments.strikes, arguments.seed, console):
                write_record(FACTS, facts)
    facts = write_page()
    console.print(f"{PAGE}: {sum(run['survived'] for run in facts['runs'])} of "
                  f"{len(facts['runs'])} runs ended like an undisturbed one")  # fmt: skip


def strike(base: Path, strikes: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
    """Kills runs, ten times each, `strikes` times in all. Yields what is known after each run."""
    draw, runs, weights = random.Random(seed), [], base / "teacher.npz"
    save_random_network("wrn10-2", weights)
    count = 0
    whole = _Run(base, "whole", weights)
    whole.finish()
    while count < strikes:
        index = len(runs)
        run, run_strikes = _Run(base, f"struck{index}", weights), []
        for number in range(min(STRIKES_A_RUN, strikes - count)):
            (moment,) = draw.choices(list(DRAWN), list(DRAWN.values()))
            if number >= STRIKES_A_RUN - AT_THE_END or run.step() >= STEPS - 2:
                moment = RECORDING
            facts = _kill(run, moment, draw)
            if facts is None:  # the run ended first
                break
            run_strikes.append(facts)
            console.print(f"run {index}: {facts}", soft_wrap=True)
        run.finish()
        same = {
            "weights": run.weights() == whole.weights(),
            "record": run.record() == whole.record(),
            "tidy": run.names() == whole.names(),
            "silent": "Traceback" not in run.log.read_text(),
        }
        runs.append({"survived": all(same.values()), **same, "strikes": run_strikes})
        count += len(run_strikes)
        yield {"seed": seed, "runs": runs, "environment": environment(jax.local_devices())}


class _Run:
    """One run of the command line, in one process after another."""

    def __init__(self, base: Path, name: str, weights: Path) -> None:
        self.workdir, self.log = base / name, base / f"{name}.log"
        compiled = base / "compiled"  # one compilation cache for all
        compiled.mkdir(exist_ok=True)
        self.workdir.mkdir()
        (self.workdir / "compiled").symlink_to(compiled)
        self._command = [sys.executable, "-m", "experiments.run", *ARGUMENTS,
                         "--teacher-weights", weights, "--workdir", self.workdir]  # fmt: skip

    def start(self) -> subprocess.Popen:
        settings = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=1"}
        self._started = time.time()
        with self.log.open("a") as log:
            return subprocess.Popen(
                list(map(str, self._command)), cwd=HERE.parent, env=settings, stdout=log,
                stderr=log,
            )  # fmt: skip

    def finish(self) -> None:
        """Starts the run and waits for its end."""
        if self.start().wait(timeout=600):
            raise RuntimeError(self.log.read_text())

    def folder(self) -> Path | None:
        """The run's folder; None before it exists."""
        return next(self.workdir.glob("runs/*"), None)

    def step(self) -> int:
        """The step of the newest checkpoint."""
        paths = self.workdir.glob("runs/*/checkpoints/*")
        return max((int(path.name) for path in paths if path.name.isdigit()), default=0)

    def unfinished(self) -> str:
        """What this process, not an earlier one, has half written."""
        for what, pattern in (
            ("checkpoint", "checkpoints/*tmp*"), ("weights or record", "*.tmp"),
        ):  # fmt: skip
            if any(map(self._is_new, self.workdir.glob(f"runs/*/{pattern}"))):
                return what
        for what, name in (("tidying up", "record.json"), ("record", "student.safetensors")):
            if any(map(self._is_new, self.workdir.glob(f"runs/*/{name}"))):
                return what
        return "nothing"

    def _is_new(self, path: Path) -> bool:
        try:
            return path.stat().st_ctime >= self._started
        except OSError:  # removed meanwhile
            return False

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder().iterdir())

    def weights(self) -> bytes:
        return (self.folder() / "student.safetensors").read_bytes()

    def record(self) -> dict[str, Any]:
        """The record without its times."""
        record = read_record(self.folder() / "record.json")
        phases = [{**phase, "seconds": None} for phase in record["phases"]]
        return {**record, "phases": phases, "seconds": None, "finished": None}


def _kill(run: _Run, moment: str, draw: random.Random) -> dict[str, Any] | None:
    """Starts the run, waits for a moment, and sends a signal; None: the run ended first."""
    number = signal.SIGKILL if draw.random() < 0.7 else signal.SIGTERM
    before, process = run.step(), run.start()
    _wait_until(moment, run, process, before, draw)
    if process.poll() is not None:
        return None
    step, half_written = run.step(), run.unfinished()
    began = time.monotonic()
    process.send_signal(number)
    code = process.wait(timeout=300)
    seconds = time.monotonic() - began
    # Before the run handles SIGTERM, it ends the process as it ends any other.
    expected = {-number} if number == signal.SIGKILL else {143, -signal.SIGTERM}
    if code == 0:
        return None
    if code not in expected:
        raise RuntimeError(f"exit code {code}: {run.log.read_text()}")
    return {
        "signal": number.name,
        "moment": moment,
        "step": step,
        "half_written": half_written,
        "exit": code,
        "seconds": round(seconds, 3),
    }


def _wait_until(
    moment: str, run: _Run, process: subprocess.Popen, before: int, draw: random.Random
) -> None:
    """Waits for a moment of a run that has started at step `before`, or for the run's end."""

    def wait_while(condition: Callable[[], bool], pause: float) -> None:
        while process.poll() is None and condition():
            time.sleep(pause)

    if moment == STARTING:
        until = time.monotonic() + draw.uniform(0, 10)
        wait_while(lambda: run.step() <= before and time.monotonic() < until, 0.005)
    elif moment == STEPPING:
        wait_while(lambda: run.step() <= before, 0.005)
        time.sleep(draw.uniform(0, 0.5))
    elif moment == SAVING:
        for _ in range(draw.randint(1, 4)):
            wait_while(lambda: run.unfinished() != "checkpoint", 0.0005)
            last = run.step()
            wait_while(lambda last=last: run.step() == last and draw.random() > 0.1, 0.001)
    else:
        wait_while(lambda: run.step() < STEPS, 0.002)
        wait_while(lambda: run.unfinished() in ("nothing", "checkpoint"), 0.0002)
        time.sleep(draw.uniform(0, 0.01))


def write_page() -> dict[str, Any]:
    """Rebuilds tests/RELIABILITY.md. Returns the facts of tests/reliability.json."""
    facts = json.loads(FACTS.read_text())
    write_whole(PAGE, page(facts).encode())
    return facts


def page(facts: dict[str, Any]) -> str:
    """The text of RELIABILITY.md."""
    runs = facts["runs"]
    strikes = [strike for run in runs for strike in run["strikes"]]
    survived = sum(run["survived"] for run in runs)
    table = Counter((strike["moment"], strike["signal"]) for strike in strikes)
    half_written = Counter(strike["half_written"] for strike in strikes)
    del half_written["nothing"]
    graceful = [strike["seconds"] for strike in strikes if strike["exit"] == 143]
    rows = "\n".join(
        f"| {moment} | {table[moment, 'SIGKILL']} | {table[moment, 'SIGTERM']} |"
        for moment in (*DRAWN, RECORDING)
    )
    origin = facts["environment"]
    half = ", ".join(f"{what} {count}" for what, count in half_written.most_common())
    slowest = f"{max(graceful):.1f} s at most" if graceful else "–"
    return f"""# Reliability

## Killed at random moments

{len(runs)} run(s), killed {len(strikes)} times and started again each time
(`python -m tests.crash --strikes {len(strikes)} --seed {facts["seed"]}`).
**{survived} of {len(runs)} runs ended with the bits of an undisturbed one**, the same record except
for times, no file left over and no traceback.

| moment | SIGKILL | SIGTERM |
| --- | --- | --- |
{rows}

Half written on the disk at the signal: {half}. From SIGTERM to exit code 143, with a checkpoint
written: {slowest} ({len(graceful)} times; the others came before training and ended the process at
once). Device: {origin["device"]}; jax {origin["jax"]}; commit \
{short(origin["commit"])}.

{several.section()}
{identity.section()}
{OTHERS}"""


OTHERS = """## Other faults

| fault | what happens | test |
| --- | --- | --- |
| two processes, one run | one trains; the other exits with code 75 and names process and \
host | `tests/storage/test_lock.py` |
| lock of a dead process | taken over | `tests/storage/test_lock.py` |
| disk full while a checkpoint, weights or record are written | one sentence, exit code 74; the \
previous checkpoint stays; the rerun ends with the same bits | `tests/storage/test_disks.py` |
| workdir that cannot be written, or not even read | one sentence, exit code 2 \
| `tests/storage/test_disks.py` |
| a flipped bit, a file cut short, emptied or missing in the newest checkpoint | named; the \
previous one is used | `tests/storage/test_disks.py`; 1,000 flips: \
`python -m pytest -n 0 -m slow tests/storage/test_disks.py` |
| a damaged record | named; the run is not trained again unless `--force` is given | \
`tests/storage/test_lock.py` |
| NaN or infinity in images, teacher, taps, connectors, loss, gradient or weights | step, \
phase and the first tap that is not finite; the previous checkpoint stays \
| `tests/training/test_diagnosis.py` |
| NaN or infinity in a held-out loss | the step, and whether training diverged; the previous \
checkpoint stays | `tests/training/test_diagnosis.py` |
| a learning rate that is too large | reported as divergence, with the growth of loss and \
weights; a search continues with the next point | `tests/training/test_diagnosis.py`, \
`tests/experiments/test_search.py` |
| one of several processes is given other arguments, or holds other bits | named; exit code 2 \
| `tests/runtime/test_distributed.py` |
| several processes: a port that is taken, an unknown host, another count, a number twice, other \
commands, one that leaves before all have come | the same sentence in all of them; exit code 2 or \
69 | `tests/runtime/test_rendezvous.py` |
| a full file table | one sentence at once, exit code 74; the rerun ends with the same bits \
| `tests/storage/test_disks.py` |
| output that goes away: a closed pipe or descriptor, `/dev/full` | the command goes on; exit code \
74 where results are lost | `tests/experiments/test_output.py` |
| other locales, names that are not UTF-8, `PYTHONOPTIMIZE=2`, devices that are not there, JAX's \
own checks | it works, or one sentence and exit code 2 | `tests/experiments/test_output.py`, \
`tests/experiments/test_manners.py` |
| foreign or edited JSON in a workdir | named and skipped by what reads many, refused by what \
reads one | `tests/experiments/test_foreign_json.py` |
| searches of other grids, lengths, seeds or teachers | a file for each \
| `tests/experiments/test_search.py` |
| images: odd EXIF orientations, pipes and devices, long thin ones, a file in two classes, a \
damaged shard; a killed parent | passed over, skipped, or named; decoding processes end too \
| `tests/data/test_image_files.py` |
| anchors that a finished, resumed or grown run did not keep, or that are damaged | named, or the \
run begins anew | `tests/training/test_route.py` |
| the same command twice, in two phases and in a joint one | the same bits \
| `python -m pytest -n 0 -m slow tests/training/test_determinism.py` |
| one seed of four varied | only the draws that it names change \
| `tests/training/test_determinism.py` |
| bad input | the documented exception, or one sentence and exit code 2 | `tests/test_input.py`; \
many more examples: `python -m pytest -n 0 tests/test_input.py --hypothesis-profile=slow` |
| code in a weights file | never runs | `tests/test_weights.py`, `tests/test_input.py` |
| weights that expand a thousandfold, names that are there twice, escape codes in names | refused \
before they are read; written out | `tests/test_weights.py` |
"""


if __name__ == "__main__":
    cli.main(main)
