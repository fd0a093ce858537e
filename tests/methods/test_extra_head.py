"""DTL: an extra head learns the teacher's classes, which may differ from the images'."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from abflax import InputError
from abflax.losses import cross_entropy
from abflax.methods import METHODS
from abflax.methods.objective import bind, make_targets
from abflax.models.variables import init_variables
from abflax.taps import run_model
from abflax.training.step import create_train_state
from tests.conftest import Tiny

SHAPE = (8, 8, 1)


def _bound(student, classes, method="dtl"):
    """Returns the objective, state and teacher of the method's first phase."""
    teacher = Tiny(12, num_classes=classes)
    (phase, *_) = METHODS[method](protocol="paper")
    objective = bind(student, teacher, phase, SHAPE)
    variables = init_variables(teacher, jax.random.key(1), SHAPE)
    ours = init_variables(student, jax.random.key(2), SHAPE)
    stats, key = variables["batch_stats"], jax.random.key(3)
    state = create_train_state(objective, optax.identity(), ours, stats, key)
    return objective, state, variables


def test_loss_is_the_formula_and_the_head_is_trained():
    student = Tiny(6)
    objective, state, teacher = _bound(student, classes=7)
    images = jax.random.normal(jax.random.key(4), (4, *SHAPE))
    labels = jnp.arange(4)
    targets, _ = make_targets(
        objective, teacher["params"], {"batch_stats": teacher["batch_stats"]}, images
    )
    loss, gradients = jax.jit(
        jax.value_and_grad(
            lambda p: objective.loss(p, state.batch_stats, targets, images, labels)[0]
        )
    )(state.params)
    ours = state.student
    forward = run_model(objective.student, ours, images, train=True)
    head = state.params["connectors"]["term1"]["head"]
    assert head["kernel"].shape == (12, 7)
    ours = np.asarray(forward.features @ head["kernel"] + head["bias"])
    theirs = np.asarray(run_model(objective.teacher, teacher, images, train=False).logits)
    ours, theirs = (x - x.mean(axis=1, keepdims=True) for x in (ours, theirs))
    expected = 10 * np.mean((ours - theirs) ** 2) + cross_entropy(forward.logits, labels).mean()
    chex.assert_trees_all_close(loss, jnp.asarray(expected), rtol=1e-5)
    # 10 · 2/(batch · classes) · featuresᵀ(S − T), already centered.
    expected = 20 / 28 * np.asarray(forward.features).T @ (ours - theirs)
    found = gradients["connectors"]["term1"]["head"]["kernel"]
    chex.assert_trees_all_close(found, jnp.asarray(expected), rtol=1e-4, atol=1e-6)


def test_it_adds_up_with_connectors():
    objective, state, _ = _bound(Tiny(6), 7, "activation-boundary+dtl")
    assert sorted(state.params["connectors"]) == ["term0", "term2"]
    assert objective.measured == ("layer1", "layer2")


def test_a_student_that_sows_no_features_is_refused():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Dense(10)(images.reshape(len(images), -1))

    with pytest.raises(InputError, match="reads the features, which the student does not sow"):
        _bound(Plain(), 7)
