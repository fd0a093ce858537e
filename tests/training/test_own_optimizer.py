"""The protocol's optimizer with other settings, one of the user's, and averaged weights."""

import dataclasses
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from abflax import InputError, Resources, distill, evaluate, load
from abflax.config import RunConfig
from abflax.methods import METHODS, Optimizer, Phase, PhaseSchedule
from abflax.methods.optimizer import OwnOptimizer
from abflax.methods.terms import CrossEntropy
from abflax.models.network import Network
from abflax.models.variables import init_variables
from abflax.training.record import read_record
from tests.conftest import Small, Tiny

SPAN = PhaseSchedule(2, 8, 2, 8, 10, Fraction(1))


@pytest.fixture(scope="module")
def data():
    return load("digits", "train").take(np.arange(16))


def trained(data, **settings):
    """One batch an epoch, by labels alone."""
    resources = Resources(devices=1, checkpoint_seconds=0.0)
    fixed = {"method": "cross-entropy", "batch_size": 16, "resources": resources}
    student, teacher = settings.pop("student", Small()), settings.pop("teacher", None)
    return distill(student, teacher, data, **{"epochs": (0, 3), **fixed, **settings})


def test_settings_are_those_of_every_phase_and_of_the_hash():
    config = RunConfig.create(dataset="d", student="s", teacher="t")
    changed = config.replace(learning_rate=1, weight_decay=0, momentum=0.5)
    for phase, before in zip(changed.phases, config.phases, strict=True):
        assert phase.optimizer == dataclasses.replace(
            before.optimizer, learning_rate=1.0, weight_decay=0.0, momentum=0.5
        )
    assert changed.hash != config.hash == config.replace(learning_rate=0.1).hash
    assert config.replace(learning_rate=1).hash == config.replace(learning_rate=1.0).hash
    assert RunConfig.from_json(changed.as_json()).hash == changed.hash
    hashes = {config.replace(**{name: value}).hash for name, value in (
        ("schedule", "constant"), ("schedule", "cosine"), ("ema", 0.9), ("ema", 0.99),
    )}  # fmt: skip
    assert len(hashes | {config.hash}) == 5


@pytest.mark.parametrize(
    ("of_run", "decay", "expected"),
    [
        (False, "constant", [0.1] * 8),
        (False, "cosine", [0.05 * (1 + np.cos(np.pi * t / 8)) for t in range(8)]),
        (True, "cosine", [0.05 * (1 + np.cos(np.pi * t / 10)) for t in range(2, 10)]),
    ],
)
def test_schedules_by_hand(of_run, decay, expected, x64):
    schedule = Optimizer(decay=decay, of_run=of_run).schedule(SPAN)
    found = np.array([float(schedule(step)) for step in range(8)])
    chex.assert_trees_all_close(found, np.array(expected), rtol=1e-12)


def test_plain_optax_gives_the_protocols_numbers(data):
    """Also labelled: two transformations have two hashes, and one of them always the same."""
    plain = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9, nesterov=True))
    own, protocol = trained(data, optimizer=plain), trained(data, schedule="constant")
    chex.assert_trees_all_close(own.variables, protocol.variables, rtol=1e-5, atol=1e-7)
    (phase,) = own.record["phases"]
    label = own.record["config"]["optimizer"]
    assert phase["objective"]["optimiser"] == {"optax": label} and label.startswith("custom:")
    assert "learning_rate" not in own.record["history"][0]
    assert protocol.record["history"][0]["learning_rate"] == pytest.approx(0.1)
    labels = [OwnOptimizer.of(each()).label for each in (
        lambda: optax.adamw(1e-3), lambda: optax.adamw(1e-3), lambda: optax.adamw(2e-3),
        lambda: optax.adamw(optax.cosine_decay_schedule(1e-3, 500)), lambda: plain,
    )]  # fmt: skip
    assert labels[0] == labels[1] and len(set(labels)) == 4 and labels[-1] == label


