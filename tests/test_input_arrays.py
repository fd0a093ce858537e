"""Whatever is given to a loss or a metric: its result, or a sentence that names the shapes.

`--hypothesis-profile=slow` tries three hundred examples of each.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abflax import InputError, losses, metrics
from tests.strategies import FLOATS, MAPS, SHAPES, arrays


def two(shapes):
    """Two arrays, of one shape as often as not."""
    pair = st.one_of(shapes.map(lambda shape: (shape, shape)), st.tuples(shapes, shapes))
    return pair.flatmap(lambda p: st.tuples(arrays(st.just(p[0])), arrays(st.just(p[1]))))


def result_or_sentence(call, legal, shape):
    """Calls, and checks that it gives that shape if the input is legal, and else says why not."""
    try:
        found = call()
    except InputError as error:
        assert not legal, f"refused: {error}"
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) > 15, sentence
        assert re.search(r"\(.*\)|complex64|integers?, not", sentence), sentence
        return
    assert legal, "accepted"
    leaves = jax.tree.leaves(found)
    assert [leaf.shape for leaf in leaves] == ([shape] if isinstance(shape, tuple) else shape)
    for leaf in leaves:
        assert leaf.dtype in (jnp.float32, jnp.bool_, jnp.int32)


def is_real(*given):
    return all(each.dtype != jnp.complex64 for each in given)


def is_map(x):
    return x.ndim == 4 and all(x.shape[1:])


ELEMENTWISE = {
    "activation_transfer_loss": losses.activation_transfer_loss,
    "activation_transfer_hinge": losses.activation_transfer_hinge,
    "feature_difference": losses.feature_difference,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(pair=two(SHAPES))
def test_elementwise(name, pair):
    student, teacher = pair
    legal = student.shape == teacher.shape and is_real(*pair)
    result_or_sentence(lambda: ELEMENTWISE[name](*pair), legal, student.shape)


@given(pair=two(SHAPES), margin=arrays(dtypes=FLOATS))
def test_margins_and_temperatures_never_enlarge(pair, margin):
    student, teacher = pair
    try:
        spreads = np.broadcast_shapes(margin.shape, student.shape) == student.shape
    except ValueError:
        spreads = False
    legal = student.shape == teacher.shape and is_real(*pair) and spreads
    hinge = losses.activation_transfer_hinge
    result_or_sentence(lambda: hinge(student, teacher, margin), legal, student.shape)
    legal = legal and student.ndim > 0 and student.shape[-1] > 0
    kd = losses.knowledge_distillation
    result_or_sentence(lambda: kd(student, teacher, margin), legal, student.shape[:-1])


@given(x=arrays())
def test_indicator(x):
    result_or_sentence(lambda: losses.activation_indicator(x), is_real(x), x.shape)


@given(pair=two(SHAPES))
def test_agreement(pair):
    legal = pair[0].shape == pair[1].shape and is_real(*pair) and pair[0].size > 0
    result_or_sentence(lambda: metrics.activation_agreement(*pair), legal, ())


@given(pair=two(SHAPES))
def test_logits(pair):
    shape = pair[0].shape
    legal = shape == pair[1].shape and is_real(*pair) and len(shape) > 0 and shape[-1] > 0
    result_or_sentence(lambda: losses.knowledge_distillation(*pair), legal, shape[:-1])
    result_or_sentence(lambda: losses.centred_logits_difference(*pair), legal, shape)


@pytest.mark.parametrize("call", [losses.cross_entropy, metrics.misclassified])
@given(logits=arrays(), labels=arrays())
def test_labels(call, logits, labels):
    row = logits.shape[:-1]
    for given_labels in (labels, jnp.zeros(row, labels.dtype)):
        legal = (
            logits.ndim > 0 and logits.shape[-1] > 0 and given_labels.shape == row
            and given_labels.dtype in (jnp.int32, jnp.uint8) and is_real(logits)
        )  # fmt: skip
        result_or_sentence(lambda labels=given_labels: call(logits, labels), legal, row)


def pooled(a, b):
    """The common sides of two feature maps; None where there are none."""
    if not (is_map(a) and is_map(b)) or a.shape[0] != b.shape[0]:
        return None
    small, large = sorted((a.shape[1:3], b.shape[1:3]))
    fits = all(not y % x for x, y in zip(small, large, strict=True))
    return small if fits else None


@given(pair=st.one_of(two(MAPS), two(SHAPES)))
def test_feature_maps(pair):
    student, teacher = pair
    sides = pooled(*pair) if is_real(*pair) else None
    legal, batch = sides is not None, student.shape[:1]
    result_or_sentence(lambda: losses.attention_transfer(*pair), legal, batch)
    for kernel in ("linear", "polynomial", "gaussian"):
        result_or_sentence(
            lambda kernel=kernel: losses.neuron_selectivity(*pair, kernel), legal, batch
        )
    channels = (student.shape[-1:], teacher.shape[-1:])
    result_or_sentence(lambda: losses.gram_between(*pair), legal, batch + sum(channels, ()))
    shapes = [batch + sides + c for c in channels] if legal else None
    result_or_sentence(lambda: losses.positions_pooled(*pair), legal, shapes)
    same = student.shape == teacher.shape and is_real(*pair)
    images = same and is_map(student)
    result_or_sentence(lambda: losses.jacobian_difference(*pair), images, batch)
    grams = same and student.ndim == 3 and all(student.shape[1:])
    result_or_sentence(lambda: losses.fsp(*pair), grams, batch)


@given(features=st.one_of(arrays(MAPS), arrays()), index=arrays(SHAPES))
def test_one_feature_map(features, index):
    legal, batch = is_map(features) and is_real(features), features.shape[:1]
    flat = int(np.prod(features.shape[1:3]))
    result_or_sentence(lambda: losses.attention_map(features), legal, (*batch, flat))
    result_or_sentence(lambda: losses.largest_attention_pixel(features), legal, batch)
    patterns = (*batch, features.shape[-1] if features.ndim else 0, flat)
    result_or_sentence(lambda: losses.channel_patterns(features), legal, patterns)
    for given_index in (index, jnp.zeros(batch, index.dtype)):
        fits = legal and given_index.shape == batch and given_index.dtype in (jnp.int32, jnp.uint8)
        call = lambda index=given_index: losses.attention_pixel_cotangent(features, index).astype(
            jnp.float32
        )
        result_or_sentence(call, fits, features.shape)
