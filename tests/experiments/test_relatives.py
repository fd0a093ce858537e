"""The studies of relatives: their data, and the tables of the page."""

import json

import numpy as np
import pytest

from experiments import relatives
from experiments.paper_tables.cells import fill, markdown
from experiments.paper_tables.definitions import TABLES
from experiments.paper_tables.records import committed
from tests.conftest import ROOT


def test_other_domains():
    source, target, tests = relatives.two_domains("inverted")
    assert (len(source), len(target)) == (647, 650)
    assert [len(tests[name]) for name in ("source", "target")] == [500, 500]
    again = relatives.two_domains("inverted")[1]
    assert again.name == target.name and target.name != tests["target"].name
    assert target.images.min() == 0 and target.images.max() == 16
    assert target.images.mean() == pytest.approx(16 - source.images.mean(), abs=0.5)
    assert np.array_equal(tests["source"].labels, tests["target"].labels)
    pale = relatives.two_domains("pale")[1]
    assert np.array_equal(pale.labels, target.labels)
    assert pale.images.mean() == pytest.approx(4 + source.images.mean() / 2, abs=0.5)


@pytest.mark.parametrize("study", ["domains", "methods"])
def test_the_pages_tables_are_the_studies(study):
    summary = json.loads((ROOT / "experiments" / f"relatives_{study}.json").read_text())
    page = (ROOT / "docs" / "relatives.md").read_text()
    assert relatives.page_table(summary) in page
    assert all(len(runs) == len(summary["seeds"]) for runs in summary["records"].values())


@pytest.mark.parametrize("name", ["rco", "bss"])
def test_the_pages_tables_on_cifar_are_the_records(name):
    table, page = TABLES["medium"][name], (ROOT / "docs" / "relatives.md").read_text()
    rows = markdown(fill(table, committed())).split("\n\n")[0]
    assert rows in page and f"table{name}-medium.png" in page
