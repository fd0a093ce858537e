"""What training leaves alone: weights without a gradient, and whole numbers among statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import InputError, Interrupted, Network, Resources, distill, evaluate, load
from abflax.losses import cross_entropy
from abflax.models.variables import not_finite
from tests.stopping import StopAt

SETTINGS = {"method": "cross-entropy", "epochs": (0, 2), "batch_size": 16}


class Net(nn.Module):
    """Its first layer gets no gradient; it counts its passes."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        count = self.variable("batch_stats", "count", lambda: jnp.zeros((), jnp.int32))
        if train:
            count.value = count.value + 1
        x = jax.lax.stop_gradient(nn.Conv(4, (3, 3), strides=2, name="frozen")(images))
        return nn.Dense(10, name="classifier")(nn.relu(x).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train").take(np.arange(48))


def test_frozen_and_counted(digits, tmp_path):
    """Also in a run that goes on from a checkpoint, and on several devices."""
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    student = Network(Net(), variables)
    with pytest.raises(Interrupted):
        distill(student, None, digits, **SETTINGS, workdir=tmp_path, reporter=StopAt(3),
                resources=Resources(2, checkpoint_seconds=0.0))  # fmt: skip
    trained = distill(student, None, digits, **SETTINGS, workdir=tmp_path,
                      resources=Resources(2)).variables  # fmt: skip
    before, after = variables["params"], trained["params"]
    np.testing.assert_array_equal(after["frozen"]["kernel"], before["frozen"]["kernel"])
    assert (after["classifier"]["kernel"] != before["classifier"]["kernel"]).all()
    count = trained["batch_stats"]["count"]
    assert (count.dtype, count) == (np.int32, 6)
    assert evaluate(Network(Net(), trained), digits, devices=1)["examples"] == 48


class Holding(nn.Module):
    """A network with a variable of a dtype, which it uses."""

    where: str
    kind: str  # not `dtype`, which a run sets to its precision

    @nn.compact
    def __call__(self, images):
        is_key = self.kind == "key"
        first = lambda: jax.random.key(0) if is_key else jnp.ones(3, self.kind)  # noqa: E731
        held = self.variable(self.where, "held", first).value
        x = nn.Conv(4, (3, 3), strides=2)(images).mean(axis=(1, 2))
        return nn.Dense(10)(x) + (0 if is_key else jnp.real(held).astype(x.dtype).sum())


@pytest.mark.parametrize(
    ("where", "dtype", "told"),
    [
        ("params", "key", r"'params/held' holds key<fry>"),
        ("state", "key", "cannot run on images"),
        ("params", "int8", "'params/held' holds int8, no real numbers"),
        ("params", "complex64", "'params/held' holds complex64, no real numbers"),
        ("state", "int4", "'state/held' holds int4, which cannot be saved"),
        ("state", "bool", None),
        ("params", "float8_e4m3fn", None),
    ],
)
def test_variables_that_are_no_floats(where, dtype, told, digits, tmp_path):
    """Of a student they are trained or refused; a network that stays as it is may have them."""
    model = Holding(where, dtype)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert not_finite(variables) == []
    train = functools.partial(
        distill, model, None, digits, **SETTINGS, workdir=tmp_path, resources=Resources(devices=1)
    )
    if told is None:
        trained = train().variables
        assert trained[where]["held"].dtype == ("float32" if where == "params" else dtype)
    else:
        with pytest.raises(InputError, match=told):
            train()
        assert not (tmp_path / "runs").exists()
    if dtype == "key":
        with pytest.raises(InputError, match="holds random keys|cannot run"):
            evaluate(Network(model, variables), digits, devices=1)
    else:
        assert evaluate(Network(model, variables), digits, devices=1)["examples"] == 48


def test_labels_outside_the_classes():
    """They give NaN on either side."""
    losses = cross_entropy(jnp.zeros((4, 3)), jnp.array([-1, 0, 2, 3]))
    assert np.isnan(losses).tolist() == [True, False, False, True]
    small = cross_entropy(jnp.zeros((2, 200)), jnp.array([-1, 5], jnp.int8))
    assert np.isnan(small).tolist() == [True, False]
