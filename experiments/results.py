"""Rebuild experiments/RESULTS.md, and the README's table, from the committed records.

Nothing is typed by hand: a number stands there because a record under experiments/records says so.

examples:
  python -m experiments.results
  python -m experiments.results --add workdir
      copy the finished CIFAR-10 runs of a workdir into the records first
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from abflax.errors import InputError
from abflax.methods import METHODS
from abflax.record import read_record
from experiments import cli
from experiments.statistics import mean_and_std

HERE = Path(__file__).parent
RECORDS, RESULTS, README = HERE / "records", HERE / "RESULTS.md", HERE.parent / "README.md"
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"
Record = dict[str, Any]


def main(console: Console) -> None:
    description, examples = (__doc__ or "").split("examples:")
    parser = cli.Parser(
        prog="python -m experiments.results",
        description=description,
        epilog="examples:" + examples,
    )
    parser.add_argument("--add", type=Path, metavar="WORKDIR", help="copy its finished runs first")
    arguments = parser.parse_args()
    if arguments.add:
        console.print(f"{add(arguments.add)} records added")
    records = read_all(RECORDS)
    RESULTS.write_text(page(records))
    README.write_text(with_table(README.read_text(), one_plus_one(records)))
    console.print(f"{RESULTS} and {README}, from {len(records)} records", soft_wrap=True)


def add(workdir: Path) -> int:
    """Copies the finished CIFAR-10 runs of a workdir into the records. Returns how many."""
    count = 0
    for path in sorted((workdir / "runs").glob("*/record.json")):
        record = read_record(path)
        if record and record["config"]["dataset"] == "cifar10":
            shutil.copyfile(path, RECORDS / f"{record['hash']}.json")
            count += 1
    return count


def read_all(folder: Path) -> list[Record]:
    """The records of a folder, by name."""
    found = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if record is not None]


def page(records: Sequence[Record]) -> str:
    """The whole of RESULTS.md."""
    return (
        "# Results\n\nRebuilt by `python -m experiments.results` from the records in "
        "`experiments/records`; mean ± sample standard deviation over seeds, (n) of them.\n\n"
        "## One epoch of each phase\n\n" + one_plus_one(records)
    )


def one_plus_one(records: Sequence[Record]) -> str:
    """The first column of the paper's Table 1, at a size that two cores carry."""
    chosen = [
        record
        for record in records
        if _is(
            record,
            dataset="cifar10",
            student="wrn16-1",
            precision="float32",
            protocol="official",
            epochs=[1, 1],
            fraction=1.0,
            batch_size=128,
            options=[],
        )
    ]
    if not chosen:
        return "Not run yet.\n"
    paper = json.loads((HERE / "paper_tables.json").read_text())["1"]
    rows = [
        "| method | test error % | agreement after initialising, layer 1 / 2 / 3, % "
        "| paper: wrn22-4 → wrn16-2 |",
        "| --- | --- | --- | --- |",
    ]
    grouped = _by_method(chosen)
    best = min(grouped, key=lambda method: _mean(grouped[method]))
    for method, runs in grouped.items():
        errors = [run["result"]["test_error"] for run in runs]
        error = f"{mean_and_std(errors)} ({len(runs)})"
        published = paper["rows"].get(method, [None])[0]
        rows.append(
            f"| {method} | {f'**{error}**' if method == best else error} | {_agreement(runs)} "
            f"| {published if published is not None else '–'} |"
        )
    teachers = sorted({run["config"]["teacher"] for run in chosen} - {None})
    devices = sorted({run["environment"]["device"] for run in chosen})
    commits = sorted({str(run["environment"]["commit"])[:12] for run in chosen})
    caption = (
        "CIFAR-10, all 50,000 training images, 1 + 1 epochs (cross-entropy and kd: 2), batch 128, "
        f"protocol `official`, teacher {', '.join(teachers)} (the shipped one), student wrn16-1; "
        f"last epoch. Device: {', '.join(devices)}; commit {', '.join(commits)}. "
        "The paper's column is of larger networks, so its order, not its numbers, is what compares."
    )
    return "\n".join(rows) + f"\n\n{caption}\n"


def with_table(readme: str, table: str) -> str:
    """The README with the table between its two markers."""
    before, rest = readme.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{table}{_END}{after}"


def _is(record: Record, **wanted: Any) -> bool:
    config = record["config"]
    return all(config[key] == value for key, value in wanted.items())


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """method -> its records by seed, in the order of the registry."""
    grouped: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["config"]["seeds"]["weights"]):
        grouped[record["config"]["method"]].append(record)
    for method, runs in grouped.items():
        if len({json.dumps(run["config"] | {"seeds": None}) for run in runs}) > 1:
            raise InputError(f"records of {method} differ in more than their seeds")
    order = {name: index for index, name in enumerate(METHODS)}
    return dict(sorted(grouped.items(), key=lambda item: (order.get(item[0], 99), item[0])))


def _mean(runs: Sequence[Record]) -> float:
    return sum(run["result"]["test_error"] for run in runs) / len(runs)


def _agreement(runs: Sequence[Record]) -> str:
    """Layer by layer, where it is defined; else a dash."""
    layers = sorted(runs[0]["result"].get("initialise_agreement", {}))
    shares = [
        mean_and_std([run["result"]["initialise_agreement"][layer] for run in runs], 1)
        for layer in layers
    ]
    return " / ".join(shares) or "–"


if __name__ == "__main__":
    cli.main(main)
