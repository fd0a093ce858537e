"""One run by several processes: its numbers, and what happens when one of them is struck.

Each process is the command line, with one CPU device and a workdir of its own, so that nothing is
shared but the loopback address. In float64 wrn10-2 teaches wrn10-1 on a tenth of the digits, 1 + 1
epochs, 8 steps, a checkpoint after each. Two and four processes must have the losses of one; and
when one of two is killed, or asked to stop, the other must stop as well, and both go on to the bits
of a run that nothing disturbed. Writes tests/several.json, and tests/RELIABILITY.md from it. Ten
minutes on two cores.

examples:
  python -m tests.several
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from rich.console import Console

from abflax.record import environment, write_record
from experiments import cli
from experiments.archive import short
from tests.conftest import save_random_network

HERE = Path(__file__).parent
FACTS = HERE / "several.json"
# One device each, and half the compile time.
SETTINGS = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=1"}
ARGUMENTS = (
    "--dataset", "digits", "--teacher", "wrn10-2", "--student", "wrn10-1", "--fraction", "0.1",
    "--batch-size", "32", "--epochs", "1+1", "--protocol", "official", "--precision", "float64",
    "--checkpoint-seconds", "0", "--tensorboard",
)  # fmt: skip
# Which of two processes is struck, by what, and after which step: 4 is the last of its phase.
STRIKES = ((1, signal.SIGKILL, 2), (0, signal.SIGKILL, 5), (1, signal.SIGTERM, 6))


def main(console: Console) -> None:
    from tests import crash  # which has the page, and asks here for a section of it

    cli.Parser("tests.several", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for facts in observe(Path(folder)):
            console.print(json.dumps(facts), soft_wrap=True)
            write_record(FACTS, facts)
            crash.write_page()


def observe(base: Path) -> Iterator[dict[str, Any]]:
    """Yields what is known so far; the last is all."""
    save_random_network("wrn10-2", base / "teacher.npz")
    made_by = environment(jax.local_devices())
    facts: dict[str, Any] = {"environment": made_by, "numbers": {}, "strikes": []}
    one, two, four = (Several(base, f"of{count}", count) for count in (1, 2, 4))
    one.finish()
    two.finish()
    facts["numbers"]["2"] = _compared(one, two)
    yield facts
    for process, number, step in STRIKES:
        struck = Several(base, f"struck{step}", 2)
        blow = struck.strike(process, number, step)
        left = struck.step()
        struck.finish()
        blow |= {
            "on_disk": left,
            "same_bits": struck.weights() == two.weights(),
            "same_record": struck.record() == two.record(),
            "tidy": struck.names() == two.names(),
            "elsewhere": struck.elsewhere(),
        }
        facts["strikes"].append(blow)
        yield facts
    four.finish()
    facts["numbers"]["4"] = _compared(one, four)
    yield facts


class Several:
    """One run by so many processes; what the first wrote, and whether the others wrote anything."""

    def __init__(self, base: Path, name: str, count: int) -> None:
        self._count, self._weights = count, base / "teacher.npz"
        self._workdirs = [base / name / str(process) for process in range(count)]
        for workdir in self._workdirs:
            workdir.mkdir(parents=True, exist_ok=True)

    def start(self) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        place = ["--coordinator", coordinator, "--processes", str(self._count), "--process"]
        started = []
        for process, workdir in enumerate(self._workdirs):
            command = [sys.executable, "-m", "experiments.run", *ARGUMENTS, "--teacher-weights",
                       self._weights, "--workdir", workdir]  # fmt: skip
            command += [*place, str(process)] if self._count > 1 else []
            with (workdir.parent / f"{process}.log").open("a") as log:
                started.append(
                    subprocess.Popen(
                        list(map(str, command)), cwd=HERE.parent, env=SETTINGS, stdout=log,
                        stderr=log,
                    )
                )  # fmt: skip
        return started

    def finish(self) -> None:
        """Lets it run to its end."""
        if codes := [code for each in self.start() if (code := each.wait(timeout=3000))]:
            raise RuntimeError(f"exit codes {codes}: {self.log(0)}")

    def strike(self, process: int, number: signal.Signals, step: int) -> dict[str, Any]:
        """Starts it, strikes one process after a step, and tells how all of them ended."""
        started = self.start()
        while self.step() < step:
            if any(each.poll() is not None for each in started):
                raise RuntimeError(self.log(0))
            time.sleep(0.005)
        began = time.monotonic()
        started[process].send_signal(number)
        exits = [each.wait(timeout=300) for each in started]
        return {
            "signal": number.name,
            "process": process,
            "step": step,
            "exits": exits,
            "seconds": round(time.monotonic() - began, 3),
            "last_words": [self.log(index).strip().splitlines()[-1:] for index in range(2)],
        }

    def log(self, process: int) -> str:
        return (self._workdirs[process].parent / f"{process}.log").read_text()

    def step(self) -> int:
        """Of the newest checkpoint."""
        found = self._workdirs[0].glob("runs/*/checkpoints/*")
        return max((int(path.name) for path in found if path.name.isdigit()), default=-1)

    def elsewhere(self) -> list[str]:
        """What processes other than the first have written, but for compiled programs."""
        files = [path for workdir in self._workdirs[1:] for path in workdir.rglob("*")]
        return [path.name for path in files if path.is_file() and "compiled" not in path.parts]

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder().iterdir())

    def weights(self) -> bytes:
        return (self._folder() / "student.safetensors").read_bytes()

    def record(self) -> dict[str, Any]:
        """Without the times, and the state of the repository at that time."""
        record = json.loads((self._folder() / "record.json").read_text())
        for timed in (record, *record["phases"]):
            timed.pop("seconds")
        del record["finished"], record["environment"]["commit"]
        return record

    def _folder(self) -> Path:
        (folder,) = (self._workdirs[0] / "runs").iterdir()
        return folder


def _compared(one: Several, many: Several) -> dict[str, Any]:
    weights = map(safetensors.numpy.load, (one.weights(), many.weights()))
    return {
        "history": _furthest(one.record()["history"], many.record()["history"]),
        "weights": _furthest(*weights),
        "elsewhere": many.elsewhere(),
    }


def _furthest(one: Any, other: Any) -> float:
    """The largest difference between the numbers of two trees, relative where they exceed 1."""
    pairs = zip(*map(_numbers, (one, other)), strict=True)
    return max(float(np.max(np.abs(a - b) / np.maximum(1, np.abs(a)))) for a, b in pairs)


def _numbers(tree: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [np.asarray(leaf, np.float64) for leaf in leaves if not isinstance(leaf, str)]


def section() -> str:
    """Of RELIABILITY.md."""
    facts = json.loads(FACTS.read_text())
    numbers = "\n".join(
        f"| {count} | {found['history']:.1e} | {found['weights']:.1e} |"
        for count, found in facts["numbers"].items()
    )
    strikes = "\n".join(
        f"| {each['signal']} to process {each['process']} after step {each['step']} | "
        f"{', '.join(map(str, each['exits']))} | {each['seconds']:.1f} s | "
        f"{'the same bits and record' if holds(each) else 'DIFFERS'} |"
        for each in facts["strikes"]
    )
    made = facts["environment"]
    return f"""## Several processes

