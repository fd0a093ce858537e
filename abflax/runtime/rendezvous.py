"""Brings the processes of a run together before JAX does, which aborts where they do not fit.

Each process tells process 0 its number, how many there are to be, and what it is to do. Process 0
answers when all are there, or as soon as one cannot be right; so all say the same sentence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import select
import socket
import time
from typing import Any

from abflax.errors import InputError, LostError

PATIENCE = 300
"""Seconds to wait for a process that has not come."""

_MOST = 2000  # bytes of a message


def require_together(coordinator: str, processes: int, process: int, task: str) -> None:
    """Waits until all processes are there.

    Args:
      coordinator: "HOST:PORT" of process 0.
      processes: the number of processes.
      process: the number of this one.
      task: what must be the same in all.

    Raises:
      ValueError: if the place is wrong, or the processes do not fit together.
      LostError: if one has left, or has not come after five minutes.
    """
    host, _, port = coordinator.rpartition(":")
    digest = hashlib.sha256(task.encode(errors="replace")).hexdigest()
    own = {"process": process, "processes": processes, "task": digest}
    try:
        if not 0 < int(port) < 2**16:
            raise OverflowError("a port is a number from 1 to 65535")
        place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][:2]
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"there is no place {coordinator} in the network: {error}") from None
    if process > 0:
        _join(coordinator, place, own)
        return
    try:
        server = _listen(int(port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InputError(f"nothing can listen at {coordinator}: {error.strerror}") from None
        with contextlib.suppress(LostError):
            _join(coordinator, place, own, patience=5)  # another process 0 says what is wrong
        raise InputError(f"the port of {coordinator} is taken: choose another") from None
    with server, contextlib.ExitStack() as connections:
        _gather(server, own, connections)


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _gather(server: socket.socket, own: dict[str, Any], connections: contextlib.ExitStack) -> None:
    """Process 0: waits for the others, and answers them."""
    peers: dict[int, socket.socket] = {}
    end, error = time.monotonic() + PATIENCE, None
    while error is None and len(peers) < own["processes"] - 1:
        left = max(0.0, end - time.monotonic())
        ready, _, _ = select.select([server, *peers.values()], [], [], left)
        if not ready:
            missing = sorted({*range(1, own["processes"])} - {*peers})
            error = f"of {own['processes']} processes number {missing[0]} has not come"
        elif ready[0] is not server:
            error = "a process has left before all had come"
        else:
            peer = connections.enter_context(server.accept()[0])
            hello = _receive(peer, patience=5)
            if hello is None:  # nobody of ours
                peer.close()
                continue
            error = _misfit(own, hello, peers)
            peers[-1 if error else hello["process"]] = peer
    lost = error is not None and ("has not come" in error or "has left" in error)
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps({"error": error, "lost": lost}).encode() + b"\n")
    _raise(error, lost)


def _misfit(own: dict[str, Any], hello: dict[str, Any], peers: dict[int, Any]) -> str | None:
    """Says why a process does not fit; None: it does."""
    number = hello["process"]
    if hello["processes"] != own["processes"]:
        return (
            f"process {number} is one of {hello['processes']}, but process 0 one of "
            f"{own['processes']}"
        )
    if number == 0 or number in peers:
        return f"there are two processes with the number {number}"
    if hello["task"] != own["task"]:
        return f"process {number} differs from process 0 in its arguments"
    return None


def _join(coordinator: str, place: Any, own: dict[str, Any], patience: float = PATIENCE) -> None:
    """Another process: tells process 0 that it is there, and waits for the answer."""
    end = time.monotonic() + patience
    while True:
        try:
            peer = socket.create_connection(place, timeout=5)
            break
        except OSError as error:
            if time.monotonic() > end:
                raise LostError(f"process 0 is not at {coordinator}: {error.strerror}") from None
            time.sleep(0.2)
    with peer:
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps(own).encode() + b"\n")
        answer = _receive(peer, max(1.0, end - time.monotonic()))
    if answer is None:
        raise LostError(f"process 0 has left {coordinator} before all had come")
    _raise(answer["error"], answer["lost"])


def _receive(peer: socket.socket, patience: float) -> dict[str, Any] | None:
    """Reads a message of one line; None: there is none, or it is somebody else's."""
    peer.settimeout(patience)
    try:
        with peer.makefile("rb") as file:
            message = json.loads(file.readline(_MOST))
    except (OSError, ValueError):
        return None
    known = isinstance(message, dict) and (
        message.keys() >= {"process", "processes", "task"} or message.keys() >= {"error", "lost"}
    )
    return message if known else None


def _raise(error: str | None, lost: bool) -> None:
    if error is not None:
        raise LostError(error) if lost else InputError(error)
