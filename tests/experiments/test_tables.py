"""Tables: what they hold, what they say of records, and how they are shared out."""

import dataclasses
import itertools
import json

import pytest

from abflax import InputError
from abflax.config import RunConfig
from experiments.common import plots
from experiments.common.stats import Difference, paired_difference
from experiments.paper_tables import cost, figures
from experiments.paper_tables import records as stored
from experiments.paper_tables.cells import best, fill, identities, markdown, missing, order
from experiments.paper_tables.definitions import EVERY_METHOD, TABLES
from experiments.paper_tables.plan import Job, group_jobs, jobs, share
from experiments.paper_tables.spec import Axis, Point, agreement, dead_neurons
from tests.tiny_tables import GRID, ROUTE, TABLE, record, run_of


def _records(errors, table=GRID, **changes):
    """{(row, column): errors by seed} -> records."""
    return dict(
        record(run_of(table, row, column), seed, error, **changes)
        for (row, column), values in errors.items()
        for seed, error in enumerate(values)
    )


ERRORS = {
    ("cross-entropy", "1+1"): (0.30, 0.32),  # 31 ± 1.41
    ("kd", "1+1"): (0.27, 0.28),  # 27.5 ± 0.71: the paper has it behind cross-entropy
    ("activation-boundary", "1+1"): (0.285, 0.255, 0.27),  # 27 ± 1.5
    ("cross-entropy", "1+5"): (0.10,),
}
TAUGHT = "wrn16-2:0123456789ab"


def test_markdown_to_the_letter():
    filled = fill(GRID, _records(ERRORS))
    assert markdown(filled) == (
        "| method \\ epochs | 1+1 | 1+5 |\n"
        "| --- | ---: | ---: |\n"
        "| cross-entropy | 43.37 │ 31.00 ± 1.41 (2) | 17.72 │ 10.00 (1) |\n"
        "| kd | 48.42 │ 27.50 ± 0.71 (2) | – │ not run |\n"
        "| attention | 37.66 │ not run | – │ – |\n"
        "| activation-boundary | 16.39 │ **27.00 ± 1.50** (3) | – │ – |\n\n"
        "activation-boundary beats kd by 0.50 ± 25.41 points (n = 2, undecided), cross-entropy by "
        "4.00 ± 31.77 points (n = 2, undecided).\n\n"
        "Pairs that have the paper's order here: 0 of 3; 0 reversed; 3 undecided.\n\n"
        "Test error, %: paper │ here, mean ± sample standard deviation (number of seeds), last "
        "epoch; the best in bold.\n\n"
        "<details><summary>Where the numbers come from</summary>\n\n"
        "Here, scale `small`: digits, wrn10-1 → wrn10-1; protocol `official`, batch 13. Paper: "
        "wrn22-4 → wrn16-2. The paper's numbers are of larger networks, more epochs and other "
        "shares of the data. So only the order of the methods can be compared. "
        "Transfer weights were searched for wrn16-2 → wrn16-1 and all layers. Teacher: "
        "wrn10-1:0123456789ab. Device: abacus. Commit: 0123456789ab+.\n\n</details>\n\n"
        "Not run yet: 2 of 6 cells; begun, with fewer than 2 seeds: 1. `python -m "
        "experiments.table 1 --scale small --rows cross-entropy,kd,attention`\n"
    )


def test_seeds_that_diverged_are_told():
    lost = _records({("cross-entropy", "1+1"): (0, 0, 0), ("kd", "1+1"): (0, 0)})
    records = _records(ERRORS)
    for each in _records({("kd", "1+1"): (0,)}):
        del records[each]
    del lost[list(lost)[-1]]  # the other seed has a number
    filled = fill(GRID, records, diverged=lost)
    assert "| cross-entropy | 43.37 │ 31.00 ± 1.41 (2; 1 diverged) |" in markdown(filled)
    assert "| kd | 48.42 │ 28.00 (1; 1 diverged) |" in markdown(filled)
    assert "Not run yet: 2 of 6 cells; begun, with fewer than 2 seeds: 1." in missing(filled)
    assert "| kd | 48.42 │ diverged (1) | – │ not run |" in markdown(fill(GRID, {}, diverged=dict(
        _records({("kd", "1+1"): (0,)}))))  # fmt: skip


def test_nothing_and_a_single_seed():
    assert order(fill(GRID, {})) == ""
    assert missing(fill(GRID, {})).startswith("Not run yet: 6 of 6 cells. `")
    once = {("cross-entropy", "1+1"): (0.3,), ("kd", "1+1"): (0.4, 0.4)}
    assert order(fill(GRID, _records(once))) == (
        "cross-entropy beats kd by 10.00 points (n = 1).\n\n"
        "Pairs that have the paper's order here: 0 of 1; 0 reversed; 1 undecided."
    )


