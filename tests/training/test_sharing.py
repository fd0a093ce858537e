"""Runs of one process share compiled programs where they compute the same, and there alone."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import Network, RunConfig, distill, distill_group, evaluate, load
from abflax.methods import METHODS, Phase, bind
from abflax.methods.terms import Term
from abflax.training.fingerprint import code_digest, program_digests

ACTIVATION = nn.tanh
LARGEST = 4


class Net(nn.Module):
    """Networks with equal fields may compute differently."""

    kind: Any

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (3, 3), strides=4)(images)
        x = ACTIVATION(x) if self.kind is True else nn.relu(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def data():
    return load("digits", "train").take(np.arange(32))


def _losses(data, *kinds):
    settings = {"method": "cross-entropy", "epochs": (0, 1), "batch_size": 16}
    runs = [{"student": Net(kind)} for kind in kinds]
    results = distill_group(runs, Net(True), None, data, **settings)
    return [result.record["history"][-1]["loss"] for result in results]


def test_each_run_of_a_group_is_compiled_for_its_own_code(data, monkeypatch):
    """Though the modules are equal, or others of the group compute what one did before."""
    tanh, relu = _losses(data, True, 1)
    assert tanh != relu and [relu] == _losses(data, 1)
    monkeypatch.setattr(f"{__name__}.ACTIVATION", nn.relu)
    assert _losses(data, True, 1) == [relu, relu]


@dataclasses.dataclass(frozen=True)
class Hardest(Term):
    """The cross-entropy of the hardest examples of a batch, of which small batches have fewer."""

    needs_teacher: ClassVar[bool] = False

    def loss(self, student, targets, labels):
        losses = -jax.nn.log_softmax(student.logits)[jnp.arange(len(labels)), labels]
        least = jax.lax.top_k(losses, min(LARGEST, len(labels)))[0][-1]
        return jnp.where(losses >= least, losses, 0.0)


def test_a_term_is_known_by_what_it_computes_of_a_whole_batch(data, monkeypatch):
    phases = [Phase("joint", [(1.0, Hardest())])]
    config = RunConfig.create(
        dataset="digits", student="net", method=phases, epochs=(1,), batch_size=16
    )
    digests = lambda: program_digests([(config, Net(True))], [], data)[config.hash]  # noqa: E731
    before = digests()
    assert digests() == before
    monkeypatch.setattr(f"{__name__}.LARGEST", 12)
    now = digests()
    assert [name for name in before if now[name] != before[name]] == ["phase joint's computation"]


class Shifted(nn.Module):
    """A network that adds to batches of more than `LARGEST` images."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.mean(axis=(1, 2)) + max(0, len(images) - LARGEST))


def test_a_network_is_known_by_what_it_computes_of_an_evaluations_batch(data, monkeypatch):
    network = Network(Shifted(), Shifted().init(jax.random.key(0), data.images[:1]))
    before = evaluate(network, data)["test_cross_entropy"]
    monkeypatch.setattr(f"{__name__}.LARGEST", 12)
    assert evaluate(network, data)["test_cross_entropy"] != before


class OwnRule(nn.Module):
    """A network whose backward rule holds an array of its forward pass."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (3, 3), strides=4)(images)
        mask = (images.mean(axis=(1, 2), keepdims=True) > 0).astype(x.dtype)[..., :1]

        @jax.custom_vjp
        def masked(x):
            return x * mask

        masked.defvjp(lambda x: (x * mask, None), lambda _, cotangent: (cotangent * mask,))
        return nn.Dense(10)(masked(x).mean(axis=(1, 2)))


class Head(nn.Module):
    """A batch norm that names an axis of its own, and a classifier."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(nn.BatchNorm(not train, axis_name="batch")(x))


class OwnAxis(nn.Module):
    """A network whose norm names an axis of its own behind a backward rule."""

    @nn.compact
    def __call__(self, images, *, train=False):
        forward = lambda head, x: head(x, train)  # noqa: E731
        call = nn.custom_vjp(
            forward,
            forward_fn=lambda head, x: nn.vjp(forward, head, x),
            backward_fn=lambda pullback, cotangent: pullback(cotangent),
        )
        return call(Head(), nn.Conv(4, (3, 3), strides=4)(images).mean(axis=(1, 2)))


@pytest.mark.parametrize("model", [OwnRule(), OwnAxis()], ids=["closure", "axis"])
def test_backward_rules_of_ones_own(model):
    assert code_digest(model, (8, 8, 1)) == code_digest(model, (8, 8, 1))
    (phase,) = METHODS["cross-entropy"]()
    assert all(jax.tree.leaves(bind(model, None, phase, (8, 8, 1), axis_name="x").trainable()))


def test_a_network_with_a_backward_rule_trains(data):
    distill(OwnRule(), None, data, method="cross-entropy", epochs=(0, 1), batch_size=16)