One run by several processes (`jax.distributed`, CPU devices, loopback), from the command line
(`python -m tests.several`; the same as tests: `python -m pytest -n 0 -m slow
tests/test_processes.py`). Both phases in float64, largest difference from one process, relative
where a number exceeds 1 (losses, gradient norms, held-out errors, agreements; weights):

| processes | history | weights |
| ---: | ---: | ---: |
{numbers}

Of two processes one is struck; exit codes of both, seconds until both have left, and what the same
command makes of it afterwards. Only the first process writes: the others' workdirs held
{"nothing" if not written(facts) else ", ".join(written(facts))} but compiled programs.

| struck | exit codes | after | started again |
| --- | --- | ---: | --- |
{strikes}

69: another process is lost, seen by the collectives; 134 (-6 here) where JAX's runtime sees it
first. A process that falls silent without closing its connections is taken for dead after 30 s.
Device: {made["device"]}; jax {made["jax"]}; commit {short(made["commit"])}.
"""


def holds(strike: dict[str, Any]) -> bool:
    """Whether a struck run ended as if nothing had happened."""
    return strike["same_bits"] and strike["same_record"] and strike["tidy"]


def written(facts: dict[str, Any]) -> list[str]:
    """What processes other than the first have written."""
    found = [*facts["numbers"].values(), *facts["strikes"]]
    return sorted({name for each in found for name in each["elsewhere"]})


if __name__ == "__main__":
    cli.main(main)
