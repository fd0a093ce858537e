"""Terms, phases and methods made outside the package, and weights that change with the epochs."""

import dataclasses
import functools
import json
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax import InputError, Network, Resources, distill, load
from abflax.config import RunConfig
from abflax.methods import (
    METHODS,
    Method,
    Optimizer,
    Phase,
    Ramp,
    Schedule,
    register_method,
    registry,
)
from abflax.methods.objective import bind, make_targets
from abflax.methods.terms import CrossEntropy, FeatureDifference, KnowledgeDistillation, Term
from abflax.models.variables import init_variables
from abflax.training.record import read_record
from tests.conftest import Small

ONE = Resources(devices=1)


def own_term(power):
    """A class that is called `Own` whatever it computes."""

    @dataclasses.dataclass(frozen=True)
    class Own(Term):
        scale: float = 1.0

        def targets(self, teacher):
            return teacher.logits

        def loss(self, student, targets, labels):
            return self.scale * (jnp.abs(student.logits - targets) ** power).mean(axis=-1)

    return Own


Square, Absolute = own_term(2), own_term(1)


@pytest.fixture(scope="module")
def teacher():
    return Network(Small(), init_variables(Small(), jax.random.key(5), (8, 8, 1)), "random")


@pytest.fixture(scope="module")
def data():
    return load("digits", "train").take(np.arange(16))


def trained(teacher, data, **settings):
    """One batch an epoch."""
    return distill(Small(), teacher, data, batch_size=16, resources=ONE, **settings)


def test_a_ramp_by_hand():
    """min(epoch / 20, 1) with epochs from 1, constant within an epoch, as the authors have it."""
    ramp, per_epoch = Ramp(0, 1, 20), Fraction(50000, 64)
    for step in (0, 781, 782, 1562, 1563, 14843, 14844, 15624, 15625, 10**8):
        epoch = 1 + int(step / per_epoch)
        chex.assert_trees_all_close(float(ramp(step, per_epoch)), min(epoch / 20, 1.0), rtol=1e-6)
    down = [float(Ramp(2.0, 1.0, 2)(step, Fraction(1))) for step in range(3)]
    assert down == [1.5, 1.0, 1.0]


def test_a_ramp_is_part_of_the_hash_and_numbers_are_as_before():
    def phase(weight):
        return Phase("joint", ((weight, CrossEntropy()),), Optimizer())

    assert phase(1).as_json() == phase(1.0).as_json()
    assert phase(1).as_json()["terms"] == [[1.0, "CrossEntropy", {}]]
    ramped = phase(Ramp(0, 1, 20)).as_json()["terms"][0][0]
    assert ramped == {"start": 0.0, "end": 1.0, "epochs": 20}
    config = RunConfig.create(dataset="d", student="s", method="cross-entropy")
    assert config.replace(method=METHODS["cross-entropy"]()).hash == config.hash
    hashes = {config.replace(method=[phase(Ramp(0, 1, n))]).hash for n in (2, 3)}
    assert len(hashes | {config.hash}) == 3


def test_the_step_of_a_ramp_is_traced(teacher):
    phase = Phase("joint", [(Ramp(0, 1, 4), CrossEntropy())])
    objective = bind(Small(), None, phase, (8, 8, 1), steps_per_epoch=Fraction(1))
    variables, traces = teacher.variables, []
    params, stats = {"student": variables["params"], "connectors": {}}, {"student": {}}

    @jax.jit
    def loss(step):
        traces.append(step)
        images = jnp.ones((4, 8, 8, 1))
        targets, _ = make_targets(objective, {}, {}, images)
        batch = images, jnp.arange(4)
        return objective.loss(params, stats, targets, *batch, step=step)[0]

    losses = [float(loss(step)) for step in range(6)]
    assert len(traces) == 1
    chex.assert_trees_all_close(
        np.array(losses) / losses[-1], np.array([0.25, 0.5, 0.75, 1, 1, 1]), rtol=1e-6
    )


