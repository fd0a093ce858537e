"""Kill real runs at random moments, start them again, and compare the end with undisturbed ones.

Each run is the command line in a process of its own: wrn10-2 teaches wrn10-1 on a tenth of the
digits, 4 + 4 epochs, 32 steps, a checkpoint after each. It is struck again and again, then left to
finish; then weights must have the same bits, and the record the same content but for times, as
those of a run that nothing disturbed. Writes tests/reliability.json, and tests/RELIABILITY.md from
it. Half an hour on two cores.

examples:
  python -m tests.crash
  python -m tests.crash --strikes 200 --seed 1
  python -m tests.crash --page      rebuild tests/RELIABILITY.md alone
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from abflax.files import write_whole
from abflax.record import environment, read_record, write_record
from experiments import cli
from experiments.archive import short
from tests import several
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
# The moments of one run's strikes: seven drawn of these, then the end, three times.
DRAWN = {STARTING: 2, STEPPING: 4, SAVING: 4}
STRIKES_A_RUN, AT_THE_END = 10, 3


def main(console: Console) -> None:
    parser = cli.Parser("tests.crash", __doc__)
    parser.add_argument("--strikes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--page", action="store_true", help="only rebuild the page")
    arguments = parser.parse_args()
    if not arguments.page:
        with tempfile.TemporaryDirectory() as folder:
            for facts in strike(Path(folder), arguments.strikes, arguments.seed, console):
                write_record(FACTS, facts)
    facts = write_page()
    console.print(f"{PAGE}: {sum(run['survived'] for run in facts['runs'])} of "
                  f"{len(facts['runs'])} runs ended as if nothing had happened")  # fmt: skip


def strike(base: Path, strikes: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
    """Strikes runs, ten times each, until there were so many strikes. Yields what has happened,
    run by run."""
    draw, runs, weights = random.Random(seed), [], base / "teacher.npz"
    save_random_network("wrn10-2", weights)
    struck = 0
    whole = _Run(base, "whole", weights)
    whole.finish()
    while struck < strikes:
        index = len(runs)
        run, blows = _Run(base, f"struck{index}", weights), []
        for number in range(min(STRIKES_A_RUN, strikes - struck)):
            (moment,) = draw.choices(list(DRAWN), list(DRAWN.values()))
            if number >= STRIKES_A_RUN - AT_THE_END or run.step() >= STEPS - 2:
                moment = RECORDING
            blow = _blow(run, moment, draw)
            if blow is None:  # it was faster than the blow
                break
            blows.append(blow)
            console.print(f"run {index}: {blow}", soft_wrap=True)
        run.finish()
        same = {
            "weights": run.weights() == whole.weights(),
            "record": run.record() == whole.record(),
            "tidy": run.names() == whole.names(),
            "silent": "Traceback" not in run.log.read_text(),
        }
        runs.append({"survived": all(same.values()), **same, "strikes": blows})
        struck += len(blows)
        yield {"seed": seed, "runs": runs, "environment": environment(jax.local_devices())}


class _Run:
    """One run of the command line, in as many processes as it takes."""

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
        """Lets it run to its end."""
        if self.start().wait(timeout=600):
            raise RuntimeError(self.log.read_text())

    def folder(self) -> Path | None:
        """The run's own, once it is there."""
        return next(self.workdir.glob("runs/*"), None)

    def step(self) -> int:
        """Of the newest checkpoint."""
        found = self.workdir.glob("runs/*/checkpoints/*")
        return max((int(path.name) for path in found if path.name.isdigit()), default=0)

    def unfinished(self) -> str:
        """What this process, and no one before it, has half written."""
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
        except OSError:  # gone again
            return False

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder().iterdir())

    def weights(self) -> bytes:
        return (self.folder() / "student.safetensors").read_bytes()

    def record(self) -> dict[str, Any]:
        """Without the times."""
        record = read_record(self.folder() / "record.json")
        phases = [{**phase, "seconds": None} for phase in record["phases"]]
        return {**record, "phases": phases, "seconds": None, "finished": None}