@pytest.mark.parametrize(
    ("kd", "verdict"),
    [
        ((0.36, 0.39), "1 of 1; 0 reversed; 0 undecided"),
        ((0.30, 0.33), "0 of 1; 0 reversed; 1 undecided"),
        (
            (0.20, 0.22),
            "0 of 1; 1 reversed (kd before cross-entropy at 1+1); 0 undecided",
        ),
    ],
)
def test_verdicts(kd, verdict):
    errors = {("cross-entropy", "1+1"): (0.30, 0.32), ("kd", "1+1"): kd}
    text = order(fill(GRID, _records(errors)))
    assert text.endswith(f"Pairs that have the paper's order here: {verdict}.")


def test_several_groups_name_the_next_best_alone():
    errors = {
        ("cross-entropy", "1+1"): (0.3,), ("kd", "1+1"): (0.4,), ("attention", "1+1"): (0.5,),
        ("cross-entropy", "1+5"): (0.2,), ("kd", "1+5"): (0.1,),
    }  # fmt: skip
    assert order(fill(GRID, _records(errors))).startswith(
        "1+1: cross-entropy beats kd by 10.00 points (n = 1); "
        "1+5: kd beats cross-entropy by 10.00 points (n = 1).\n\n"
    )


def test_paired_differences():
    """Student's own example: the sleep of ten patients under two drugs, 1908."""
    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    second = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = paired_difference(first, second)
    assert (found.mean, found.pairs, found.sign) == (pytest.approx(-1.58), 10, -1)
    assert found.half_width == pytest.approx(2.262157 * 1.229995 / 10**0.5, rel=1e-5)
    assert paired_difference(second, first).sign == 1
    # Seeds without a partner do not count; one pair has no interval.
    assert paired_difference({0: 0.5, 1: 0.1}, {0: 0.25, 2: 0.9}) == Difference(0.25, None, 1)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


def test_best_is_the_largest_where_larger_is_better_and_both_where_equal():
    rows = Axis("of", (Point("layer1", measure=agreement("layer1")),))
    columns = Axis("method", (Point("l2", {"method": "l2"}), Point("l1", {"method": "l1"})))
    table = dataclasses.replace(GRID, rows=rows, columns=columns, competing="columns", paper={})
    for second, winners in ((0.8, ["l2"]), (0.9, ["l1"]), (0.875, ["l2", "l1"])):
        history = [{"phase": "initialise", "agreement": {"layer1": second}}]
        records = dict([
            record(run_of(table, "layer1", "l2"), 0, 0.1),  # 0.875
            record(run_of(table, "layer1", "l1"), 0, 0.1, history=history),
        ])  # fmt: skip
        (group,) = fill(table, records).groups
        assert [cell.column.label for cell in best(group)] == winners
    assert "| layer1 | **87.5** (1) | **87.5** (1) |" in markdown(fill(table, records))


def test_a_number_that_a_method_does_not_have_is_a_dash():
    history = [{"phase": "joint", "agreement": {}}]
    point = Point("inside", measure=agreement("layer1"))
    table = dataclasses.replace(GRID, columns=Axis("of", (point,)), paper={})
    records = dict([record(run_of(table, "kd", "inside"), 0, 0.1, history=history)])
    assert "| kd | – |" in markdown(fill(table, records))


def test_records_that_lack_something_are_refused_by_name():
    table = dataclasses.replace(
        TABLE, columns=Axis("of", (Point("silent", measure=dead_neurons("layer1")),))
    )
    name, made = record(run_of(table, "activation-boundary", "silent"), 0, 0.1)
    with pytest.raises(InputError, match=f"record {name} has no entry 'silent'"):
        fill(table, {name: made})
    name, made = record(run_of(TABLE, "cross-entropy", "1+1"), 0, 0.1, result={})
    with pytest.raises(InputError, match=f"record {name} has no test error"):
        fill(TABLE, {name: made})


def test_two_teachers_do_not_share_a_table():
    errors = {("kd", "1+1"): (0.1, 0.2)}
    records = _records(errors) | _records(errors, teacher="wrn10-1:ffffffffffff")
    with pytest.raises(InputError, match="wrn10-1:0123456789ab and wrn10-1:ffffffffffff"):
        fill(GRID, records)
    known = {"wrn10-1": "wrn10-1:ffffffffffff"}
    (cell,) = [c for c in fill(GRID, records, known).cells.values() if c.records]
    assert {r["config"]["teacher"] for r in cell.records} == {"wrn10-1:ffffffffffff"}
    assert identities(GRID, _records(errors), {}) == {"wrn10-1": "wrn10-1:0123456789ab"}


