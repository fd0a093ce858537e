"""README and RESULTS.md say what the committed records say."""

from abflax.config import RunConfig
from experiments.archive import RECORDS, committed
from experiments.results import FIGURES, README, RESULTS, begun, overview, page, with_table


def test_results_are_rebuilt_byte_for_byte():
    records = committed()
    assert RESULTS.read_text() == page(records)
    readme = README.read_text()
    assert readme == with_table(readme, overview(records))


def test_every_table_has_its_picture():
    names = {
        f"table{each.table.name}-{each.table.scale}.png"
        for each in begun(committed())
        if each.table.picture
    }
    assert {path.name for path in FIGURES.iterdir()} == names


def test_records_are_named_by_their_configuration():
    for name, record in committed().items():
        assert RunConfig.from_json(record["config"]).hash == name
        assert (RECORDS / f"{name}.json").is_file()