def test_a_run_with_a_ramp(teacher, data):
    """The first step sees a third of the cross-entropy of the very same weights."""
    losses = [
        trained(
            None, data, method=[Phase("joint", [(weight, CrossEntropy())])], epochs=(0, 3)
        ).record["history"]
        for weight in (1.0, Ramp(0.0, 1.0, 3))
    ]
    assert len(losses[1]) == 3
    chex.assert_trees_all_close(3 * losses[1][0]["loss"], losses[0][0]["loss"], rtol=1e-6)


def test_an_own_term_is_trained_and_served(teacher, data, tmp_path):
    phases = [Phase("warm", [(1.0, Square(scale=2.0))]), Phase("joint", [(1, CrossEntropy())])]
    run = functools.partial(trained, teacher, data, method=phases, epochs=(3, 1), workdir=tmp_path)
    result = run()
    record, (first, *_) = result.record, result.record["history"]
    assert [entry["phase"] for entry in record["history"]] == ["warm"] * 3 + ["joint"]
    assert first["loss"] > record["history"][2]["loss"]
    assert record["phases"][0]["objective"]["terms"] == [[1.0, "Own", {"scale": 2.0}]]
    assert record["config"]["method"] == "own"
    again = run()
    assert again.record == record
    # The record is read where no such term is known.
    assert read_record(result.directory / "record.json", record["hash"]) == record
    assert RunConfig.from_json(record["config"]).hash == record["hash"]


def test_two_terms_of_one_name_are_never_mixed(teacher, data, tmp_path):
    def run(term, **options):
        phase = Phase("joint", [(1.0, term)])
        return trained(teacher, data, method=[phase], epochs=(0, 1), **options).record

    first = run(Square(), workdir=tmp_path)
    with pytest.raises(InputError, match="another phase joint's computation"):
        run(Absolute(), workdir=tmp_path)
    other = run(Absolute(), workdir=tmp_path, force=True)
    assert other["hash"] == first["hash"]
    # Nor are their compiled programs.
    assert other["history"][0]["loss"] == run(Absolute())["history"][0]["loss"]
    assert other["history"][0]["loss"] != first["history"][0]["loss"]
    with pytest.raises(InputError, match="another phase joint's computation"):
        run(Square(), workdir=tmp_path)


def own_weight(factor):
    """A class that is called `Own` whatever it computes."""

    @dataclasses.dataclass(frozen=True)
    class Own(Schedule):
        def __call__(self, step, per_epoch, epochs=1):
            return factor * jnp.asarray(float(epochs))

    return Own()


def test_two_weights_of_one_name_are_never_mixed(teacher, data, tmp_path):
    def run(weight, **options):
        phase = Phase("joint", [(weight, CrossEntropy())])
        return trained(teacher, data, method=[phase], epochs=(0, 1), **options).record

    one, other = own_weight(1.0), own_weight(2.0)
    first = run(one, workdir=tmp_path)
    assert run(one, workdir=tmp_path) == first
    with pytest.raises(InputError, match="another phase joint's computation"):
        run(other, workdir=tmp_path)
    assert run(other)["history"][0]["loss"] == 2 * first["history"][0]["loss"]


class _Hidden(CrossEntropy):
    """A term whose scale is no field: two of them would count as equal."""

    def __init__(self, scale):
        object.__setattr__(self, "scale", scale)


class _HiddenWeight(Schedule):
    def __init__(self, value):
        object.__setattr__(self, "value", value)