def test_files_that_are_no_records_are_refused_by_name(tmp_path):
    name, made = record(run_of(TABLE, "cross-entropy", "1+1"), 0, 0.1)
    (tmp_path / f"{name}.json").write_text(json.dumps(made))
    assert stored.committed(tmp_path) == {name: made}
    (tmp_path / "other.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match=rf"other.json holds the record of another run, {name}"):
        stored.committed(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="other.json is no record of schema 1"):
        stored.committed(tmp_path)


def test_the_papers_numbers():
    paper = {name: table.paper for name, table in TABLES["paper"].items()}
    assert paper["1"]["activation-boundary", "1+1"] == 16.39
    assert paper["2"]["cross-entropy", "0.1%"] == 73.83
    assert paper["3"]["tiny network", "kd"] == 29.57
    assert paper["6"]["kd", "layer2"] == 21.21 and paper["6"]["jacobian", "layer3"] == 23.61
    assert paper["7"]["layer3", "l0.5"] == 56.4 and paper["7"]["error", "l2"] == 10.1
    assert paper["8"]["activation-boundary", "4"] == 11.7
    for table in TABLES["paper"].values():  # every number of the paper has its cell
        assert set(table.paper) <= set(fill(table, {}).cells)


def test_cells_of_different_tables_are_the_same_runs():
    tables = TABLES["paper"]
    central = run_of(tables["2"], "activation-boundary", "10%")
    for name, row, column in (
        ("3", "depth & channel", "activation-boundary"),
        ("6", "activation-boundary", "all"),
        ("8", "activation-boundary", "1"),
    ):
        assert run_of(tables[name], row, column).hash == central.hash
    full, subset = run_of(tables["1"], "kd", "20+100"), run_of(tables["2"], "kd", "100%")
    assert full.hash == subset.hash
    layers = [run_of(tables["6"], "kd", layer).hash for layer in ("layer1", "layer2", "all")]
    assert len(set(layers)) == 1
    fitnet = RunConfig("cifar10", "wrn16-2", "wrn22-4", "fitnet", fraction=0.1)
    assert run_of(tables["6"], "fitnet", "layer3").hash == fitnet.hash
    assert run_of(tables["6"], "fitnet", "all").hash != fitnet.hash
    assert run_of(tables["1"], "cross-entropy", "1+1").teacher is None


def test_scales_do_not_mix():
    small, paper = (
        {run.hash for table in TABLES[scale].values() for run in table.runs}
        for scale in ("small", "paper")
    )
    assert not small & paper


def test_steps():
    def steps(scale, name, row, column):
        (job,) = jobs([TABLES[scale][name].select([row], [column])], [0], ("wrn22-4", "wrn16-2"))
        return job.steps

    assert steps("paper", "1", "kd", "20+100") == {"joint": 46875}
    assert steps("paper", "2", "fitnet", "10%") == {"initialise": 781, "classify": 3906}
    # 50 images: 10,000 epochs of them are 3,906.25 batches
    assert steps("paper", "2", "fitnet", "0.1%") == {"initialise": 781, "classify": 3906}
    for column in ("10%", "20%", "100%"):
        assert sum(steps("small", "2", "attention", column).values()) == 781


def test_seed_by_seed_with_each_teacher_right_before_the_first_table_that_needs_it():
    paper = [table for table in TABLES["paper"].values() if table.run.dataset == "cifar10"]
    plan = jobs(paper, range(5))
    assert [job.run.student for job in plan if job.teaches] == ["wrn22-4", "wrn16-4"]
    assert [job.seed for job in plan if not job.teaches] == sorted(
        job.seed for job in plan if not job.teaches
    )
    starts = [index for index, job in enumerate(plan) if job.teaches]
    assert starts == [0, len(jobs(paper[:2], [0]))]
    assert plan[0].steps == {"joint": 78125} and plan[0].seed == 1000
    assert len(plan) == 2 + 5 * len({run.hash for table in paper for run in table.runs})
    assert not any(job.teaches for job in jobs(paper, [0], ("wrn22-4", "wrn16-4")))
    alone = jobs([TABLES["paper"]["1"].select(["cross-entropy"])], [0])
    assert len(alone) == 6 and not any(job.teaches for job in alone)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_every_run_is_in_exactly_one_share(count):
    plan = jobs(list(TABLES["paper"].values()), range(5))
    shares = [share(plan, index, count) for index in range(1, count + 1)]
    found = sorted((job.run.hash, job.seed) for each in shares for job in each)
    assert found == sorted((job.run.hash, job.seed) for job in plan)
    assert len(found) == len(set(found))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("scale", "protocol"), [("small", "official"), ("paper", "paper")])
