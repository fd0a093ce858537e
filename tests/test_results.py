"""README and RESULTS.md say what the committed records say."""

from experiments.results import README, RECORDS, RESULTS, one_plus_one, page, read_all, with_table


def test_results_are_rebuilt_byte_for_byte():
    records = read_all(RECORDS)
    assert RESULTS.read_text() == page(records)
    readme = README.read_text()
    assert readme == with_table(readme, one_plus_one(records))


def test_records_are_named_by_their_configuration():
    from abflax.config import RunConfig, Seeds

    for record in read_all(RECORDS):
        config = dict(record["config"])
        config["seeds"] = Seeds(**config["seeds"])
        config["epochs"] = tuple(config["epochs"])
        config["options"] = tuple(tuple(each) for each in config["options"])
        assert RunConfig(**config).hash == record["hash"]
        assert (RECORDS / f"{record['hash']}.json").is_file()
