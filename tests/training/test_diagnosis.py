"""Numbers that are none: the run stops with step, phase, and what was not finite first."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import Dataset, Network, NonFiniteError, Resources, distill, evaluate, load
from abflax.data import Stream
from abflax.methods import PROTOCOLS
from abflax.models.variables import init_variables
from abflax.runtime.reporter import Reporter
from abflax.storage.checkpoint import Checkpoints
from abflax.storage.files import as_json
from abflax.taps import sow_tap
from abflax.training.diagnosis import Trend, norm_of
from tests.conftest import Small

# float64 images that do not fit into float32, with which NumPy's cast says what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train").take(np.arange(48))


@pytest.fixture(scope="module")
def teacher():
    return Network(Small(), init_variables(Small(), jax.random.key(1), (8, 8, 1)), "teacher")


def _fails(data, teacher=None, student=None, per_dispatch=1, devices=1, checkpoint_seconds=60.0,
           **options):  # fmt: skip
    """The sentence with which a run ends."""
    settings = {"method": "cross-entropy", "epochs": (0, 2), "batch_size": 16} | options
    resources = Resources(devices, per_dispatch, checkpoint_seconds)
    with pytest.raises(NonFiniteError) as failed:
        distill(student or Small(), teacher, data, resources=resources, **settings)
    return str(failed.value)


def _poisoned(digits, step, value):
    """One pixel of the batch of that step of the first epoch. 1e300 is no number in float32."""
    images = digits.images.astype(np.float64)
    chosen = Stream(len(digits), 16, 0).batches(step, 1)[0][0, 3]
    images[chosen, 4, 4] = value
    return dataclasses.replace(digits, images=images, name=None)


def test_a_bad_pixel(digits):
    """Step 2 is the third of the run, two steps after what was kept, which are made again."""
    data = _poisoned(digits, 2, 1e300)
    sentence = _fails(data, per_dispatch=2, devices=8)
    assert sentence == (
        "the loss is not finite at step 2 of phase joint (step 2 of the run); the first tap that "
        "is not finite is the student's layer1 (and of what goes in, the images); there is no "
        "checkpoint, since the run has no workdir"
    )


def test_an_overflow_inside_the_network(digits):
    data = Dataset(_poisoned(digits, 1, 3e38).images, digits.labels)
    sentence = _fails(data)
    assert "step 1 of phase joint" in sentence and "diverged" not in sentence
    assert "the first tap that is not finite is the student's l" in sentence
    assert "of what goes in" not in sentence


def test_the_checkpoint_before_it_stays(digits, tmp_path):
    """And the same command, which goes on from it, says the same."""
    data = _poisoned(digits, 2, 1e300)
    for _ in range(2):
        sentence = _fails(data, workdir=tmp_path, checkpoint_seconds=0.0)
        assert "at step 2 of phase joint" in sentence and "goes in, the images)" in sentence
        assert sentence.endswith(f"step 2, in {next(tmp_path.glob('runs/*/checkpoints'))}")
    with Checkpoints(next(tmp_path.glob("runs/*/checkpoints"))) as checkpoints:
        assert checkpoints.latest()["history"]["step"] == 2


def test_a_bad_teacher(digits, teacher):
    variables = jax.tree.map(jnp.asarray, teacher.variables)
    variables["params"]["stem"]["bias"] = variables["params"]["stem"]["bias"].at[7].set(jnp.nan)
    sentence = _fails(digits, Network(Small(), variables), method="kd")
    assert (
        "the first tap that is not finite is the teacher's layer1 (and of what goes in, the "
        "teacher's params/stem/bias)" in sentence
    )
    assert "diverged" not in sentence


def test_behind_a_connector(digits):
    """A student whose taps fit into float32, and a connector whose products of them do not."""

    class Loud(nn.Module):
        param_dtype: type = jnp.float32

        @nn.compact
        def __call__(self, images, *, train):
            flat = images.reshape(len(images), -1)
            sow_tap(self, "layer1", jnp.full((len(images), 4, 4, 5), 3e38) + flat.sum() * 0)
            return nn.Dense(10, param_dtype=self.param_dtype, name="classifier")(flat)

    variables = init_variables(Small(), jax.random.key(1), (8, 8, 1))
    sentence = _fails(digits, Network(Small(), variables), Loud(), method="fitnet", epochs=(1, 1))
    assert "phase initialise" in sentence
    assert (
        "the first tap that is not finite is what the connector makes of the student's layer1"
        in sentence
    )


def test_a_gradient_alone(digits):
    """√ has no slope at 0: the loss is finite, its gradient is not."""

    class Root(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            before = nn.Dense(10, kernel_init=nn.initializers.zeros, name="hidden")(
                images.reshape(len(images), -1)
            )
            sow_tap(self, "layer1", before)
            return nn.Dense(10, name="classifier")(jnp.sqrt(before))

    sentence = _fails(digits, student=Root())
    assert sentence.startswith("the gradient norm is not finite at step 0 of phase joint")
    assert "; every tap is finite, the gradient of the student/hidden/bias is not;" in sentence


@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["kept long ago", "kept just now"])
def test_divergence_is_called_by_its_name(digits, monkeypatch, tmp_path, seconds):
    steep = dataclasses.replace(
        PROTOCOLS["paper"]["cifar"],
        joint=dataclasses.replace(PROTOCOLS["paper"]["cifar"].joint, learning_rate=1e12),
    )
    monkeypatch.setitem(PROTOCOLS["paper"], "cifar", steep)
    resources = Resources(devices=1, checkpoint_seconds=seconds)
    with pytest.raises(NonFiniteError) as failed:
        distill(Small(), None, digits, method="cross-entropy", epochs=(0, 4), batch_size=16,
                workdir=tmp_path, resources=resources)  # fmt: skip
    sentence = str(failed.value)
    assert "; the first tap that is not finite is the student's l" in sentence
    grown = re.search(
        r"training diverged: the loss from (\S+) to (\S+) and the weights' norm from (\S+) to "
        r"(\S+) grew, at a learning rate of 1e\+12", sentence,
    )  # fmt: skip
    assert grown, sentence
    loss, lost, norm, far = map(float, grown.groups())
    assert loss < 5 and lost > 1e10 and norm < 20 and far > 1e10


def test_what_counts_as_divergence():
    trend = Trend(norm=2.0)
    trend.add(np.array([4.0, 0.5, 5.0]))
    assert trend.divergence(20.0, 0.1) is None  # ten times, both: not more
    trend.add(np.array([5.1]))
    assert trend.divergence(20.0, 0.1) == (
        "training diverged: the loss from 0.5 to 5.1 grew, at a learning rate of 0.1"
    )
    assert Trend(2.0).divergence(21.0, 0.1) == (
        "training diverged: the weights' norm from 2 to 21 grew, at a learning rate of 0.1"
    )
    assert norm_of({"a": np.array([[3.0]]), "b": {"c": np.float32(4.0)}}) == 5.0


def test_held_out_numbers_that_are_none(digits, tmp_path):
    """A record never holds a NaN."""
    test = _poisoned(digits, 0, 1e300)
    sentence = _fails(digits, test=test, workdir=tmp_path)
    assert sentence == (
        "the cross-entropy on held-out data is not finite after step 3 of the run; it came before "
        "the first checkpoint"
    )
    assert not list(tmp_path.glob("runs/*/record.json"))


METHODS = ["activation-boundary", "kd", "cross-entropy"]


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_teacher_stops_any_method(digits, teacher, method):
    """At step 0, also where it is only measured, and though ρ(NaN) = 0 hides it from booleans."""
    variables = jax.tree.map(np.array, teacher.variables)
    variables["params"]["stem"]["kernel"][0, 0, 0, 0] = np.nan
    sentence = _fails(digits, Network(Small(), variables), method=method, epochs=(1, 1))
    assert re.match("the (loss|teacher) is not finite at step 0 ", sentence)
    assert "the teacher's params/stem/kernel" in sentence


class Overflowing(Small):
    """Its weights are numbers, its tap is none."""

    @nn.compact
    def __call__(self, images, *, train):
        tap = nn.Conv(64, (3, 3), (2, 2), param_dtype=self.param_dtype, name="stem")(images)
        sow_tap(self, "layer1", jnp.sqrt(-1 - tap**2))
        pooled = nn.relu(tap).mean(axis=(1, 2))
        return nn.Dense(10, param_dtype=self.param_dtype, name="classifier")(pooled)


@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_tap(digits, teacher, cached):
    resources = Resources(1, cache_targets=cached)
    with pytest.raises(NonFiniteError, match="at step 0 of phase initialise.* teacher's layer1"):
        distill(Small(), Network(Overflowing(), teacher.variables), digits, batch_size=16,
                epochs=(1, 1), views=1, resources=resources)  # fmt: skip


def test_a_measured_tap_that_is_none(digits, teacher):
    sentence = _fails(digits, Network(Overflowing(), teacher.variables), test=digits)
    assert sentence.startswith("the agreement of layer1 on held-out data is not finite")


class NoLogits(Small):
    """Its weights are numbers, its logits are none."""

    @nn.compact
    def __call__(self, images, *, train):
        return jnp.sqrt(-1 - nn.Dense(10, name="classifier")(images.mean(axis=(1, 2))) ** 2)


class Unused(nn.Module):
    """One of its weights is no number, and has no part in the logits."""

    @nn.compact
    def __call__(self, images):
        self.param("unused", nn.initializers.constant(jnp.nan), (2,))
        return nn.Dense(10)(images.mean(axis=(1, 2)))


def test_evaluating_numbers_that_are_none(digits, teacher):
    """It is no error of 90 %."""
    variables = jax.tree.map(np.array, teacher.variables)
    variables["params"]["classifier"]["bias"][3] = np.nan
    with pytest.raises(NonFiniteError, match="the network's params/classifier/bias holds NaN"):
        evaluate(Network(Small(), variables), digits)
    with pytest.raises(NonFiniteError, match="the network's logits"):
        evaluate(
            Network(NoLogits(), init_variables(NoLogits(), jax.random.key(0), (8, 8, 1))), digits
        )


def test_a_weight_that_is_none_is_told_where_the_loss_does_not_show_it(digits):
    """As behind a ReLU that makes NaN 0, which JAX 0.12 compiles on CPUs."""
    sentence = _fails(digits, None, student=Unused(), method="cross-entropy")
    assert sentence.startswith("the student's params/unused is not finite after step")


def test_json_holds_numbers():
    for value in ({"a": [np.nan]}, {"a": float("inf")}):
        with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
            as_json(value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_grew_a_thousandfold_is_told(digits, monkeypatch):
    steep = dataclasses.replace(
        PROTOCOLS["paper"]["cifar"],
        joint=dataclasses.replace(PROTOCOLS["paper"]["cifar"].joint, learning_rate=1e5),
    )
    said = []
    settings = {"method": "cross-entropy", "epochs": (0, 1), "batch_size": 16,
                "resources": Resources(1)}  # fmt: skip
    assert "warning" not in distill(Small(), None, digits, **settings).record
    monkeypatch.setitem(PROTOCOLS["paper"], "cifar", steep)
    with pytest.warns(RuntimeWarning, match="in phase joint the loss grew from 2"):
        result = distill(Small(), None, digits, **settings)
    assert "is the learning rate too high?" in result.record["warning"]
    reporter = Reporter()
    monkeypatch.setattr(reporter, "finished", lambda note="": said.append(note), raising=False)
    distill(Small(), None, digits, **settings, reporter=reporter)
    assert f"{result.record['hash']}: {result.record['warning']}" in said