def test_grouped_runs_have_the_same_batches_and_teacher(scale, protocol):
    tables = [each for each in TABLES[scale].values() if each.teacher_run]
    plan = jobs([each for each in tables if each.run.protocol == protocol], range(2))
    assert group_jobs(plan, 1) == tuple((job,) for job in plan)
    found = group_jobs(plan, 4)
    assert sorted(map(repr, itertools.chain(*found))) == sorted(map(repr, plan))
    assert max(map(len, found)) == 4 and all(
        len({*map(_batches_and_teacher, each)}) == 1 for each in found
    )
    methods = {frozenset(job.run.method for job in each) for each in found}
    # KD alone has no phase in which the teacher drifts; protocol paper has none at all.
    mixed = any({"kd", "activation-boundary"} <= each for each in methods)
    assert mixed == (protocol == "paper")


def _batches_and_teacher(job):
    return job.seed, job.teaches, job.run.teacher, job.run.fraction, job.run.batch_size


def test_seconds_are_those_of_the_records_by_the_arithmetic():
    run = run_of(TABLE, "activation-boundary", "1+1")
    other = [
        {"name": "initialise", "steps": 4, "seconds": 20.0},
        {"name": "classify", "steps": 4, "seconds": 4.0},
    ]
    records = dict([record(run, 0, 0.1), record(run, 1, 0.1, phases=other)])
    known = cost.rates(records, "abacus")  # of a step: 3 and 5 s; 1 and 1 s
    assert cost.rates(records, "quill") == {}
    attention = dataclasses.replace(run, method="attention")
    slower = {"environment": {"device": "quill"}}
    elsewhere = dict([record(run, 2, 0.1, **slower), record(attention, 2, 0.1, **slower)])
    lent = cost.rates(records | elsewhere, "abacus")  # quill takes 3 and 1 s, not 4 and 1, for both
    assert lent["digits", "attention", "classify"] == pytest.approx(
        known["digits", "activation-boundary", "classify"] * (1 + 4 / 3) / 2
    )
    assert cost.measured(records | elsewhere, "abacus") == known
    both = {name: each | {"environment": each["environment"] | {"abreast": 2}}
            for name, each in records.items()}  # fmt: skip
    assert cost.rates(both, "abacus") == {}  # whose seconds they are is not known
    plain, taught = jobs([TABLE], [7], ("wrn10-1",))
    assert taught.steps == {"initialise": 5, "classify": 5}
    assert cost.seconds(taught, known) == pytest.approx(5 * 4.0 + 5 * 1.0)
    # cross-entropy has no record: 10 steps at the median, without the teacher's quarter of one
    assert cost.seconds(plain, known) == pytest.approx(10 * 2.5 * 0.75)
    assert cost.seconds(plain, {}) is None
    assert cost.total([plain, taught], known) == (pytest.approx(43.75), 0)
    assert cost.total([plain, taught], {}) == (0, 2)
    wide = Job(dataclasses.replace(run, student="wrn10-2"), 0, taught.examples)
    assert (
        2 < cost.seconds(wide, known) / cost.seconds(taught, known) < 4
    )  # of 1 + 3: to 1 + 3 * 3.5


def test_a_share_does_not_follow_a_method():
    plan = [f"{method} {seed}" for seed in range(7) for method in "abcdefg"]
    for index in range(1, 8):
        assert len({name[0] for name in share(plan, index, 7)}) == 7


def test_select():
    table = TABLES["paper"]["3"].select(rows=["same network", "depth"], methods=["kd"])
    assert list(fill(table, {}).cells) == [("depth", "kd"), ("same network", "kd")]
    for chosen, sentence in (
        ({"rows": ["dept"]}, "unknown row of table 3 'dept'; did you mean depth?"),
        ({"columns": ["kdd"]}, "unknown column of table 3 'kdd'; did you mean kd?"),
        ({"methods": ["cross-entropy"]}, "unknown method of table 3 'cross-entropy'"),
    ):
        with pytest.raises(InputError, match=sentence.replace("?", r"\?")):
            TABLES["paper"]["3"].select(**chosen)
    with pytest.raises(InputError, match="table 1, scale small, has no cell there"):
        TABLES["small"]["1"].select(rows=["fitnet"], columns=["1+5"])


