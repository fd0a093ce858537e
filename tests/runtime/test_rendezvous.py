"""Processes that do not fit together say so in one sentence, all of them, before JAX aborts."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from abflax import InputError
from abflax.errors import LostError
from abflax.runtime import rendezvous
from abflax.runtime.rendezvous import require_together
from tests.conftest import ROOT


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _meet(port, *processes):
    """(number, count, task) of each: what is raised in each, in a thread of its own."""

    def join(process):
        number, count, task = process
        try:
            require_together(f"localhost:{port}", count, number, task)
        except (InputError, LostError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(join, processes))


def test_processes_that_fit(port):
    assert _meet(port, (2, 3, "a"), (0, 3, "a"), (1, 3, "a")) == [None] * 3
    assert _meet(port, (0, 1, "a")) == [None]
    assert _meet(port, (1, 2, "a"), (0, 2, "a")) == [None] * 2  # again, at the same port


@pytest.mark.parametrize(
    ("processes", "sentence"),
    [
        (((0, 2, "a"), (1, 3, "a")), "process 1 is one of 3, but process 0 one of 2"),
        (((0, 3, "a"), (1, 2, "a")), "process 1 is one of 2, but process 0 one of 3"),
        (((0, 2, "a"), (1, 2, "b")), "process 1 differs from process 0 in its arguments"),
        (((0, 3, "a"), (1, 3, "a"), (1, 3, "a")), "there are two processes with the number 1"),
        (((0, 2, "a"), (0, 2, "a")), "there are two processes with the number 0"),
    ],
)
def test_processes_that_do_not_fit(port, processes, sentence):
    assert _meet(port, *processes) == [f"InputError: {sentence}"] * len(processes)


def test_a_process_that_has_left_or_never_comes(port, monkeypatch):
    def leave():
        time.sleep(0.5)
        with socket.create_connection(("localhost", port)) as peer:
            peer.sendall(b'{"process": 1, "processes": 3, "task": "x"}\n')

    monkeypatch.setattr(rendezvous.hashlib, "sha256", lambda text: type("", (), {
        "hexdigest": lambda self: "x"})())  # fmt: skip
    with ThreadPoolExecutor(1) as threads:
        threads.submit(leave)
        assert _meet(port, (0, 3, "a")) == ["LostError: a process has left before all had come"]
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.5)
    assert (
        _meet(port, (0, 3, "a"), (2, 3, "a"))
        == ["LostError: of 3 processes number 1 has not come"] * 2
    )
    with pytest.raises(LostError, match=f"process 0 is not at localhost:{port}: .*refused"):
        rendezvous._join(f"localhost:{port}", ("127.0.0.1", port), {}, patience=0.1)


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": 1}\n'])
def test_somebody_else_at_the_port_is_passed_over(port, hello):
    def knock():
        time.sleep(0.3)
        with socket.create_connection(("localhost", port)) as other:
            other.sendall(hello)
        return _meet(port, (1, 2, "a"))

    with ThreadPoolExecutor(1) as threads:
        knocked = threads.submit(knock)
        assert _meet(port, (0, 2, "a")) == [None] == knocked.result()


def test_places_that_are_none(port):
    for place in ("nosuch.invalid:80", "localhost:99999", "a" * 300 + ":80"):
        for process in (0, 1):
            with pytest.raises(InputError, match="there is no place .* in the network"):
                require_together(place, 2, process, "")
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(InputError, match=f"the port of localhost:{port} is taken"):
            require_together(f"localhost:{port}", 2, 0, "")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_commands(port, tmp_path, killed):
    """Different ones: 2. One of three is killed before the third has come: 69."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.run", "--dataset", "digits", "--method",
             "cross-entropy", "--workdir", tmp_path / str(process), "--seeds",
             "1" if killed else f"{process},", "--json", "--distributed",
             f"localhost:{port},{2 + killed},{process}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    if killed:
        for _ in range(600):  # until they are connected
            if "ESTABLISHED" in {
                each.status for each in psutil.Process(started[1].pid).net_connections("tcp")
            }:
                break
            time.sleep(0.1)
        started[1].kill()
    (out, err), _ = (each.communicate(timeout=100) for each in started)
    sentence = "a process has left before all had come"
    if not killed:
        sentence = "process 1 differs from process 0 in its arguments"
    assert (out, err) == ("", f"error: {sentence}\n")
    assert started[0].returncode == (os.EX_UNAVAILABLE if killed else 2)
    assert not list(tmp_path.glob("*/runs"))
