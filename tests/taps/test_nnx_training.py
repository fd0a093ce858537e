"""NNX students in bfloat16 and on several devices; parameters in boxes of Flax's partitioning."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from abflax import InputError, Network, Resources, Tapped, distill, load
from abflax.models.network import configure_model
from abflax.taps import run_model

TAPS = {"layer1": "norm"}


class Net(nnx.Module):
    def __init__(self, width, *, rngs, dtype=None, boxed=False):
        make = nnx.initializers.he_normal()
        if boxed:
            make = nnx.with_partitioning(make, (None, None, None, "model"))
        self.conv = nnx.Conv(1, width, (3, 3), rngs=rngs, dtype=dtype, kernel_init=make)
        self.norm = nnx.BatchNorm(width, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(width, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images):
        return self.head(nnx.relu(self.norm(self.conv(images))).mean(axis=(1, 2)))


class Boxed(nn.Module):
    """A Linen network; its kernel is in a box of `nn.with_partitioning` or not."""

    boxed: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train: bool):
        make = nn.initializers.he_normal()
        if self.boxed:
            make = nn.with_partitioning(make, (None, None, None, "model"))
        x = nn.Conv(4, (3, 3), kernel_init=make, name="conv")(images)
        x = nn.BatchNorm(not train, axis_name=self.axis_name, name="norm")(x)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


class Plain(nnx.Module):
    """No part of it has a dtype."""

    def __init__(self, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (64, 10)))

    def __call__(self, images):
        return images.reshape(len(images), -1) @ self.kernel[...]


@pytest.fixture(scope="module")
def data():
    return load("digits", "train").take(np.arange(16))


def trained(student, data, **settings):
    fixed = {"method": "activation-boundary", "epochs": (2, 1), "batch_size": 16,
             "resources": Resources(devices=1)}  # fmt: skip
    teacher = settings.pop("teacher", Tapped(Net(8, rngs=nnx.Rngs(7)), TAPS))
    return distill(student, teacher, data, **{**fixed, **settings})


@pytest.mark.slow
def test_bfloat16_is_that_of_the_module_itself(data):
    """The logits are a native bfloat16 module's; weights and statistics stay float32."""
    images = jnp.asarray(data.images, jnp.float32) / 16
    network = Network(Tapped(Net(4, rngs=nnx.Rngs(0)), TAPS))
    model = configure_model(network.model, "bfloat16", None)
    found = run_model(model, network.variables, images, train=False)
    native = Net(4, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    native.eval()
    chex.assert_trees_all_equal(found.logits, native(images))
    assert found.taps["layer1"].dtype == jnp.bfloat16
    result = trained(Tapped(Net(4, rngs=nnx.Rngs(0)), TAPS), data, precision="bfloat16")
    exact = trained(Tapped(Net(4, rngs=nnx.Rngs(0)), TAPS), data)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.variables)} == {np.dtype("float32")}
    for ours, theirs in zip(result.record["history"], exact.record["history"], strict=True):
        assert ours["loss"] != theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)
    assert isinstance(result.student, Net)
    with pytest.raises(InputError, match="Plain has no field dtype"):
        trained(Plain(rngs=nnx.Rngs(0)), data, method="cross-entropy", precision="bfloat16")


def test_an_nnx_pair_on_eight_devices_has_the_numbers_of_one(data):
    one, eight = (
        trained(Tapped(Net(4, rngs=nnx.Rngs(0)), TAPS), data, resources=Resources(devices=count))
        for count in (1, 8)
    )
    chex.assert_trees_all_close(one.variables, eight.variables, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(one.record["history"], eight.record["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def in_boxes(boxed):
    """An NNX network, made as Flax asks for it: on a mesh, whose axes its parameters name."""
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        return Net(4, rngs=nnx.Rngs(0), boxed=boxed)


@pytest.mark.parametrize(
    "make",
    [pytest.param(in_boxes, id="nnx"), pytest.param(Boxed, id="linen", marks=pytest.mark.slow)],
)
def test_boxed_parameters_are_parameters(data, make):
    plain, boxed = (trained(Tapped(make(boxed=each), TAPS), data) for each in (False, True))
    chex.assert_trees_all_equal(plain.variables, boxed.variables)
    assert isinstance(boxed.variables["params"]["conv"]["kernel"], np.ndarray | jax.Array)


@pytest.mark.slow
def test_a_teacher_with_boxed_parameters(data):
    images = jnp.zeros((1, 8, 8, 1))
    results = []
    for boxed in (False, True):
        variables = Boxed(boxed).init(jax.random.key(3), images, train=False)
        teacher = Network(Tapped(Boxed(boxed), TAPS), variables)
        results.append(trained(Tapped(Boxed(False), TAPS), data, teacher=teacher))
    chex.assert_trees_all_equal(*(each.variables for each in results))
