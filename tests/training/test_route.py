"""Route-constrained optimization: phases with teachers of their own."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from abflax import (
    Dataset,
    InputError,
    Interrupted,
    Network,
    Resources,
    RunConfig,
    Tapped,
    distill,
)
from abflax.losses import knowledge_distillation
from abflax.methods import Phase
from abflax.methods.terms import KnowledgeDistillation
from abflax.runtime.reporter import NullReporter
from abflax.taps import run_model
from abflax.training.history import anchor_epochs
from tests.conftest import draw_variables
from tests.identity import flip
from tests.stopping import StopAt

DRAW = np.random.default_rng(0)
DATA = Dataset(DRAW.standard_normal((16, 4, 4, 1)), np.arange(16) % 4)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, train: bool):
        x = nn.Conv(self.width, (3, 3), name="conv")(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(4)(nn.relu(x).mean(axis=(1, 2)))


MODEL = Tapped(Net(3), {"layer1": "norm"})


def anchor(factor):
    variables = draw_variables(Net(3), (4, 4, 1))
    return Network(MODEL, jax.tree.map(lambda leaf: leaf * factor, variables), f"anchor {factor}")


ROUTE = [anchor(1.0), anchor(2.0)]


def train(teacher=ROUTE, **settings):
    common = {"batch_size": 16, "protocol": "official", "method": "rco",
              "resources": Resources(devices=1)}  # fmt: skip
    return distill(Tapped(Net(2), {"layer1": "norm"}), teacher, DATA, **common | settings)


def test_each_phase_has_its_teacher():
    """One step each: the second begins where a run with the first anchor ends."""
    result = train(epochs=(1, 1))
    history = result.record["history"]
    assert [entry["phase"] for entry in history] == ["joint 1", "joint 2"]
    first = train(ROUTE[0], method="kd", epochs=(0, 1))
    assert history[0]["loss"] == first.record["history"][0]["loss"]
    student = {"params": first.variables["params"], "batch_stats": first.variables["batch_stats"]}
    images = DATA.images.astype(np.float32)
    ours = run_model(Net(2), student, images, train=True).logits
    for teacher, same in zip(ROUTE, (False, True), strict=True):
        theirs = run_model(teacher.model, teacher.variables, images, train=False).logits
        loss = float(knowledge_distillation(ours, theirs, 3.0).mean())
        assert (loss == pytest.approx(history[1]["loss"], rel=1e-5)) == same


@pytest.mark.slow
def test_activation_boundaries_along_the_route_resume_with_the_same_bits(tmp_path):
    settings = {"method": "activation-boundary", "epochs": (2, 3)}
    whole = train(**settings)
    assert [entry["phase"] for entry in whole.record["history"]] == [
        "initialise 1", "classify 1", "initialise 2", "classify 2", "classify 2"
    ]  # fmt: skip
    with pytest.raises(Interrupted, match="classify 2"):
        train(**settings, workdir=tmp_path, reporter=StopAt(4))
    again = train(**settings, workdir=tmp_path)
    chex.assert_trees_all_equal(again.variables, whole.variables)
    assert again.record["hash"] == whole.record["hash"]
    config = RunConfig.from_json(again.record["config"])
    assert config.hash == again.record["hash"] and config.anchors == ("anchor 1.0",)


def test_anchors_are_kept(tmp_path):
    kept = Resources(devices=1, keep_anchors=2)
    result = train(None, method="cross-entropy", epochs=(0, 5), workdir=tmp_path, resources=kept)
    names = [path.name for path in sorted((result.directory / "anchors").iterdir())]
    assert names == ["000002.safetensors", "000005.safetensors"]
    final = (result.directory / "student.safetensors").read_bytes()
    assert (result.directory / "anchors" / names[-1]).read_bytes() == final
    kept = Resources(devices=1, keep_anchors=1)
    train(None, method="cross-entropy", epochs=(0, 5), workdir=tmp_path, resources=kept, force=True)
    left = [path.name for path in (result.directory / "anchors").iterdir()]
    assert left == ["000005.safetensors"]  # none of the training before
    assert anchor_epochs([5, 10, 15, 20], 3) == {5, 15, 20}
    with pytest.raises(InputError, match="5 anchors .* of 20 epochs .* 4 times, which gives 4"):
        anchor_epochs([5, 10, 15, 20], 5)
    with pytest.raises(InputError, match="give a workdir"):
        train(None, method="cross-entropy", epochs=(0, 1), resources=kept)


class Notes(NullReporter):
    """Collects what is said."""

    def __init__(self):
        self.notes = []

    def finished(self, note=""):
        self.notes.append(note)


def kept(count, workdir, epochs=4, **settings):
    resources = Resources(devices=1, keep_anchors=count, checkpoint_seconds=0.0)
    common = {"method": "cross-entropy", "workdir": workdir, "resources": resources}
    return train(None, epochs=(0, epochs), **common | settings)


def anchors_in(directory):
    return sorted(int(path.stem) for path in (directory / "anchors").glob("*"))


def test_a_finished_run_without_the_anchors_is_not_served(tmp_path):
    directory = kept(2, tmp_path).directory
    assert anchors_in(directory) == [2, 4]
    assert kept(1, tmp_path).directory == kept(0, tmp_path).directory == directory
    record = json.loads((directory / "record.json").read_text())
    assert list(record["anchors"]) == ["2", "4"] and record["anchors"]["4"] == record["weights"]
    with pytest.raises(InputError, match=r"did not keep its student after epochs 1, 3, .* --force"):
        kept(4, tmp_path)
    with pytest.raises(InputError, match="5 anchors are asked for of a run of 4 epochs"):
        kept(5, tmp_path)
    file = directory / "anchors" / "000002.safetensors"
    flip(file, 8 * len(file.read_bytes()) - 9)
    with pytest.raises(InputError, match="did not keep its student after epoch 2, "):
        kept(2, tmp_path)
    with pytest.raises(InputError, match="3 anchors are asked for of a run of 2 epochs"):
        kept(3, tmp_path / "short", epochs=2)
    assert anchors_in(kept(4, tmp_path, force=True).directory) == [1, 2, 3, 4]


def test_a_resumed_run_keeps_all_anchors_or_says_so(tmp_path):
    for workdir, count in ((tmp_path / "none", 0), (tmp_path / "all", 4)):
        with pytest.raises(Interrupted):
            kept(count, workdir, reporter=StopAt(2))
    with pytest.raises(InputError, match=r"after epochs 1, 2, .*: remove .* to begin anew"):
        kept(4, tmp_path / "none")
    assert anchors_in(kept(4, tmp_path / "all").directory) == [1, 2, 3, 4]


def test_a_grown_run_keeps_the_anchors_of_its_beginning(tmp_path):
    """It begins anew where the shorter one did not keep them, and says so."""
    constant = {"protocol": "paper", "schedule": "constant"}
    alone = kept(0, tmp_path / "alone", **constant)
    for workdir, count in ((tmp_path / "none", 0), (tmp_path / "all", 2)):
        reporter = Notes()
        kept(count, workdir, epochs=2, **constant)
        grown = kept(4, workdir, reporter=reporter, **constant)
        assert anchors_in(grown.directory) == [1, 2, 3, 4]
        assert list(grown.record["anchors"]) == ["1", "2", "3", "4"]
        assert ("grown_from" in grown.record) == (count > 0)
        assert ("did not keep the anchors" in " ".join(reporter.notes)) == (count == 0)
        chex.assert_trees_all_equal(grown.variables, alone.variables)


def test_what_cannot_be_right():
    with pytest.raises(InputError, match="at least one"):
        train([], epochs=(0, 1))
    with pytest.raises(InputError, match="follows from the arguments"):
        train(epochs=(0, 1), anchors=("other",))
    with pytest.raises(InputError, match=r"teacher 0 of 2 \(from 0\) has no epoch"):
        train(epochs=(0, 1))
    of_first = Phase("joint", [(1.0, KnowledgeDistillation())])
    with pytest.raises(InputError, match="teacher 1 of 2 .* has no epoch"):
        train(method=[of_first], epochs=(2,))
    for index in (-1, 1):
        with pytest.raises(InputError, match=f"phase joint follows teacher {index}; .* 0 to 0"):
            train(ROUTE[0], method=[dataclasses.replace(of_first, teacher=index)], epochs=(1,))
    assert RunConfig("digits", "net", "teacher").anchors is None