def _blow(run: _Run, moment: str, draw: random.Random) -> dict[str, Any] | None:
    """Starts the run, waits for a moment, and strikes; None: it ended before."""
    number = signal.SIGKILL if draw.random() < 0.7 else signal.SIGTERM
    before, process = run.step(), run.start()
    alive = lambda: process.poll() is None  # noqa: E731
    if moment == STARTING:
        until = time.monotonic() + draw.uniform(0, 10)
        while alive() and run.step() <= before and time.monotonic() < until:
            time.sleep(0.005)
    elif moment == STEPPING:
        while alive() and run.step() <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))
    elif moment == SAVING:
        for _ in range(draw.randint(1, 4)):
            while alive() and run.unfinished() != "checkpoint":
                time.sleep(0.0005)
            last = run.step()
            while alive() and run.step() == last and draw.random() > 0.1:
                time.sleep(0.001)
    else:
        while alive() and run.step() < STEPS:
            time.sleep(0.002)
        while alive() and run.unfinished() in ("nothing", "checkpoint"):
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.01))
    if not alive():
        return None
    step, lies = run.step(), run.unfinished()
    began = time.monotonic()
    process.send_signal(number)
    code = process.wait(timeout=300)
    seconds = time.monotonic() - began
    # A SIGTERM that comes before the run listens ends the process as any other.
    expected = {-number} if number == signal.SIGKILL else {143, -signal.SIGTERM}
    if code == 0:
        return None
    if code not in expected:
        raise RuntimeError(f"exit code {code}: {run.log.read_text()}")
    return {
        "signal": number.name,
        "moment": moment,
        "step": step,
        "half_written": lies,
        "exit": code,
        "seconds": round(seconds, 3),
    }


def write_page() -> dict[str, Any]:
    """Rebuilds tests/RELIABILITY.md. Returns the facts about strikes."""
    facts = json.loads(FACTS.read_text())
    write_whole(PAGE, page(facts).encode())
    return facts


def page(facts: dict[str, Any]) -> str:
    """RELIABILITY.md."""
    runs = facts["runs"]
    blows = [blow for run in runs for blow in run["strikes"]]
    survived = sum(run["survived"] for run in runs)
    table = Counter((blow["moment"], blow["signal"]) for blow in blows)
    lay = Counter(blow["half_written"] for blow in blows if blow["half_written"] != "nothing")
    listened = [blow["seconds"] for blow in blows if blow["exit"] == 143]
    rows = "\n".join(
        f"| {moment} | {table[moment, 'SIGKILL']} | {table[moment, 'SIGTERM']} |"
        for moment in (*DRAWN, RECORDING)
    )
    made = facts["environment"]
    half = ", ".join(f"{what} {count}" for what, count in lay.most_common())
    slowest = f"{max(listened):.1f} s at most" if listened else "–"
    return f"""# Reliability

## Killed at random moments

{len(blows)} strikes; {len(runs)} run(s) (`python -m tests.crash --strikes {len(blows)} --seed \
{facts["seed"]}`); each run is started again after each strike.
**{survived} of {len(runs)} runs ended with the bits of an undisturbed one**, the same record but
for times, no file left over and no traceback.

| moment | SIGKILL | SIGTERM |
| --- | --- | --- |
{rows}

Half written on the disk when it struck: {half}. From SIGTERM to exit code 143, with a checkpoint
written: {slowest} ({len(listened)} times; the others came before training and ended the process at
once). Device: {made["device"]}; jax {made["jax"]}; commit {short(made["commit"])}.

{several.section()}
{OTHERS}"""


OTHERS = """## Other faults

| fault | what happens | test |
| --- | --- | --- |
| two processes, one run | one works; the other leaves with exit code 75 and names process and \
host | `tests/test_lock.py` |
| lock of a dead process | taken over | `tests/test_lock.py` |
| disk full while a checkpoint, weights or record are written | one sentence, exit code 74; the \
checkpoint before stays; the rerun ends with the same bits | `tests/test_disks.py` |
| workdir that may not be written, or not even read | one sentence, exit code 2 \
| `tests/test_disks.py` |
| a flipped bit, a file cut short, emptied or gone in the newest checkpoint | named; the one \
before is used | `tests/test_disks.py`; 1,000 flips: \
`python -m pytest -n 0 -m slow tests/test_disks.py` |
| a damaged record | named, and not done again unasked | `tests/test_lock.py` |
| NaN or infinity in images, teacher, taps, connectors, loss or gradient | step, \
phase and the first tap that is not finite; the checkpoint before stays \
| `tests/test_diagnosis.py` |
| NaN or infinity in a held-out loss | the step, and divergence if it was; the checkpoint before \
stays | `tests/test_diagnosis.py` |
| a learning rate that is too large | called divergence, with the growth of loss and weights; a \
search goes on with the next point | `tests/test_diagnosis.py`, `tests/test_search.py` |
| one of several processes is given other arguments, or holds other bits | named; exit code 2 \
| `tests/test_processes.py` |
| the same command twice, in two phases and in a joint one | the same bits \
| `python -m pytest -n 0 -m slow tests/test_determinism.py` |
| one seed of four varied | other draws of what it names, nothing else \
| `tests/test_determinism.py` |
| bad input | the documented exception, or one sentence and exit code 2 | `tests/test_input.py`; \
many more examples: `python -m pytest -n 0 tests/test_input.py --hypothesis-profile=slow` |
| code in a weights file | never runs | `tests/test_weights.py`, `tests/test_input.py` |
"""


if __name__ == "__main__":
    cli.main(main)