def test_an_own_optimizer_is_known_by_what_it_computes(data, tmp_path):
    """These two differ from the 2,000th step on, where no label sees it."""
    one, other = (
        optax.sgd(optax.piecewise_constant_schedule(0.1, {step: 0.5})) for step in (2000, 3000)
    )
    assert OwnOptimizer.of(one).label == OwnOptimizer.of(other).label
    first = trained(data, optimizer=one, workdir=tmp_path, epochs=(0, 1))
    assert trained(data, optimizer=one, workdir=tmp_path, epochs=(0, 1)).record == first.record
    with pytest.raises(InputError, match="another joint optimizer's computation"):
        trained(data, optimizer=other, workdir=tmp_path, epochs=(0, 1))
    path = first.directory / "record.json"
    assert read_record(path, first.record["hash"]) == first.record
    phase = Phase("joint", [(1.0, CrossEntropy())], optimizer=one)
    assert (
        RunConfig.create(dataset="d", student="s", method=[phase]).hash
        != RunConfig.create(dataset="d", student="s", method=METHODS["cross-entropy"]()).hash
    )


@pytest.mark.slow
def test_an_own_optimizer_is_known_by_what_it_does_to_connectors(data, tmp_path):
    """The label's problem has none; the rates of the student are the same."""

    def rates(connectors):
        parts = {"student": optax.sgd(0.1), "connectors": optax.sgd(connectors)}
        part_of = lambda path, _: path[0].key  # noqa: E731
        label = lambda params: jax.tree_util.tree_map_with_path(part_of, params)  # noqa: E731
        return optax.multi_transform(parts, label)

    model = Tiny(12)
    teacher = Network(model, init_variables(model, jax.random.key(7), (8, 8, 1)), "t")
    settings = {"student": Tiny(6), "teacher": teacher, "method": "fitnet", "epochs": (1, 0),
                "workdir": tmp_path}  # fmt: skip
    one, other = rates(0.1), rates(1.0)
    assert OwnOptimizer.of(one).label == OwnOptimizer.of(other).label
    trained(data, optimizer=one, **settings)
    with pytest.raises(InputError, match="another initialise optimizer's computation"):
        trained(data, optimizer=other, **settings)


def test_averaged_weights(data, tmp_path):
    """By hand from the weights of runs of one, two and three epochs; evaluated and saved."""
    lengths = [trained(data, epochs=(0, n), schedule="constant").variables for n in (1, 2, 3)]
    student = Small()
    key = jax.random.fold_in(jax.random.key(0), 0)
    average = student.init(key, jnp.zeros((1, 8, 8, 1)), train=True)["params"]
    for variables in lengths:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, variables["params"])
    settings = {"schedule": "constant", "ema": 0.75, "test": data, "workdir": tmp_path}
    result = trained(data, **settings)
    chex.assert_trees_all_close(result.average["params"], average, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(
        result.variables["params"], lengths[-1]["params"], rtol=1e-5, atol=1e-7
    )
    saved = safetensors.numpy.load_file(result.directory / "student-ema.safetensors")
    chex.assert_trees_all_equal(
        saved, flatten_dict(jax.tree.map(np.asarray, result.average), sep="/")
    )
    measured = evaluate(Network(student, result.average), data, devices=1)
    entry = result.record["history"][-1]
    assert entry["ema"]["test_error"] == measured["test_error"]
    chex.assert_trees_all_close(
        entry["ema"]["test_cross_entropy"], measured["test_cross_entropy"], rtol=1e-6
    )
    assert entry["test_cross_entropy"] != entry["ema"]["test_cross_entropy"]
    assert result.record["result"]["ema_test_error"] == measured["test_error"]
    served = trained(data, **settings)
    assert served.record == result.record
    chex.assert_trees_all_equal(served.average, jax.tree.map(np.asarray, result.average))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean cosine"),
        ({"ema": 1.0}, "between 0 and 1"),
        ({"optimizer": "adam"}, "optax.GradientTransformation"),
        ({"optimizer": optax.sgd(1.0), "learning_rate": 0.1}, "say it there"),
        ({"method": [Phase("joint", [(1.0, CrossEntropy())])], "ema": 0.9}, "ema is said in them"),
    ],
)
def test_what_cannot_be_right_is_said_in_a_sentence(settings, message):
    with pytest.raises(InputError, match=message) as error:
        RunConfig.create(dataset="d", student="s", **{"method": "kd"} | settings)
    assert len(str(error.value)) <= 400
