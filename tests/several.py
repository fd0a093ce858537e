"""Train one run in several processes: its numbers, and what happens if one of them is killed.

Each process is the command line, with one CPU device and a workdir of its own, so that they share
only the loopback address. In float64 wrn10-2 teaches wrn10-1 on a tenth of the digits, 1 + 1
epochs, 8 steps, a checkpoint after each. Two and four processes must have the losses of one. If one
of two gets SIGKILL or SIGTERM, the other must stop as well; started again, both must end with the
bits of an undisturbed run. Writes tests/several.json, and tests/RELIABILITY.md from it. Ten minutes
on two cores.

Examples:
  python -m tests.several
"""

from __future__ import annotations

import dataclasses
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

from abflax.training.record import environment, write_record
from experiments.common import cli
from experiments.paper_tables.records import short
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
# Which of two processes gets which signal after which step: 4 is the last of its phase.
STRIKES = ((1, signal.SIGKILL, 2), (0, signal.SIGKILL, 5), (1, signal.SIGTERM, 6))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line, which has no flags."""


def main(console: Console) -> None:
    """Trains all runs, and writes what happened."""
    from tests import crash  # which imports this file for a section of its page

    cli.parse(Arguments, "tests.several", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        for facts in observe(Path(folder)):
            console.print(json.dumps(facts), soft_wrap=True)
            write_record(FACTS, facts)
            crash.write_page()


def observe(base: Path) -> Iterator[dict[str, Any]]:
    """Yields what is known so far; the last value holds all facts."""
    save_random_network("wrn10-2", base / "teacher.npz")
    facts: dict[str, Any] = {
        "environment": environment(jax.local_devices()), "numbers": {}, "strikes": []
    }  # fmt: skip
    one, two, four = (Several(base, f"of{count}", count) for count in (1, 2, 4))
    one.finish()
    two.finish()
    facts["numbers"]["2"] = _compared(one, two)
    yield facts
    for process, number, step in STRIKES:
        struck = Several(base, f"struck{step}", 2)
        strike = struck.strike(process, number, step)
        step_on_disk = struck.step()
        struck.finish()
        strike |= {
            "on_disk": step_on_disk,
            "same_bits": struck.weights() == two.weights(),
            "same_record": struck.record() == two.record(),
            "tidy": struck.names() == two.names(),
            "elsewhere": struck.elsewhere(),
        }
        facts["strikes"].append(strike)
        yield facts
    four.finish()
    facts["numbers"]["4"] = _compared(one, four)
    yield facts


class Several:
    """One run by `count` processes; what the first wrote, and whether the others wrote anything."""

    def __init__(self, base: Path, name: str, count: int) -> None:
        self._count, self._weights = count, base / "teacher.npz"
        self._workdirs = [base / name / str(process) for process in range(count)]
        for workdir in self._workdirs:
            workdir.mkdir(parents=True, exist_ok=True)

    def start(self) -> list[subprocess.Popen]:
        """Starts all processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        started = []
        for process, workdir in enumerate(self._workdirs):
            command = [sys.executable, "-m", "experiments.run", *ARGUMENTS, "--teacher-weights",
                       self._weights, "--workdir", workdir]  # fmt: skip
            if self._count > 1:
                command += ["--distributed", f"{coordinator},{self._count},{process}"]
            with (workdir.parent / f"{process}.log").open("a") as log:
                started.append(
                    subprocess.Popen(
                        list(map(str, command)), cwd=HERE.parent, env=SETTINGS, stdout=log,
                        stderr=log,
                    )
                )  # fmt: skip
        return started

    def finish(self) -> None:
        """Starts all processes and waits for their end."""
        codes = [process.wait(timeout=3000) for process in self.start()]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}: {self.log(0)}")

    def strike(self, process: int, number: signal.Signals, step: int) -> dict[str, Any]:
        """Starts all, sends one process a signal after a step, and returns how all ended."""
        started = self.start()
        while self.step() < step:
            if any(running.poll() is not None for running in started):
                raise RuntimeError(self.log(0))
            time.sleep(0.005)
        began = time.monotonic()
        started[process].send_signal(number)
        exits = [running.wait(timeout=300) for running in started]
        return {
            "signal": number.name,
            "process": process,
            "step": step,
            "exits": exits,
            "seconds": round(time.monotonic() - began, 3),
            "last_words": [self.log(index).strip().splitlines()[-1:] for index in range(2)],
        }

    def log(self, process: int) -> str:
        """What a process has printed."""
        return (self._workdirs[process].parent / f"{process}.log").read_text()

    def step(self) -> int:
        """The step of the newest checkpoint."""
        paths = self._workdirs[0].glob("runs/*/checkpoints/*")
        return max((int(path.name) for path in paths if path.name.isdigit()), default=-1)

    def elsewhere(self) -> list[str]:
        """What processes other than the first have written, except for compiled programs."""
        files = [path for workdir in self._workdirs[1:] for path in workdir.rglob("*")]
        return [path.name for path in files if path.is_file() and "compiled" not in path.parts]

    def names(self) -> list[str]:
        """The names in the run's folder."""
        return sorted(path.name for path in self._folder().iterdir())

    def weights(self) -> bytes:
        """The student's weights, as a file."""
        return (self._folder() / "student.safetensors").read_bytes()

    def record(self) -> dict[str, Any]:
        """The record without its times and the repository's commit."""
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
    """The section of RELIABILITY.md about several processes."""
    facts = json.loads(FACTS.read_text())
    numbers = "\n".join(
        f"| {count} | {differences['history']:.1e} | {differences['weights']:.1e} |"
        for count, differences in facts["numbers"].items()
    )
    strikes = "\n".join(
        f"| {strike['signal']} to process {strike['process']} after step {strike['step']} | "
        f"{', '.join(map(str, strike['exits']))} | {strike['seconds']:.1f} s | "
        f"{'the same bits and record' if holds(strike) else 'DIFFERS'} |"
        for strike in facts["strikes"]
    )
    origin = facts["environment"]
    return f"""## Several processes

One run by several processes (`jax.distributed`, CPU devices, loopback), from the command line
(`python -m tests.several`; the same as tests: `python -m pytest -n 0 -m slow
tests/runtime/test_distributed.py`). Both phases in float64, largest difference from one process,
relative where a number exceeds 1 (losses, gradient norms, held-out errors, agreements; weights):

| processes | history | weights |
| ---: | ---: | ---: |
{numbers}

One of two processes gets a signal; exit codes of both, seconds until both have ended, and the
result after both were started again. Only the first process writes: the others' workdirs held
{"nothing" if not written(facts) else ", ".join(written(facts))} except compiled programs.

| signal | exit codes | after | started again |
| --- | --- | ---: | --- |
{strikes}

69: a collective has found that another process is lost; 134 (-6 here): JAX's runtime has found it
first. A process that stops without closing its connections counts as lost after 30 s.
Device: {origin["device"]}; jax {origin["jax"]}; commit {short(origin["commit"])}.
"""


def holds(strike: dict[str, Any]) -> bool:
    """Whether a run ended like an undisturbed one."""
    return strike["same_bits"] and strike["same_record"] and strike["tidy"]


def written(facts: dict[str, Any]) -> list[str]:
    """What processes other than the first have written."""
    runs = [*facts["numbers"].values(), *facts["strikes"]]
    return sorted({name for run in runs for name in run["elsewhere"]})


if __name__ == "__main__":
    cli.main(main)