def test_a_registered_method(teacher, data, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    terms = (Square(),)
    register_method("square", Method("squares", "-", terms, (KnowledgeDistillation(),)))
    config = RunConfig.create(dataset="d", student="s", method="square", scale=3)
    assert config.phases[0].terms == ((1.0, Square(scale=3.0)),)
    result = trained(teacher, data, method="square", epochs=(1, 1))
    assert [entry["phase"] for entry in result.record["history"]] == ["initialise", "classify"]
    assert "kd+square" in METHODS
    for name, message in (
        ("kd", "already"),
        ("l0.3", "already"),
        ("square", "already"),
        ("a+b", "cannot name"),
        ("own", "cannot name"),
    ):
        with pytest.raises(InputError, match=message):
            register_method(name, Method("", "", terms, terms))
    with pytest.raises(InputError, match="transfer loss FeatureDifference is 1, or transfer_wei"):
        register_method("mine", Method("", "", terms, terms, weights={FeatureDifference: 7.0}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Phase("joint", []), "pairs of a weight and a term"),
        (lambda: Phase("joint", [CrossEntropy()]), "pair of a weight and a Term"),
        (lambda: Phase("joint", [(jnp.inf, CrossEntropy())]), "finite number or a Ramp"),
        (lambda: Phase("joint", [(1.0, Square(scale=np.ones(3)))]), "numbers, words or tuples"),
        (lambda: Phase("joint", [(1.0, _Hidden(2.0))]), "_Hidden keeps scale"),
        (lambda: Phase("joint", [(_HiddenWeight(2.0), CrossEntropy())]), "keeps value"),
        (lambda: Ramp(0.0, 1.0, 0), "at least 1 epoch"),
        (lambda: _config([]), "one phase or more"),
        (lambda: _config([_PHASE, _PHASE]), "each with its name"),
        (lambda: _config([_PHASE], margin=1.0), "margin is said in their terms"),
        (lambda: _config([_PHASE, _OTHER], epochs=(1,)), "for each of the phases joint, other"),
        (lambda: _config("own"), "unknown method 'own'"),
        (lambda: _config([CrossEntropy()]), "a list of phases, .* one of them is a CrossEntropy"),
        (lambda: _config("kd", learning_rate=abs), r"optimizer=optax.sgd\(schedule, momentum"),
        (lambda: _config("kd", epochs=3), r"one for each phase, such as \(20, 100\), not 3"),
        (lambda: bind(Small(), None, "kd", (8, 8, 1)), "phase must be Phase, not 'kd'"),
        (lambda: bind(Small(), None, _PHASE, (4, 8, 8, 1)), r"\(height, width, channels\), not"),
        (lambda: _loss_of(Whole()), r"one number for each example, \[batch\], not of shape \(\)"),
    ],
)
def test_what_cannot_be_right_is_said_in_a_sentence(wrong, message):
    with pytest.raises(InputError, match=message) as error:
        wrong()
    assert len(str(error.value)) <= 400


@dataclasses.dataclass(frozen=True)
class Whole(Term):
    """The mean over the batch, where one number for each example is needed."""

    needs_teacher = False

    def loss(self, student, targets, labels):
        return student.logits.mean()


def _loss_of(term):
    return bind(Small(), None, Phase("joint", [(1.0, term)]), (8, 8, 1)).trainable()


@pytest.mark.parametrize("what", ["targets", "loss"])
def test_a_term_without_a_part_says_which(what):
    with pytest.raises(NotImplementedError, match=f"Term defines no {what}"):
        getattr(Term(), what)(*[None] * (1 if what == "targets" else 3))


_PHASE = Phase("joint", [(1.0, CrossEntropy())])
_OTHER = Phase("other", [(1.0, CrossEntropy())])


def _config(method, **settings):
    return RunConfig.create(dataset="d", student="s", method=method, **settings)


def test_a_configuration_of_own_phases_survives_json():
    config = _config([_PHASE, _OTHER], epochs=(1, 2))
    assert config.phase_epochs == {"joint": 1, "other": 2}
    read = RunConfig.from_json(json.loads(json.dumps(config.as_json())))
    assert read.hash == config.hash and read.as_json() == config.as_json()
    assert RunConfig.create(dataset="d", student="s", **config.settings) == config
    assert config.replace(method="kd", epochs=(1, 2)).own_phases is None
    assert _config([_PHASE], epochs=(1, 2)).phase_epochs == {"joint": 3}
