"""The command line: bad input gets one sentence and exit code 2, and nothing is written."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import abflax
from abflax.methods import METHODS
from abflax.models import without_fields
from abflax.weights import read_state_dict
from experiments import analyse, figure1, quickstart, run
from experiments.common import cli
from experiments.common.networks import SHIPPED
from tests import crash, several
from tests.conftest import save_random_network
from tests.experiments.conftest import plain


@pytest.fixture
def command(call_command):
    return lambda *arguments, module=run: call_command(module.main, *arguments)


DIGITS = ("--dataset", "digits", "--epochs", "1+1")
MISTAKES = [
    (("--method", "activation-bondary"), "did you mean activation-boundary?"),
    (("--metod", "kd"), "Perhaps you meant: --method"),
    (("--protocol", "offical"), "unknown protocol 'offical'; did you mean official?"),
    (("--dataset", "cifar11"), "unknown dataset 'cifar11'; did you mean cifar10"),
    (("--student", "resnet18"), "unknown model 'resnet18'; did you mean resnet50"),
    (("--student", "mobilenet-v2-0"), "a width multiplier is above 0 and at most 16"),
    (("--student", "wrn17-2"), "the nearest is wrn16-2"),
    ((*DIGITS, "--teacher", "wrn11-2"), "'wrn11-2' is no wide ResNet"),
    ((*DIGITS, "--teacher", "wrn22-4"), "no wrn22-4 trained on digits is shipped"),
    ((*DIGITS, "--method", "kd", "--teacher", "none"), "unknown model 'none'"),
    ((*DIGITS, "--method", "kd", "--teacher-weights", "no.npz"), "there is no weights file no.npz"),
    (("--epochs", "one"), "'one' is not I+C, such as 20+100"),
    (("--epochs", "100"), "'100' is not I+C"),
    ((*DIGITS, "--method", "kd", "--transfer-weight", "7"), "has no transfer loss"),
    (("--steps-per-dispatch", "0", "--dataset", "digits", "--method", "cross-entropy"),
     "steps_per_dispatch must be at least 1"),
    (("--epochs", "0+0"), "not both 0"),
    (("--fraction", "0"), "must be in (0, 1], not 0.0"),
    (("--batch-size", "0"), "batch_size must be at least 1, not 0"),
    (("--batch-size", "2000000000"), "batch_size must be at most 1,000,000, not 2,000,000,000"),
    (("--steps-per-dispatch", "1000001"), "steps_per_dispatch must be at most 1,000,000"),
    (("--epochs", "0+1000000000"), "there can be 1,000,000 epochs at most, not 1,000,000,000"),
    (("--batch-size", "many"), "Error parsing --batch-size: invalid literal for int() with base 10:"
     " 'many'"),
    (("--seeds", "0"), "at least one seed"),
    ((*DIGITS, "--method", "cross-entropy", "--seeds", "4294967296,"), "from 0 to 2³² − 1"),
    ((*DIGITS, "--method", "cross-entropy", "--seeds", "12345678901234567890,"), "from 0 to 2³²"),
    (("--seeds", "a,b"), "'a,b' is neither a count nor a list of seeds"),
    (("--margin", "-1"), "the margin must be above 0, not -1.0"),
    (("--method", "kd", "--margin", "2"), "unknown option of method kd 'margin'"),
    (("--precision", "float16"), "unknown precision 'float16'"),
    (("--evaluate-every", "0"), "evaluate_every must be at least 1"),
    ((*DIGITS, "--method", "cross-entropy", "--devices", "99"), "99 cannot be used"),
    (("--distributed", "here,2,0"), "is auto or HOST:PORT,N,I, not 'here,2,0'"),
    (("--distributed", "here:1,2"), "is auto or HOST:PORT,N,I, not 'here:1,2'"),
    (("--distributed", "here:1,2,2"), "none has the number 2"),
    (("evaluate", "--student", "wrn10-1"), "evaluate measures a teacher: give --teacher"),
    ((*DIGITS, "--method", "cross-entropy", "--teacher", "wrn10-1", "--teacher-weights", "no.npz"),
     "there is no weights file no.npz"),
    (("evalute",), "invalid choice 'evalute' for argument 'command'. Expected one of ('train', "
     "'evaluate', 'list')"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=lambda x: " ".join(x)[:40])
def test_mistakes(command, tmp_path, arguments, sentence):
    code, out, err = command(*arguments, "--workdir", str(tmp_path / "workdir"))
    assert code == 2
    assert sentence in plain(err)
    assert out == "" and not list(tmp_path.iterdir())


def test_an_empty_data_dir(command, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = command("--data-dir", str(tmp_path), "--workdir", str(tmp_path / "w"))
    assert code == 2 and "there is no prepared cifar10 in" in err and "pip install" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [run, quickstart, figure1])
def test_a_workdir_that_cannot_be_written(command, tmp_path, module):
    (tmp_path / "file").write_text("kept")
    arguments = (*DIGITS, "--method", "cross-entropy") if module is run else ()
    code, out, err = command(*arguments, "--workdir", str(tmp_path / "file"), module=module)
    assert (code, out) == (2, "") and "cannot write to" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("module", [run, quickstart, analyse, figure1, crash, several])
def test_help(command, module):
    code, out, err = command("--help", module=module)
    assert code == 0 and "Examples:" in out
    assert ("--workdir" in out) == (module not in (crash, several))
    if module is run:
        for name in METHODS:
            assert METHODS.describe(name).reference in out and f"  {name} " in out


def test_version(command):
    assert command("--version")[:2] == (0, f"abflax {abflax.__version__}\n")


def test_nothing_to_list(command, tmp_path):
    assert command("list", "--workdir", str(tmp_path))[:2] == (0, f"no runs in {tmp_path}\n")


def test_nothing_in_a_table_is_cut_in_a_narrow_terminal():
    printed = io.StringIO()
    names = [f"a name of one run that is long {index}" for index in range(4)]
    table = cli.make_table(names)
    table.add_row(*names[::-1])
    cli.print_table(Console(file=printed, width=40), table)
    assert printed.getvalue().count("\n") == 2
    assert all(printed.getvalue().count(name) == 2 for name in names)


def test_a_users_model_is_listed_by_its_class():
    assert without_fields("Net( # attributes width = 6 ) tapped at a=b") == "Net"
    assert without_fields("wrn16-2") == "wrn16-2" and without_fields("-") == "-"
    assert without_fields("my net (v2)") == "my net (v2)"


def test_train_list_and_evaluate(command, tmp_path):
    here = ("--workdir", str(tmp_path), "--dataset", "digits")
    train = ("--student", "wrn10-1", "--method", "cross-entropy", "--epochs", "0+1", "--fraction",
             "0.1", "--batch-size", "32", "--devices", "1", *here)  # fmt: skip
    code, out, err = command(*train)
    assert code == 0, err
    assert "test error" in out and "(n = 1)" in out
    code, out, err = command(*train, "--json")
    (record,) = json.loads(out)
    assert "is finished already" in err
    assert command(*train, "--json", "--quiet") == (0, out, "")
    name = record["hash"]
    code, out, _ = command("list", "--json", *here)
    (row,) = json.loads(out)
    error = f"{100 * record['result']['test_error']:.2f} %"
    assert (row["run"], row["state"], row["test error"]) == (name, "finished", error)
    code, out, _ = command(
        "evaluate", "--teacher", "wrn10-1", "--teacher-weights", name, "--devices", "1", *here
    )
    assert code == 0 and error in out
    code, _, err = command("evaluate", "--teacher", "wrn16-1", "--teacher-weights", name, *here)
    assert code == 2 and f"run {name} trained a wrn10-1, not a wrn16-1" in err


def test_shipped_teachers_can_be_read():
    names = [path.name for path in SHIPPED.glob("*.npz")]
    assert "wrn16-2-cifar10.npz" in names
    for name in names:
        weights = read_state_dict(SHIPPED / name)
        assert all(np.isfinite(value).all() for value in weights.values())


@pytest.mark.slow
def test_numbers_that_are_none_leave_with_1(command, tmp_path):
    save_random_network("wrn10-1", tmp_path / "nan.npz", {"fc.bias": np.full(10, np.nan)})
    code, _, err = command(
        *DIGITS, "--method", "kd", "--teacher", "wrn10-1", "--student", "wrn10-1", "--devices",
        "1", "--teacher-weights", str(tmp_path / "nan.npz"), "--workdir", str(tmp_path),
    )  # fmt: skip
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: the loss is not finite at step 0 of phase joint")
    code, out, _ = command("list", "--workdir", str(tmp_path))
    assert code == 0 and "diverged" in out


@pytest.mark.parametrize(("given", "level"), [({}, "3"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "0")])
def test_xlas_log_is_quiet_unless_asked_for(given, level):
    """Before JAX is imported, which would choose for itself."""
    code = "import experiments, os, sys; print('jax' in sys.modules, os.environ['%s'])"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("TF_CPP")}
    told = subprocess.run([sys.executable, "-c", code % "TF_CPP_MIN_LOG_LEVEL"], env=bare | given,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert told.stdout == f"False {level}\n"


@pytest.mark.parametrize("there", [True, False])
def test_freed_memory_is_kept_where_glibc_allocates(monkeypatch, there):
    told = []
    library = SimpleNamespace(**({"mallopt": lambda *pair: told.append(pair)} if there else {}))
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    cli.keep_freed_memory()
    assert told == ([(-1, -1), (-4, 0), (-8, 1)] if there else [])
    told.clear()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    cli.keep_freed_memory()
    assert told == []
