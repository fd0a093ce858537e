"""Hand-edited and foreign JSON under a workdir is named and skipped, or one sentence and code 2."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest

from abflax import InputError, Resources, distill, load
from abflax.models import MODELS
from abflax.training.record import read_record
from experiments import analyse, bench, export, results, run, table
from experiments.paper_tables import records as stored
from tests.experiments.conftest import plain

pytestmark = pytest.mark.filterwarnings("default")  # as a command shows them


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with one finished run, which stays as it is."""
    folder = tmp_path_factory.mktemp("foreign")
    distill(
        MODELS["wrn10-1"](), None, load("digits", "train").take(np.arange(32)), workdir=folder,
        method="cross-entropy", epochs=(0, 1), batch_size=32, resources=Resources(devices=1),
    )  # fmt: skip
    return folder


def _edited(record, *path, value):
    changed = json.loads(json.dumps(record))
    *parents, last = path
    inner = changed
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return changed


def _foreign(record):
    yield from ("", "{", "null", "3", "[]", "{}", "[" * 100_000, b"\xff\xfe", '"\x1b[2J"')
    for path, value in (
        (("config",), {}), (("config", "seeds"), 3), (("config", "epochs"), "1+1"),
        (("config", "method"), "none"), (("config", "fraction"), [1]), (("config", "new"), 1),
        (("result",), []), (("result", "test_error"), "0.3"), (("result", "test_error"), None),
        (("environment",), {}), (("history",), {}), (("history", 0), 7), (("phases", 0), {}),
        (("hash",), "x"), (("state",), "begun"), (("schema",), 2),
    ):  # fmt: skip
        yield json.dumps(_edited(record, *path, value=value))
    yield json.dumps(_edited(record, "result", "test_error", value=float("nan")))


@pytest.fixture
def other(workdir, request):
    """A function that puts a second run there with a record, under a name of its own each time."""
    (folder,) = (path for path in (workdir / "runs").iterdir() if (path / "record.json").exists())
    good, folders = json.loads((folder / "record.json").read_text()), []

    def put(content):
        folders.append(workdir / "runs" / f"{abs(hash((request.node.name, len(folders)))):012x}")
        folders[-1].mkdir()
        shutil.copy(folder / "config.json", folders[-1])
        path = folders[-1] / "record.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    yield good, put
    for path in folders:
        shutil.rmtree(path)


def test_foreign_records_are_named_and_skipped(call_command, workdir, other):
    good, put = other
    for content in _foreign(good):
        path = put(content)
        with pytest.raises(InputError, match=f"^{path} "):
            read_record(path)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert set(stored.finished(workdir)) == {good["hash"]}
        (text,) = (str(each.message) for each in told)
        assert text.startswith(f"{path} ") and text.endswith("; it is skipped")
        assert text.isprintable()
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [lambda good: "{", lambda good: json.dumps(good | {"config": {}}),
     lambda good: json.dumps(good | {"result": {"test_error": "0.3"}})],
    ids=["cut", "configuration", "result"],
)  # fmt: skip
def test_commands_go_on_without_foreign_records(
    call_command, workdir, other, monkeypatch, tmp_path, damage
):
    good, put = other
    for name in ("RESULTS", "README", "FIGURES"):
        monkeypatch.setattr(results, name, tmp_path / name)
    (tmp_path / "README").write_text(f"{results._BEGIN}\n{results._END}")
    monkeypatch.setattr(results, "tables_with_records", lambda *_: iter(()))
    for module, *arguments in (
        (run, "list", "--workdir", workdir), (results, "--add", workdir),
        (table, "1", "--scale", "small", "--dry-run", "--workdir", workdir),
    ):  # fmt: skip
        path = put(damage(good))
        code, out, err = call_command(module.main, *arguments)
        path.unlink()
        assert code == 0 and f"warning: {path} " in err and err.count("\n") == 1, err
        assert module is not run or "finished" in out
    path = put(damage(good))
    for module, *arguments in (
        (export, path.parent.name, "--workdir", workdir),
        (analyse, path.parent.name, "--workdir", workdir), (bench, "--record", path),
    ):  # fmt: skip
        code, _, err = call_command(module.main, *arguments)
        assert code == 2 and str(path) in plain(err)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"method": 3}', "pipe", "folder"])
def test_foreign_configurations_are_named_and_skipped(call_command, workdir, content):
    other = workdir / "runs" / f"other-{abs(hash(content))}"
    other.mkdir()
    path = other / "config.json"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(content)
    code, out, err = call_command(run.main, "list", "--workdir", workdir)
    assert code == 0 and f"warning: {path} " in err and "finished" in out
    shutil.rmtree(other)
