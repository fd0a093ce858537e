"""`python -m experiments.table`, on digits: what it runs, leaves, shows and refuses."""

import dataclasses
import os
import re
import signal
import sys

import pytest

from abflax import BusyError, Interrupted, Network, NonFiniteError
from abflax.training.record import write_record
from experiments import table
from experiments.common import cli
from experiments.paper_tables import records as stored
from experiments.paper_tables.definitions import TABLES
from tests.experiments.conftest import plain
from tests.tiny_tables import GRID, ROUTE, TABLE, record, run_of


@pytest.fixture
def forgotten(monkeypatch):
    """An entry each time that a command frees compiled programs, which other tests still need."""
    times = []
    monkeypatch.setattr(cli, "forget_programs", lambda: times.append(None))
    return times


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, forgotten):
    """Runs the command on the tiny table: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)
    monkeypatch.setitem(TABLES["small"], "1", TABLE)

    def call(*arguments, workdir=tmp_path / "workdir"):
        monkeypatch.setattr(sys, "argv", ["x", *arguments, "--workdir", str(workdir)])
        with pytest.raises(SystemExit) as left:
            cli.main(table.main)
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


TINY = ("1", "--scale", "small", "--devices", "1")


@pytest.mark.slow
def test_a_table_from_nothing_to_the_end(command, tmp_path, monkeypatch):
    workdir = tmp_path / "workdir"
    code, out, _ = command(*TINY, "--dry-run")
    assert code == 0 and not workdir.exists()
    # 65 images in batches of 13, two epochs of everything.
    assert "5 runs, 1 of them of teachers; 0 finished, 5 to run in 50 steps" in out

    code, out, err = command(*TINY, "--only", "3/5")  # a student whose teacher is not there yet
    assert code == os.EX_TEMPFAIL and err.startswith("error: 1 of 1 runs are left for another call")
    assert "left: activation-boundary, wrn10-1 → wrn10-1" in out and "not trained yet" in out
    assert "Not run yet: 2 of 2 cells. `python -m experiments.table 1 --scale small`" in out
    assert stored.finished(workdir) == {}

    code, out, err = command(*TINY, "--only", "1/2")  # teacher, then its students of one seed
    assert code == 0, err
    found = stored.finished(workdir)
    assert [(r["config"]["method"], r["config"]["student"], r["config"]["seeds"]["weights"])
            for r in sorted(found.values(), key=lambda r: r["finished"])] == [
        ("cross-entropy", "wrn10-1", 1000),
        ("cross-entropy", "wrn10-1", 1),
        ("activation-boundary", "wrn10-1", 1),
    ]  # fmt: skip
    assert "Not run yet: 0 of 2 cells; begun, with fewer than 2 seeds: 2. `python" in out
    _, out, _ = command(*TINY, "--dry-run")
    assert "5 runs, 1 of them of teachers; 3 finished, 2 to run in 20 steps" in out

    code, out, err = command(*TINY)
    assert code == 0, err
    errors = [
        r["result"]["test_error"]
        for r in stored.finished(workdir).values()
        if r["config"]["method"] == "cross-entropy" and r["config"]["epochs"] == [1, 1]
    ]
    assert f"{100 * sum(errors) / 2:.2f}" in out and "not run" not in out
    assert (workdir / "tables" / "table1-small.md").read_text() in out
    assert (workdir / "tables" / "table1-small.png").is_file()

    monkeypatch.setattr(table, "distill_group", None)  # nothing is run again
    code, again, err = command(*TINY)
    assert code == 0 and err == "" and again.strip() in out


@pytest.mark.slow
def test_a_route_from_nothing_to_the_end(command, tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES["small"], "1", ROUTE)
    code, out, err = command(*TINY, "--steps", "1")
    assert code == 0, err
    assert "rco, wrn10-1@2 → wrn10-1 (2 runs): joint 1 2 steps" in out
    code, out, err = command(*TINY, "--seeds", "1")
    assert code == 0, err
    found = stored.finished(tmp_path / "workdir").values()
    teachers = {
        r["config"]["method"]: (r["config"]["anchors"], r["config"]["teacher"]) for r in found
    }
    (anchor,), last = teachers["rco"]
    assert teachers["kd"] == (None, last) and teachers["cross-entropy"] == (None, None)
    assert anchor != last and anchor.startswith("wrn10-1:")
    monkeypatch.setattr(table, "distill_group", None)  # nothing is run again
    code, again, err = command(*TINY, "--seeds", "1")
    assert code == 0 and again.strip() in out


def test_one_run_that_goes_wrong_does_not_stop_the_others(command, monkeypatch):
    seen = []

    def distill_group(runs, student, teacher, data, **_):
        seen.extend((run["method"], run["seeds"].weights) for run in runs)
        raise NonFiniteError("the loss is not finite at step 3 of phase joint (step 3 of the run)")

    monkeypatch.setattr(table, "distill_group", distill_group)
    code, out, err = command(*TINY, "--methods", "cross-entropy", "--seeds", "4,5")
    assert seen == [("cross-entropy", 4), ("cross-entropy", 5)]
    assert code == 1 and "not run" in out and err.count("\n") == 1
    assert err.startswith("error: 2 of 2 runs failed: cross-entropy, wrn10-1, 5 % of digits")


def test_a_run_of_another_process_is_left(command, monkeypatch, forgotten):
    seen = []

    def distill_group(runs, student, teacher, data, **_):
        seen.extend(run["seeds"].weights for run in runs)
        raise BusyError("run 0123 is being done by process 7")

    monkeypatch.setattr(table, "distill_group", distill_group)
    code, out, err = command(*TINY, "--methods", "cross-entropy", "--seeds", "4,5")
    assert seen == [4, 5] and out.count("left: cross-entropy") == 2
    assert len(forgotten) == 2
    assert code == os.EX_TEMPFAIL and "2 of 2 runs are left for another call" in err


def test_what_the_budget_does_not_allow_is_left(command, monkeypatch):
    seen, before = [], signal.getsignal(signal.SIGALRM)

    def distill_group(runs, student, teacher, data, **_):
        seen.extend(run["seeds"].weights for run in runs)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 180
        raise Interrupted("stopped in phase joint of 0123", signal.SIGALRM)

    monkeypatch.setattr(table, "distill_group", distill_group)
    code, out, err = command(*TINY, "--methods", "cross-entropy", "--seeds", "4,5", "--budget", "3")
    assert seen == [4] and out.count("the budget is spent") == 2
    assert code == os.EX_TEMPFAIL and "2 of 2 runs are left for another call" in err
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_another_process_has_finished_meanwhile_is_not_left(command, monkeypatch, tmp_path):
    def distill_group(runs, student, teacher, data, **_):
        (seed,) = (run["seeds"].weights for run in runs)
        name, made = record(run_of(TABLE, "cross-entropy", "1+1"), seed, 0.25)
        (tmp_path / "workdir" / "runs" / name).mkdir(parents=True)
        write_record(tmp_path / "workdir" / "runs" / name / "record.json", made)
        raise BusyError("run 0123 is being done by process 7")

    monkeypatch.setattr(table, "distill_group", distill_group)
    code, out, err = command(*TINY, "--methods", "cross-entropy", "--seeds", "4,5")
    assert code == 0 and "left:" not in out and "25.00 ± 0.00 (2)" in out, err


def test_runs_that_see_the_same_batches_are_trained_together(command, monkeypatch):
    """All kd, attention and activation-boundary of a seed but those for whom the teacher drifts
    at another time."""
    seen = []

    def distill_group(runs, student, teacher, data, **_):
        seen.append([(run["method"], run["epochs"], run["seeds"].weights) for run in runs])
        method = runs[0]["method"]
        raise (BusyError if method == "kd" else NonFiniteError)(f"{method} has gone wrong")

    monkeypatch.setitem(TABLES["small"], "1", GRID)
    monkeypatch.setattr(table, "distill_group", distill_group)
    teacher = Network(None, {"params": {}}, "wrn10-1:t")
    monkeypatch.setattr(table, "find_networks", lambda *_: {"wrn10-1": teacher})
    code, out, err = command(
        *TINY, "--seeds", "4,5", "--group", "3", "--teacher-weights", "wrn10-1=t.npz",
        "--methods", "kd,attention,activation-boundary",
    )  # fmt: skip
    kd, short, *taught = (
        [("kd", (1, 1), 4), ("kd", (1, 5), 4)],
        [("kd", (1, 1), 5), ("kd", (1, 5), 5)],
        [("attention", (1, 1), 4), ("activation-boundary", (1, 1), 4)],
        [("attention", (1, 1), 5), ("activation-boundary", (1, 1), 5)],
    )
    # Together, and then alone to know whose error it is.
    tried = [again for each in (kd, taught[0], short, taught[1])
             for again in (each, *([run] for run in each))]  # fmt: skip
    assert seen == tried
    assert code == 1 and out.count("left: kd, wrn10-1 → wrn10-1, 5 % of digits, 1+") == 4
    assert "error: 4 of 8 runs failed: attention, wrn10-1 → wrn10-1" in err
    assert "epochs, seed 5: activation-boundary has gone wrong" in err


@pytest.mark.slow
def test_steps_show_that_cells_start_and_keep_nothing(command, tmp_path):
    code, out, err = command(*TINY, "--steps", "5", "--methods", "activation-boundary")
    assert code == 0, err
    assert "starts  cross-entropy, wrn10-1 (1 run): joint 10 steps, loss" in out
    assert "starts  activation-boundary, wrn10-1 → wrn10-1 (2 runs): initialise 5 steps" in out
    assert "2 of 2 start, for 3 runs; nothing was kept" in out
    assert not (tmp_path / "workdir").exists()


def test_a_cell_that_does_not_start(command, monkeypatch, forgotten):
    few = dataclasses.replace(TABLE, run=dataclasses.replace(TABLE.run, fraction=0.005))
    monkeypatch.setitem(TABLES["small"], "1", few)
    code, out, err = command(*TINY, "--steps", "1", "--methods", "activation-boundary",
                             "--teacher-weights", "wrn10-1=none.npz")  # fmt: skip
    assert code == 2 and "there is no weights file none.npz" in err
    code, out, err = command(*TINY, "--steps", "1", "--methods", "cross-entropy")
    assert len(forgotten) == 1
    assert code == 2 and "FAILS   cross-entropy, wrn10-1" in out and "0 of 1 start" in out
    assert "would have no step" in err and err.count("\n") == 1


def test_every_table_can_be_forecast(command):
    code, out, err = command("all", "--scale", "paper", "--dry-run", "--seeds", "1")
    assert code == 0, err
    rows = [line for line in out.splitlines() if re.search(r"(unknown|\d h|\d min)\??$", line)]
    assert len(rows) == 126 and not any("…" in row for row in rows)
    assert "126 runs, 2 of them of teachers; 0 finished, 126 to run in" in out


def test_repdistillers_table_can_be_forecast(command):
    code, out, err = command("repdistiller", "--dry-run", "--seeds", "1")
    assert code == 0, err
    assert "36 runs, 1 of them of teachers; 0 finished" in out
    assert re.search(r"^cross-entropy +wrn40-2 +100 % +0\+240 +1000 +187,500", out, re.MULTILINE)
    assert re.search(r"^ft +wrn40-2 → wrn40-1 +100 % +30\+240 +0 +210,937", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("9",), "unknown table '9'; known: 1, 2, 3, 4, 5, 6, 7, 8, all, repdistiller"),
        (("1,al",), "unknown table 'al'; did you mean all?"),
        (("1", "--scale", "smal"), "unknown scale 'smal'; did you mean small?"),
        (("1", "--rows", "kdd"), "unknown row of table 1 'kdd'; did you mean kd?"),
        (("1", "--methods", "l2"), "unknown method of table 1 'l2'"),
        (("1", "--dry-run", "--steps", "2"), "give --dry-run or --steps, not both"),
        (("1", "--dry-run", "--group", "2"), "are of runs alone: leave --group out"),
        (("1", "--group", "0"), "--group must be at least 1, not 0"),
        (("1", "--columns", ","), "',' names nothing"),
        (("1", "--only", "3/2"), "'3/2' is not K/N with 1 <= K <= N"),
        (("1", "--only", "half"), "'half' is not K/N"),
        (("1", "--seeds", "0"), "at least one seed"),
        (("1", "--steps", "0"), "--steps must be at least 1, not 0"),
        (("1", "--teacher-weights", "t.npz"), "'t.npz' is not NAME=FILE"),
        (("1", "--teacher-weights", "wrn16-4=t.npz"), "unknown teacher of these tables 'wrn16-4'"),
        (("1", "--teacher-weights", "wrn22-4=t.npz"), "there is no weights file t.npz"),
        (("1", "--dryrun"), "Perhaps you meant: --dry-run"),
    ],
)
def test_mistakes(command, tmp_path, arguments, sentence):
    code, out, err = command(*arguments)
    assert code == 2 and sentence in plain(err) and out == ""
    assert not list(tmp_path.iterdir())


def test_weights_may_be_given_several_times(monkeypatch):
    given = ("--teacher-weights", "wrn22-4=a.npz", "--teacher-weights", "wrn16-4=b=1,c.npz")
    monkeypatch.setattr(sys, "argv", ["x", "3", *given, "--student-weights", "mobilenet-v1=v1.pth"])
    arguments = cli.parse(table.Arguments, "experiments.table", table.__doc__)
    assert arguments.teacher_weights == (("wrn22-4", "a.npz"), ("wrn16-4", "b=1,c.npz"))
    assert arguments.student_weights == (("mobilenet-v1", "v1.pth"),)


def test_help(command):
    code, out, _ = command("--help")
    assert code == 0 and "Examples:" in out and "Pairs of networks" in out and "small" in out
