"""What a phase begins with: the paraphraser of the phase before, the teacher's classifier."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from abflax import (
    Dataset,
    InputError,
    Interrupted,
    Network,
    NonFiniteError,
    Resources,
    distill,
)
from abflax.methods import METHODS, Phase, bind
from abflax.methods.terms import LogitRegression, SoftmaxRegression
from abflax.models.variables import init_variables
from abflax.taps import run_model
from abflax.taps.running import sow_features, sow_tap
from abflax.training.step import create_train_state, train_step
from tests.conftest import Tiny
from tests.stopping import StopAt

SHAPE = (8, 8, 1)
ONE = Resources(devices=1)


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(0)
    images = draw.standard_normal((16, *SHAPE)).astype(np.float32)
    teacher = Network(Tiny(12), init_variables(Tiny(12), jax.random.key(5), SHAPE), "random")
    return images, draw.integers(0, 10, 16), teacher


def _trained(given, objective, variables, before):
    """The states before and after two steps."""
    images, labels, teacher = given
    params, stats = teacher.variables["params"], {"batch_stats": teacher.variables["batch_stats"]}
    optimizer = optax.masked(optax.sgd(0.1), objective.trainable())
    first = state = create_train_state(
        objective, optimizer, variables, stats, jax.random.key(1), params, before
    )
    step = jax.jit(lambda state: train_step(objective, optimizer, state, params, images, labels)[0])
    for _ in range(2):
        state = step(state)
    return first, state


def test_the_paraphraser_is_trained_without_the_student_and_stays_as_it_is_beside_it(given):
    """Nothing of the student moves in the first phase, its running statistics included."""
    student, (first, second) = Tiny(6), METHODS["ft"]()
    objectives = [bind(student, given[2], phase, SHAPE) for phase in (first, second)]
    variables = init_variables(student, jax.random.key(0), SHAPE)
    start, taught = _trained(given, objectives[0], variables, {})
    chex.assert_trees_all_equal(taught.student, variables)
    assert not any(jax.tree.leaves(objectives[0].trainable()["student"]))
    before, paraphraser = (
        state.params["connectors"]["term0"]["layer2_paraphraser"] for state in (start, taught)
    )
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, paraphraser)))
    begun, ended = _trained(given, objectives[1], variables, taught.params["connectors"])
    for state in (begun, ended):
        connectors = state.params["connectors"]["term1"]
        chex.assert_trees_all_equal(connectors["layer2_paraphraser"], paraphraser)
    before, after = (
        state.params["connectors"]["term1"]["layer2_translator"]["conv0"]["kernel"]
        for state in (begun, ended)
    )
    assert (before != after).any() and (ended.student["params"]["Dense_0"]["kernel"] != 0).any()


def test_without_a_paraphraser_factor_transfer_is_refused(given):
    images, labels, teacher = given
    objective = bind(Tiny(6), teacher, METHODS["ft"]()[1], SHAPE)
    with pytest.raises(InputError, match="the phase before it the term Paraphrasing"):
        objective.init(jax.random.key(0), teacher=teacher.variables)
    with pytest.raises(InputError, match="the phase before it the term Paraphrasing"):
        distill(Tiny(6), teacher, Dataset(images, labels, 10), method="ft", batch_size=8,
                epochs=(0, 1), resources=ONE)  # fmt: skip


def test_a_loop_of_ones_own_hands_the_paraphraser_on(given):
    first, second = (bind(Tiny(6), given[2], phase, SHAPE) for phase in METHODS["ft"]())
    before, _ = first.init(jax.random.key(0))
    params, _ = second.init(jax.random.key(1), teacher=given[2].variables, before=before)
    chex.assert_trees_all_equal(
        params["connectors"]["term1"]["layer2_paraphraser"],
        before["connectors"]["term0"]["layer2_paraphraser"],
    )


@pytest.mark.slow
def test_a_run_of_both_phases(given, tmp_path):
    """The student's schedule is that of its own two epochs, of which the paraphraser's is none.

    Stopped in its second phase and resumed, it keeps the paraphraser.
    """
    images, labels, teacher = given
    data = Dataset(images, labels, 10)
    run = {"data": data, "test": data, "batch_size": 8, "resources": Resources(devices=2)}
    result = distill(Tiny(6), teacher, method="ft", epochs=(1, 2), **run)
    alone = distill(Tiny(6), None, method="cross-entropy", epochs=(0, 2), **run)
    rates = [
        [entry["learning_rate"] for entry in record["history"]]
        for record in (result.record, alone.record)
    ]
    assert rates[0][1:] == rates[1] and rates[1][0] > rates[1][1]
    assert result.record["history"][0]["agreement"] == {}  # no layer of the two is as wide
    taught = functools.partial(
        distill, Tiny(6), teacher, method="ft", epochs=(1, 2), workdir=tmp_path, **run
    )
    with pytest.raises(Interrupted, match="stopped in phase classify .* from step 3"):
        taught(reporter=StopAt(3))
    chex.assert_trees_all_equal(taught().variables, result.variables)


def test_the_teachers_classifier_is_found_by_its_widths(given):
    images, _, teacher = given
    objective = bind(Tiny(6), teacher, METHODS["srrl"]()[0], SHAPE)
    params, _ = objective.init(jax.random.key(0), teacher=teacher.variables)
    forward = run_model(teacher.model, teacher.variables, images, train=False)
    taken = params["connectors"]["term1"]
    logits = forward.features @ taken["classifier_kernel"] + taken["classifier_bias"]
    chex.assert_trees_all_close(logits, forward.logits, rtol=1e-6, atol=1e-6)
    trainable = objective.trainable()["connectors"]["term1"]
    assert not trainable["classifier_kernel"] and trainable["conv"]["kernel"]


def test_a_classifier_that_cannot_be_told_is_refused():
    drawn = {"classifier_kernel": np.zeros((4, 4)), "classifier_bias": np.zeros(4)}
    layer = {"kernel": np.ones((4, 4))}
    taken = SoftmaxRegression().first_weights(drawn, {"fc": layer, "other": {"kernel": 0}}, {})
    assert (taken["classifier_kernel"] == 1).all() and (taken["classifier_bias"] == 0).all()
    for teacher in ({}, {"fc": layer, "block": {"mix": layer}}):
        with pytest.raises(InputError, match="needs the teacher's classifier"):
            SoftmaxRegression().first_weights(drawn, teacher, {})


class Other(nn.Module):
    """Its logits are not, or not all, what its classifier makes of its features."""

    change: str = ""

    @nn.compact
    def __call__(self, images):
        tap = nn.Conv(6, (3, 3), strides=2, name="conv")(images)
        sow_tap(self, "layer1", tap)
        features = nn.relu(tap).mean(axis=(1, 2))
        sow_features(self, -features if self.change == "features" else features)
        logits = nn.Dense(10, name="classifier")(features)
        changes = {"scale": lambda x: 0.5 * x, "log": nn.log_softmax}
        return changes.get(self.change, lambda x: x)(logits)


@pytest.mark.parametrize("change", ["", "scale", "log", "features"])
def test_a_teacher_whose_logits_are_not_its_classifiers_is_refused(change, given, tmp_path):
    """Before anything is written, and by `bind` too."""
    images, labels, _ = given
    variables = Other().init(jax.random.key(3), images)
    variables["params"]["classifier"]["bias"] += 0.5
    teacher = Network(Other(change), variables)
    run = functools.partial(
        distill, Tiny(6), data=Dataset(images, labels, 10), method="srrl", epochs=(0, 1),
        batch_size=16, workdir=tmp_path, resources=ONE,
    )  # fmt: skip
    if not change:
        assert run(teacher=teacher).record["history"]
        nonsense = jax.tree.map(lambda leaf: leaf * np.nan, variables)
        with pytest.raises(NonFiniteError):
            run(teacher=Network(Other(), nonsense))
        return
    told = "whose logits are its classifier's, .* those of Other are apart"
    with pytest.raises(InputError, match=told):
        run(teacher=teacher)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match=told):
        bind(Tiny(6), teacher, METHODS["srrl"]()[0], SHAPE)


def _headed_term(factor):
    """A class that is called `Headed`, whose head begins with a multiple of another's."""

    @dataclasses.dataclass(frozen=True)
    class Headed(LogitRegression):
        def first_weights(self, drawn, teacher, before):
            head = before["head"] if before else teacher["Dense_0"]
            return {"head": jax.tree.map(lambda leaf: factor * leaf, head)}

    return Headed


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_module_begins_with_is_part_of_a_run(count, given, tmp_path):
    """It is taken from the teacher, or in a last phase from the one before."""
    images, labels, teacher = given

    def run(last):
        first = [Phase(f"phase {index}", [(1.0, LogitRegression())]) for index in range(count - 1)]
        return distill(
            Tiny(12), teacher, Dataset(images, labels, 10), batch_size=16, workdir=tmp_path,
            resources=ONE, method=[*first, Phase("last", [(1.0, last)])], epochs=(1,) * count,
        ).record  # fmt: skip

    record = run(_headed_term(1.0)())
    with pytest.raises(InputError, match="another phase last's computation"):
        run(_headed_term(2.0)())
    assert run(_headed_term(1.0)()) == record


def test_options_of_factor_transfer():
    phases = METHODS["ft"](rate=0.25, layers=("layer1",), transfer_weight=0.4)
    ((weight, paraphrasing),) = phases[0].terms
    transferred, term = phases[1].terms[1]
    assert (weight, transferred) == (1.0, 200.0)
    assert (paraphrasing.rate, term.rate, paraphrasing.layers) == (0.25, 0.25, ("layer1",))
    summed = METHODS["ft+dkd"]()
    assert [type(term).__name__ for _, term in summed[0].terms] == ["Paraphrasing"]
    with pytest.raises(InputError, match="rate must be above 0"):
        METHODS["ft"](rate=0.0)
