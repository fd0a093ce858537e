"""`python -m experiments.quickstart --photographs`: what is missing is said, and it trains."""

import json

import numpy as np
import pytest

from abflax import Dataset, Network
from abflax.data import DATASETS, Preprocessing
from abflax.data import registry as data_registry
from abflax.models import MODELS
from experiments import quickstart
from experiments.common import networks
from tests.conftest import draw_variables
from tests.experiments.conftest import plain


def test_what_is_missing_is_said_in_a_sentence(call_command, tmp_path, monkeypatch):
    flags = ("--photographs", "--workdir", tmp_path / "workdir", "--data-dir", tmp_path)
    monkeypatch.setitem(networks.PACKAGED, "efficientnet-lite0", "no_such_package/lite0.pth")
    code, out, err = call_command(quickstart.main, *flags)
    assert (code, out) == (2, "")
    assert plain(err).endswith("come with a package: pip install no_such_package torch")
    teacher = Network(MODELS["efficientnet-lite0"](), {"params": {}, "batch_stats": {}}, "teacher")
    monkeypatch.setattr(quickstart, "find_teacher", lambda *given: teacher)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no TensorFlow
    code, out, err = call_command(quickstart.main, *flags)
    assert code == 2 and "there is no prepared cifar10 in" in plain(err)


@pytest.mark.slow
def test_both_methods_are_trained_and_shown(call_command, tmp_path, monkeypatch):
    model = MODELS["wrn10-1"](num_classes=20)
    teacher = Network(model, draw_variables(model, (32, 32, 3)), "teacher")
    monkeypatch.setattr(quickstart, "find_teacher", lambda *given: teacher)
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    data = Dataset(noise, np.arange(40) % 10, preprocessing=Preprocessing((127.0,), (128.0,), 2))
    monkeypatch.setitem(DATASETS, "cifar10-64", lambda split, data_dir: data)
    data_registry._load.cache_clear()
    changes = {
        "SMALL_STUDENT": "wrn10-1",
        "PER_CLASS": 4,
        "PHOTOGRAPHS_EPOCHS": (1, 1),
        "TESTED": 20,
    }
    for name, value in (*changes.items(), ("PHOTOGRAPHS_EPOCHS", (1, 1))):
        monkeypatch.setattr(quickstart, name, value)
    flags = ("--photographs", "--workdir", tmp_path, "--seeds", "1", "--quiet")
    code, out, err = call_command(quickstart.main, *flags)
    data_registry._load.cache_clear()
    assert code == 0, err
    assert "4 photographs of each of 10 classes" in out
    assert "The error of activation-boundary is" in out
    assert (tmp_path / "quickstart-photographs.png").is_file()
    records = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")]
    assert {record["config"]["method"] for record in records} == {
        "cross-entropy", "activation-boundary",
    }  # fmt: skip
    assert {record["config"]["setting"] for record in records} == {"transfer"}
