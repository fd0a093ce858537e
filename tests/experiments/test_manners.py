"""What a caller in Python is told, and what is left as the caller had it."""

import logging

import jax
import numpy as np
import pytest

from abflax import InputError, Resources, distill, load
from abflax.data import load_image_files
from abflax.errors import local_path
from abflax.runtime.reporter import NullReporter
from experiments import run
from tests.conftest import Small
from tests.experiments.conftest import plain

DIGITS = load("digits", "train").take(np.arange(32))


def _train(workdir, **options):
    return distill(Small(), None, DIGITS, method="cross-entropy", epochs=(0, 1), batch_size=16,
                   workdir=workdir, resources=Resources(devices=1), **options)  # fmt: skip


def test_a_finished_run_says_so_and_logging_stays_as_it_was(tmp_path, caplog):
    absl = logging.getLogger("absl")
    before = absl.level, absl.filters[:]
    absl.setLevel(logging.INFO)
    try:
        first = _train(tmp_path)
        assert not caplog.records  # neither of abflax nor of Orbax
        assert (absl.level, absl.filters) == (logging.INFO, before[1])
        absl.info("of the user")
    finally:
        absl.setLevel(before[0])
    assert [record.getMessage() for record in caplog.records] == ["of the user"]
    caplog.clear()
    assert _train(tmp_path).record == first.record
    (told,) = caplog.records
    name = first.record["hash"]
    assert told.name == "abflax"
    assert told.getMessage() == f"{name} is finished already: {tmp_path / 'runs' / name}"
    caplog.clear()
    _train(tmp_path, reporter=NullReporter())  # which was asked to show nothing
    assert not caplog.records


PLACES = [
    ("gs://bucket/x", "is no path here"), ("s3:/bucket", "is no path here"),
    ("/tmp/\udcff", "is not UTF-8"), ("~nosuchuser/x", "the home of a user who is not known here"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "sentence"), PLACES)
def test_places_that_are_none(call_command, place, sentence):
    with pytest.raises(InputError, match=sentence):
        _train(place)
    with pytest.raises(InputError, match=sentence):
        load_image_files("caltech_birds2011", "train", place)
    code, _, err = call_command(
        run.main, "--dataset", "digits", "--method", "cross-entropy", "--workdir", place
    )
    assert code == 2 and sentence in plain(err)


def test_places_that_are_some(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x") == tmp_path / "x"
    for same in ("c:/x", "a:b/c", "runs", "./gs://"):
        assert str(local_path(same)).startswith(same[:3].removeprefix("./"))


def test_a_name_that_is_too_long(call_command, tmp_path):
    code, _, err = call_command(
        run.main, "--dataset", "digits", "--method", "cross-entropy", "--workdir",
        tmp_path / ("x" * 300),
    )  # fmt: skip
    assert code == 2 and "File name too long" in plain(err) and not list(tmp_path.iterdir())


def test_jaxs_own_checks_do_not_stop_a_run(tmp_path):
    """They are for a caller's code, and stay as they were."""
    with (
        jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
    ):  # fmt: skip
        result = _train(tmp_path, test=DIGITS)
        assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert 0 <= result.record["result"]["test_error"] <= 1


def test_devices_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(RuntimeError("none\nx")))
    with pytest.raises(InputError, match="JAX cannot start on JAX_PLATFORMS=.*: none$"):
        _train(tmp_path)
    assert not list(tmp_path.iterdir())
