"""Distillation between models that do not use abflax."""

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.flax import load_file

from abflax import Dataset, InputError, Network, Resources, Tapped, distill, evaluate, load
from abflax.models import model_name
from abflax.models.network import configure_model
from abflax.models.variables import init_variables
from abflax.taps import sow_tap
from abflax.weights import read_variables

ONE, SHAPE = Resources(devices=1), (8, 8, 1)
PATHS = {"layer1": "first", "layer2": "norm"}


class Foreign(nn.Module):
    """A model without abflax's fields and without `train`; with dropout if a rate is given."""

    features: int = 4
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.relu(self._tap("layer1", nn.Conv(self.features, (3, 3), name="first")(x)))
        x = nn.Conv(6, (3, 3), (2, 2), name="second")(x)
        x = self._tap("layer2", nn.BatchNorm(deterministic, momentum=0.9, name="norm")(x))
        x = nn.relu(x).mean(axis=(1, 2))
        return nn.Dense(10, name="head")(nn.Dropout(self.rate)(x, deterministic=deterministic))

    def _tap(self, name, value):
        del name
        return value


class Sowing(Foreign):
    """The same network, sowing its taps."""

    def _tap(self, name, value):
        sow_tap(self, name, value)
        return value


class Dropping(nn.Module):
    """A model with dropout, and without batch norms."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(7)(x.mean(axis=(1, 2))))
        return nn.Dense(10)(nn.Dropout(0.5)(x, deterministic=not train))


@pytest.fixture(scope="module")
def data():
    digits = load("digits", "train")
    return [Dataset(digits.images[at].astype(np.float32) / 16, digits.labels[at], 10)
            for at in (slice(48), slice(48, 80))]  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    return Network(Tapped(Foreign(5), PATHS), init_variables(Foreign(5), jax.random.key(7), SHAPE))


def _distill(data, student, teacher, **options):
    settings = {"epochs": (1, 1), "batch_size": 16, "resources": ONE, "test": data[1]} | options
    return distill(student, teacher, data[0], **settings)


def test_taps_by_path_train_as_sown_ones_do(data, teacher, tmp_path):
    sown = Network(Sowing(5), teacher.variables)
    ours = _distill(data, Tapped(Foreign(), PATHS), teacher, protocol="official")
    theirs = _distill(data, Sowing(), sown, protocol="official")
    chex.assert_trees_all_equal(ours.variables, theirs.variables)
    assert ours.record["history"][0]["agreement"] == theirs.record["history"][0]["agreement"]
    assert set(ours.record["result"]["initialise_agreement"]) == {"layer1", "layer2"}
    assert ours.record["config"]["student"].endswith("tapped at layer1=first, layer2=norm")
    assert ours.record["hash"] != theirs.record["hash"]
    found = evaluate(Network(Tapped(Foreign(), PATHS), ours.variables), data[1], devices=1)
    assert found["test_error"] == ours.record["result"]["test_error"]


def test_sequential_students_are_found_again(data, teacher, tmp_path):
    layers = [nn.Conv(5, [3, 3]), nn.relu, _pooled, nn.Dense(10)]
    student = Tapped(nn.Sequential(layers), {"layer1": "layers_0"})
    taught = Network(Tapped(Foreign(5), {"layer1": "first"}), teacher.variables)
    first = _distill(data, student, taught, workdir=tmp_path, method="kd")
    again = _distill(data, Tapped(nn.Sequential(layers), student.tap_paths), taught,
                     workdir=tmp_path, method="kd")  # fmt: skip
    assert again.record == first.record
    chex.assert_trees_all_equal(again.variables, first.variables)
    again.save(tmp_path / "mine.safetensors")
    variables = read_variables(tmp_path / "mine.safetensors")
    flat = load_file(tmp_path / "mine.safetensors")  # plain Flax, without abflax
    plain = flax.traverse_util.unflatten_dict(flat, sep="/")
    images = data[1].images
    logits = again.student.model.model.apply(first.variables, images)
    for each in (variables, plain):
        chex.assert_trees_all_equal(nn.Sequential(layers).apply(each, images), logits)
    with pytest.raises(InputError, match="saved as .safetensors, not as mine.npz"):
        again.save(tmp_path / "mine.npz")
    assert ", relu, _pooled, " in model_name(student) and " at 0x" not in model_name(student)


def _pooled(x):
    return x.mean(axis=(1, 2))


@pytest.mark.slow
def test_dropout_is_keyed_by_the_run(data, teacher):
    curve = lambda result: [entry["loss"] for entry in result.record["history"]]
    runs = [_distill(data, Tapped(Foreign(rate=rate), PATHS), teacher, seeds=seed, method="kd")
            for rate, seed in ((0.5, 0), (0.5, 0), (0.0, 0))]  # fmt: skip
    assert curve(runs[0]) == curve(runs[1]) != curve(runs[2])
    with pytest.raises(InputError, match="Dropping has dropout, which would drop other neurons on "
                                         "8 devices: use one device"):  # fmt: skip
        _distill(data, Dropping(), None, method="cross-entropy",
                 resources=Resources(devices=8))  # fmt: skip


REFUSED = [
    (Foreign(), {"layer1": "frist", "layer2": "norm"}, {}, "'frist'; did you mean first"),
    (Foreign(), {"layer1": "first"}, {}, "the student's taps layer1 are not the teacher's"),
    (Foreign(), PATHS, {"precision": "bfloat16"}, "Foreign has no field dtype"),
    (Foreign(), PATHS, {"resources": Resources(devices=8)}, "Foreign has no field axis_name"),
    (nn.Dense(10), {}, {}, r"Dense returns \(1, 8, 8, 10\)"),
]  # fmt: skip


@pytest.mark.parametrize(("student", "paths", "options", "sentence"), REFUSED)
def test_what_cannot_take_part(data, teacher, student, paths, options, sentence):
    with pytest.raises(InputError, match=sentence):
        _distill(data, Tapped(student, paths), teacher, **options)


def test_a_teacher_with_dropout_wants_a_protocol_that_leaves_it_alone(data, teacher):
    dropping = Network(Tapped(Foreign(5, rate=0.5), PATHS), teacher.variables)
    student = Tapped(Foreign(), PATHS)
    with pytest.raises(InputError, match="the teacher, .*needs random numbers.*such as paper"):
        _distill(data, student, dropping, protocol="official")
    ours, theirs = (_distill(data, student, t, method="kd") for t in (dropping, teacher))
    chex.assert_trees_all_equal(ours.variables, theirs.variables)


@pytest.mark.parametrize("method", ["activation-boundary", "fsp", "kd+attention"])
def test_networks_without_taps(data, method):
    teacher = Network(Foreign(6), init_variables(Foreign(6), jax.random.key(0), SHAPE))
    with pytest.raises(InputError, match="compares taps, of which neither network has one"):
        distill(Foreign(), teacher, data[0], method=method, batch_size=16)


def test_float64_makes_all_parameters_float64(x64):
    variables = init_variables(
        configure_model(Foreign(), "float64", None), jax.random.key(0), SHAPE
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float64")}
