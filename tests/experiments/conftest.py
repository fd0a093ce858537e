"""What the tests of commands share."""

import re
import sys

import pytest

from experiments.common import cli


@pytest.fixture(autouse=True)
def exits(monkeypatch):
    """A command that would end its process at once leaves as others do."""
    monkeypatch.setattr(cli.os, "_exit", sys.exit)


@pytest.fixture
def call_command(monkeypatch, capsys):
    """Runs a command's main function in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main(main)
        return left.value.code, *capsys.readouterr()

    return call


def plain(message: str) -> str:
    """A command's one-line error, or tyro's framed one without its frame and line breaks."""
    framed = "For full helptext" in message
    assert framed or (message.startswith("error: ") and message.count("\n") == 1), message
    assert "Traceback" not in message
    return " ".join(re.sub("[╭╮╰╯│─]", " ", message).split())
