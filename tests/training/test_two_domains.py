"""Joint distillation and adaptation: a second domain, and a teacher that is trained along."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from abflax import (
    Dataset,
    InputError,
    Interrupted,
    Network,
    Resources,
    Tapped,
    distill,
    distill_group,
)
from abflax.data import normalize
from abflax.losses import cross_entropy, knowledge_distillation, maximum_mean_discrepancy
from abflax.methods import METHODS, Phase, bind
from abflax.methods.terms import BoundarySupport, TeacherCrossEntropy
from abflax.models.network import configure_model
from abflax.taps import run_model, sow_features
from tests.conftest import draw_variables
from tests.stopping import StopAt

DRAW, SHAPE = np.random.default_rng(0), (4, 4, 1)
SOURCE = Dataset(DRAW.standard_normal((16, *SHAPE)), np.arange(16) % 4)
TARGET = Dataset(1 - DRAW.standard_normal((24, *SHAPE)))
TEST = Dataset(TARGET.images[:8], np.arange(8) % 4)


class Net(nn.Module):
    width: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train: bool):
        x = nn.Conv(self.width, (3, 3), name="conv")(images)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name="norm")(x)
        pooled = nn.relu(x).mean(axis=(1, 2))
        sow_features(self, pooled)
        return nn.Dense(4)(pooled)


def tapped(width):
    return Tapped(Net(width), {"layer1": "norm"})


TEACHER = Network(tapped(3), draw_variables(Net(3), SHAPE), "drawn")


def train(target=TARGET, teacher=TEACHER, **settings):
    common = {"batch_size": 8, "method": "progressive-uda", "epochs": (0, 2), "test": TEST,
              "resources": Resources(devices=1)}  # fmt: skip
    return distill(tapped(2), teacher, SOURCE, target_data=target, **common | settings)


def test_unlabelled_data_may_be_replaced():
    data = Dataset(np.zeros((4, 8, 8, 1), np.uint8))
    other = dataclasses.replace(data, images=data.images[:3] + 1)
    assert (len(other), other.num_classes) == (3, 0) and other.name != data.name
    with pytest.raises(InputError, match="num_classes must be a whole number above 0, not 0"):
        dataclasses.replace(data, labels=np.zeros(4, int))


def test_unlabelled_data_are_for_that_alone():
    assert TARGET.num_classes == 0 and TARGET.take(np.arange(2)).labels.tolist() == [-1, -1]
    assert TARGET.name != Dataset(TARGET.images[::-1]).name
    for settings, says in (
        ({"target": None}, "needs target_data"),
        ({"method": "kd"}, "does not read target_data"),
        ({"test": TARGET}, "the test data have no labels"),
        ({"target": Dataset(np.zeros((2, 5, 4, 1)))}, r"target images have shape \(5, 4, 1\)"),
        ({"teacher": None}, "needs a teacher"),
    ):
        with pytest.raises(InputError, match=says):
            train(**settings)
    with pytest.raises(InputError, match="the training data have no labels"):
        distill(tapped(2), None, TARGET, method="cross-entropy")
    with pytest.raises(InputError, match="trains its teacher, so no view is made by it"):
        Phase("joint", [(1.0, TeacherCrossEntropy()), (1.0, BoundarySupport())])


def test_one_step_is_the_papers(x64):
    """The objective by hand, from two passes of each network, and the gradient of the teacher."""
    model, teacher = (configure_model(tapped(width), "float64", None) for width in (2, 3))
    (phase,) = METHODS["progressive-uda"]()
    objective = bind(model, teacher, phase, SHAPE, epochs=2)
    theirs = jax.tree.map(jnp.float64, draw_variables(Net(3), SHAPE))
    params, state = objective.init(jax.random.key(0), teacher=theirs)
    source, target = (normalize(each.images[:8], each.preprocessing) for each in (SOURCE, TARGET))
    labels = SOURCE.labels[:8]
    targets = objective.targets(theirs, source, labels, None, target)

    def passes(net, variables):
        first = run_model(net, variables, source, train=True)
        return first, run_model(
            net, {"params": variables["params"], **first.state}, target, train=True
        )

    def by_hand(params, step):
        ours = passes(model, {"params": params["student"], **state["student"]})
        moved = passes(teacher, {"params": params["teacher"], **state["teacher"]})
        kd = [
            400 * knowledge_distillation(t.logits, s.logits, 20.0).mean()
            for s, t in zip(ours, moved, strict=True)
        ]
        own = 0.3 * kd[0] + 0.7 * cross_entropy(ours[0].logits, labels).mean() + kd[1]
        discrepancy = maximum_mean_discrepancy(moved[0].features, moved[1].features).mean()
        beta, gamma = 0.1 * 3**step, 2 / (1 + np.exp(-10)) - 1
        adapt = cross_entropy(moved[0].logits, labels).mean() + gamma * discrepancy
        stats = {"student": ours[1].state, "teacher": moved[1].state}
        return beta * own + (1 - beta) * adapt, stats

    for step in (0, 1):  # each an epoch
        expected, gradients = jax.value_and_grad(by_hand, has_aux=True)(params, step)
        found, own = jax.value_and_grad(
            lambda params, step=step: objective.loss(
                params, state, targets, source, labels, step=step
            ),
            has_aux=True,
        )(params)
        chex.assert_trees_all_close(found[0], expected[0], rtol=1e-12)
        after = {name: found[1][0][name] for name in ("student", "teacher")}
        chex.assert_trees_all_close(after, expected[1], rtol=1e-12)
        chex.assert_trees_all_close(own, gradients, rtol=1e-9, atol=1e-12)
        assert optax.tree.norm(own["teacher"]["conv"]) > 1e-3


def test_the_moving_teacher_is_measured():
    entries = train().record["history"]
    assert all(0 <= entry["teacher_test_error"] <= 1 for entry in entries)
    kd = train(None, method="kd").record
    assert "teacher_test_error" not in kd["history"][-1] and "target_data" not in kd["phases"][0]


def test_a_stopped_run_resumes_with_the_same_bits_and_other_data_are_refused(tmp_path):
    whole = train()
    with pytest.raises(Interrupted, match="joint"):
        train(workdir=tmp_path, reporter=StopAt(3))
    again = train(workdir=tmp_path)
    chex.assert_trees_all_equal(again.variables, whole.variables)
    assert again.record["history"] == whole.record["history"]
    assert again.record["config"]["target_data"] == TARGET.name
    other = Dataset(TARGET.images + 1)
    object.__setattr__(other, "name", TARGET.name)
    with pytest.raises(InputError, match="another target images"):
        train(other, workdir=tmp_path)
    assert train(Dataset(TARGET.images + 1)).record["hash"] != whole.record["hash"]


@pytest.mark.slow
def test_one_device_and_eight_give_the_same():
    one, eight = (
        train(precision="float64", resources=Resources(devices=count)) for count in (1, 8)
    )
    chex.assert_trees_all_close(one.variables, eight.variables, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_runs_in_a_group_have_teachers_of_their_own():
    settings = {"batch_size": 8, "method": "progressive-uda", "epochs": (0, 2), "test": TEST,
                "resources": Resources(devices=1)}  # fmt: skip
    shares = [{"source_share": share} for share in (0.3, 0.9)]
    together = distill_group(shares, tapped(2), TEACHER, SOURCE, target_data=TARGET, **settings)
    for share, result in zip(shares, together, strict=True):
        alone = train(**share).record["history"][-1]
        assert result.record["history"][-1]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
