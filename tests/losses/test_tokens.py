"""Taps of shape [batch, tokens, features]: losses, terms and connectors see tokens as positions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from abflax import Dataset, InputError, Network, Resources, distill, load
from abflax.analysis import examine
from abflax.losses import (
    attention_map,
    attention_pixel_cotangent,
    attention_transfer,
    channel_patterns,
    factor_transfer,
    fsp,
    gram_between,
    hierarchical_context,
    largest_attention_pixel,
    neuron_selectivity,
    positions_pooled,
    similarity_preserving,
)
from abflax.methods import METHODS
from abflax.methods.connectors import common_positions, pool_positions
from abflax.methods.objective import bind, make_targets
from abflax.models.variables import init_variables
from abflax.taps import Forward, sow_features, sow_tap
from abflax.taps.linen import Linen
from abflax.training.step import create_train_state

draw = np.random.default_rng(0)
S, T = (draw.standard_normal((2, 6, 3)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(
    "loss",
    [
        attention_transfer,
        neuron_selectivity,
        lambda s, t: fsp(gram_between(s, s), gram_between(t, t)),
        hierarchical_context,
        factor_transfer,
        similarity_preserving,
        lambda s, t: attention_map(s) - attention_map(t),
        lambda s, t: channel_patterns(s) - channel_patterns(t),
        lambda s, t: largest_attention_pixel(s),
    ],
)
def test_tokens_are_a_map_one_position_wide(loss):
    chex.assert_trees_all_equal(loss(S, T), loss(S[:, :, None], T[:, :, None]))


def test_attention_of_tokens_by_hand():
    """Energies 1, 4, 4 with norm √33; beside them the teacher's, all equal."""
    tokens = jnp.array([[[1.0, -1.0], [2.0, 2.0], [-2.0, 2.0]]])
    energy = np.array([1.0, 4.0, 4.0]) / np.sqrt(33)
    chex.assert_trees_all_close(attention_map(tokens)[0], energy, rtol=1e-6)
    expected = np.mean((energy - np.sqrt(1 / 3)) ** 2)
    chex.assert_trees_all_close(attention_transfer(tokens, jnp.ones((1, 3, 5)))[0], expected,
                                rtol=1e-5)  # fmt: skip
    assert int(largest_attention_pixel(tokens)[0]) == 1
    cotangent = attention_pixel_cotangent(tokens, jnp.array([2]))
    chex.assert_trees_all_close(cotangent, tokens.at[:, :2].set(0))  # 2F/C with C = 2
    gram = gram_between(tokens, tokens[..., :1])
    chex.assert_trees_all_close(gram[0], np.array([[9 / 3], [-1 / 3]]), rtol=1e-6)


def test_neighbouring_tokens_are_averaged():
    small = S.reshape(2, 3, 2, 3).mean(axis=2)
    ours, theirs = positions_pooled(S, T[:, :3])
    chex.assert_trees_all_close((ours, theirs), (small[:, :, None], T[:, :3, None]), rtol=1e-6)
    shapes = {"layer1": (1, 6, 3)}, {"layer1": (1, 3, 8)}
    assert common_positions(*shapes, ("layer1",)) == (("layer1", (3,)),)
    forward = Forward(jnp.zeros((2, 10)), {"layer1": S}, None, {})
    pooled = pool_positions(forward, (("layer1", (3,)),))
    chex.assert_trees_all_close(pooled.taps["layer1"], small, rtol=1e-6)


def test_a_map_beside_tokens_is_read_row_by_row():
    board = T.reshape(2, 2, 3, 3)  # 2×3 positions
    chex.assert_trees_all_equal(attention_transfer(S, board), attention_transfer(S, T))
    chex.assert_trees_all_equal(neuron_selectivity(board, S), neuron_selectivity(T, S))
    shapes = {"layer1": (1, 6, 3)}, {"layer1": (1, 2, 3, 3)}
    assert common_positions(*shapes, ("layer1",)) == (("layer1", (6,)),)
    with pytest.raises(InputError, match=r"student's positions 6 and the teacher's 2×2, neither"):
        common_positions({"layer1": (1, 6, 3)}, {"layer1": (1, 2, 2, 3)}, ("layer1",))
    with pytest.raises(InputError, match="neither's height and width"):
        positions_pooled(S, board[:, :, :2])


class Tokens(nn.Module):
    """Two layers on the 4×4 patches of a digit."""

    width: int

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (2, 2), strides=2)(images).reshape(len(images), 16, 4)
        for layer in (1, 2):
            x = nn.Dense(self.width)(x)
            sow_tap(self, f"layer{layer}", x)
            x = nn.relu(x)
        pooled = x.mean(axis=1)
        sow_features(self, pooled)
        return nn.Dense(10)(pooled)


ON_TAPS = {
    f"{name} {phase.name}": phase
    for name in METHODS
    for phase in METHODS[name]()
    if any(term.chosen(("layer1", "layer2")) for _, term in phase.terms)
}


@pytest.mark.parametrize("name", ON_TAPS)
def test_every_method_on_taps_is_defined_on_tokens(name):
    """Of teacher and student with different widths; traced, not run."""
    student, teacher = Linen(Tokens(4)), Linen(Tokens(6))
    objective = bind(student, teacher, ON_TAPS[name], (8, 8, 1))

    def gradients(images, labels):
        ours, theirs = (m.init(jax.random.key(0), images) for m in (student, teacher))
        state = create_train_state(objective, optax.sgd(0.1), ours, {}, jax.random.key(1))
        targets, _ = make_targets(objective, theirs["params"], {}, images)
        loss = lambda params: objective.loss(params, state.batch_stats, targets, images, labels)
        return jax.value_and_grad(loss, has_aux=True)(state.params)

    (loss, _), _ = jax.eval_shape(gradients, jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, int))
    assert loss.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys(name.split()[0] for name in ON_TAPS))
def test_every_method_on_taps_learns_from_tokens(name):
    digits = load("digits", "train").take(np.arange(16))
    data = Dataset(digits.images.astype(np.float32) / 16, digits.labels, 10)
    teacher = Network(Tokens(6), init_variables(Tokens(6), jax.random.key(0), (8, 8, 1)))
    record = distill(Tokens(4), teacher, data, method=name, epochs=(2, 1), batch_size=16,
                     resources=Resources(devices=1)).record  # fmt: skip
    assert all(np.isfinite(entry["loss"]) for entry in record["history"])


def test_examine_takes_tokens():
    digits = load("digits", "train").take(np.arange(16))
    data = Dataset(digits.images.astype(np.float32) / 16, digits.labels, 10)
    one, two = (Network(Tokens(4), init_variables(Tokens(4), jax.random.key(k), (8, 8, 1)))
                for k in (0, 1))  # fmt: skip
    found = examine(one, data, two)
    assert found.match["layer1"].by_neuron.shape == (16, 4)
    assert found.match["layer1"].by_channel.shape == (4,)
    assert found.student.firing_rate["layer2"].shape == (16, 4)