def test_the_commands_of_missing_cells_are_right():
    small = TABLES["small"]
    command = "python -m experiments.table"
    # The rows of Table 7 are readings of the same runs.
    assert (
        missing(fill(small["7"], {})) == f"Not run yet: 28 of 28 cells. `{command} 7 --scale small`"
    )
    records = dict(
        record(run_of(small["3"], row, column), seed, 0.1, TAUGHT)
        for row in ("depth", "channel")
        for column in ("kd", "attention", "activation-boundary")
        for seed in (0, 1)
    )
    rows = f"`{command} 3 --scale small --rows 'depth & channel'"
    assert missing(fill(small["3"], records)) == f"Not run yet: 3 of 9 cells. {rows}`"
    chosen = small["3"].select(["depth & channel", "depth"], ["kd"])
    rows = rows.replace("'depth & channel'", "'depth & channel' --columns kd")
    assert missing(fill(chosen, records)) == f"Not run yet: 1 of 2 cells. {rows}`"
    once = dict([record(run_of(small["8"], "activation-boundary", "1"), 0, 0.1, TAUGHT)])
    assert missing(fill(small["8"].select(columns=["1"]), once)) == (
        "Not run yet: 0 of 1 cells; begun, with fewer than 2 seeds: 1. "
        f"`{command} 8 --scale small --columns 1`"
    )
    run = run_of(small["1"], "cross-entropy", "1+1")
    records = dict(record(run, seed, 0.1) for seed in (0, 1))
    assert missing(fill(EVERY_METHOD, records)).endswith(
        f"`{command} methods --scale small --rows "
        "kd,fitnet,fsp,attention,jacobian,activation-boundary,l2,l1,l0.5,nst,dtl`"
    )


def test_pictures_show_the_numbers(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(plots, "points", lambda *a: seen.update(panels=a[0], names=a[1]))
    records = dict(
        record(run_of(TABLES["small"]["8"], "activation-boundary", margin), seed, error, TAUGHT)
        for margin, errors in {"1": (0.2, 0.22), "4": (0.1,)}.items()
        for seed, error in enumerate(errors)
    )
    figures.draw(fill(TABLES["small"]["8"], records), tmp_path / "picture.png")
    here, paper = seen["panels"]
    assert [place for _, place in here.places] == [0.75, 1.0, 1.5, 2.0, 4.0]
    _, one, *_, four = here.series["activation-boundary"]
    assert one == pytest.approx((21.0, 1.41421356)) and four == (pytest.approx(10.0), None)
    assert paper.series["activation-boundary"][0] == (13.9, None)


def test_a_picture_of_rows_has_the_first_measure(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(plots, "rows", lambda *a: seen.extend(a))
    table, records = TABLES["small"]["relatives"], {}
    for method, errors in {"kd": (0.2, 0.22), "ofd": (0.1,)}.items():
        for seed, error in enumerate(errors):
            records |= dict([record(run_of(table, method, "test error"), seed, error, TAUGHT)])
    figures.draw(fill(table, records), tmp_path / "picture.png")
    numbers, sources, *_, label = seen
    assert numbers["kd"] == (pytest.approx((21.0, 1.41421356)), None)
    assert numbers["ofd"] == ((10.0, None), None) and numbers["sp"] == (None, None)
    assert sources == ("here", "paper") and label == "test error, %"


def test_pictures_are_drawn(tmp_path):
    for name in ("curves", "points", "rows"):
        table = dataclasses.replace(GRID, picture=name)
        figures.draw(fill(table, _records(ERRORS)), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_route_is_one_teachers_run_and_its_records_name_its_anchors():
    names, identities_ = ("wrn10-1@1", "wrn10-1@2"), ("wrn10-1:" + "1" * 12, "wrn10-1:" + "2" * 12)
    assert ROUTE.teachers == names
    teacher, *students = jobs([ROUTE], [0])
    assert (teacher.run.student, teacher.anchors, teacher.taught) == ("wrn10-1", names, names)
    kd, rco = students
    assert kd.configuration({names[1]: identities_[1]}).teacher == identities_[1]
    assert rco.configuration({names[1]: identities_[1]}) is None
    known = dict(zip(names, identities_, strict=True))
    assert rco.configuration(known).anchors == identities_[:1]
    run = dataclasses.replace(run_of(ROUTE, "rco", "1+1"), anchors=identities_[:1])
    records = dict([record(run, 0, 0.3, identities_[1])])
    assert identities(ROUTE, records, {}) == known
    assert "| rco | 30.00 (1) |" in markdown(fill(ROUTE, records))
