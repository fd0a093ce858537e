"""Route-constrained optimization: phases with teachers of their own."""

import dataclasses

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
from abflax.taps import run_model
from abflax.training.history import anchor_epochs
from tests.conftest import draw_variables
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
    with pytest.raises(InputError, match="give a workdir"):
        train(None, method="cross-entropy", epochs=(0, 1), resources=kept)


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
