"""The later methods' losses by hand, at their edges, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax.errors import InputError
from abflax.losses import (
    correlation_congruence,
    correlation_distillation,
    decoupled_distillation,
    factor_transfer,
    hierarchical_context,
    knowledge_distillation,
    linear_time_discrepancy,
    maximum_mean_discrepancy,
    overhaul_difference,
    overhaul_margin,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
    standardized_logits,
    variational_information,
)

ROWS = (
    similarity_preserving,
    relational_distance,
    relational_angle,
    probabilistic_transfer,
    correlation_congruence,
    linear_time_discrepancy,
    maximum_mean_discrepancy,
)


def _assert_close(found, expected):
    chex.assert_trees_all_close(found, jnp.asarray(expected, found.dtype), rtol=1e-5, atol=1e-6)


def test_decoupled_distillation_by_hand():
    """Probabilities: student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2); the label is class 0."""
    student, teacher = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    labels = jnp.array([0])
    of_label = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    of_others = np.log(1 / 3 / 0.5) / 3 + np.log(2 / 3 / 0.5) * 2 / 3
    found = decoupled_distillation(student, teacher, labels, 1.0, 2.0, 3.0)
    _assert_close(found, [2 * of_label + 3 * of_others])
    # KD is the sum of its parts, the second times the teacher's probability of other classes.
    parts = decoupled_distillation(student, teacher, labels, 1.0, 1.0, 0.75)
    _assert_close(parts, knowledge_distillation(student, teacher))


def test_decoupled_distillation_of_certain_networks_is_finite():
    """1 − p underflows, where the published code has −∞; with two classes NCKD is 0."""
    logits = jnp.array([[400.0, 0.0], [0.0, 400.0]])
    loss, gradient = jax.value_and_grad(
        lambda s: decoupled_distillation(s, logits, jnp.array([0, 0]), 1.0, 1.0, 1e6).sum()
    )(-logits)
    _assert_close(loss, 800.0)
    assert np.isfinite(gradient).all()


def test_decoupled_distillation_of_labels_outside_the_classes_is_no_number():
    x, y = (jax.random.normal(jax.random.key(k), (3, 4)) for k in (0, 1))
    found = decoupled_distillation(x, y, jnp.array([-1, 3, 4]))
    chex.assert_trees_all_equal(np.isfinite(found), np.array([False, True, False]))


def test_standardized_logits_by_hand():
    x = jnp.array([[1.0, 2.0, 3.0], [0.0, 3.0, 0.0], [0.3, 0.3, 0.3]])
    third = 1 / np.sqrt(3)
    expected = [[-1, 0, 1], [-third, 2 * third, -third], [0, 0, 0]]
    _assert_close(standardized_logits(x), expected)
    gradient = jax.grad(lambda x: (standardized_logits(x) * jnp.array([1.0, 2.0, 4.0])).sum())(x)
    _assert_close(gradient[2], [0, 0, 0])


def test_correlation_distillation_by_hand():
    """ρ is ½ between (1, 0, 0) − ⅓ and (½, 0, ½) − ⅓, and 1 of a row with itself."""
    student = jnp.log(jnp.array([[1.0, 1e-20, 1e-20], [0.2, 0.3, 0.5]]))
    teacher = jnp.log(jnp.array([[0.5, 1e-20, 0.5], [0.2, 0.3, 0.5]]))
    inter, intra = correlation_distillation(student, teacher)
    _assert_close(inter, [0.5, 0.0])
    _assert_close(intra[:2], [0.0, 0.0])  # two points lie on a line
    assert intra.shape == (3,)
    # The third class is the student's 0, ½; the teacher's is ½, ½: constant, so ρ is 0.
    _assert_close(intra[2], 1.0)


@pytest.mark.parametrize("loss", ROWS)
def test_equal_features_have_loss_and_gradient_zero(loss):
    x = jax.random.normal(jax.random.key(0), (5, 3))
    x = x.at[1].set(x[0]).at[3].set(0.0)
    shares, pullback = jax.vjp(lambda s: loss(s, x), x)
    assert shares.shape == (5,)
    chex.assert_trees_all_close(shares, jnp.zeros(5), atol=1e-6)
    chex.assert_trees_all_close(pullback(jnp.ones(5))[0], jnp.zeros((5, 3)), atol=1e-6)


@pytest.mark.parametrize("tiny", [1e-18, 1e-20, 1e-30, 1e-42])
def test_gradients_are_finite_where_squares_underflow(tiny):
    """Tiny logits and features, and a class that no example of the batch may be of."""
    x, y = (jax.random.normal(jax.random.key(k), (5, 3)) for k in (0, 1))
    unlikely = x.at[:, 1].add(np.log(tiny))

    def standardized(logits):
        return knowledge_distillation(standardized_logits(logits), y)

    def intra(logits):
        return correlation_distillation(logits, y)[1]

    for loss, student in (
        (standardized, tiny * x),
        (standardized, x.at[0].multiply(tiny)),
        (intra, tiny * x),
        (intra, unlikely),
        (lambda f: probabilistic_transfer(f, y), x.at[0].multiply(tiny)),
    ):
        gradient = jax.grad(lambda s, loss=loss: loss(s).sum())(student)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", ROWS)
def test_lower_precision_is_computed_in_float32(loss):
    s, t = (jax.random.normal(jax.random.key(k), (4, 3), jnp.bfloat16) for k in (0, 1))
    found = loss(s, t)
    assert found.dtype == jnp.float32
    chex.assert_trees_all_equal(found, loss(s.astype(jnp.float32), t.astype(jnp.float32)))


def test_similarity_preserving_by_hand():
    """Orthogonal rows give the unit matrix; equal ones 1/√2 everywhere."""
    found = similarity_preserving(jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.ones((2, 1, 1, 7)))
    share = ((1 - 0.5**0.5) ** 2 + 0.5) / 2
    _assert_close(found, [share, share])


def test_relational_distance_by_hand():
    """On a line at 0, 1, 3 the distances are 1, 3, 2: in means of 2, ½, 3/2, 1."""
    found = relational_distance(jnp.array([[0.0], [1.0], [3.0]]), jnp.array([[0.0], [7.0], [14.0]]))
    # At 0, 7, 14: 3/4, 3/2, 3/4. The differences are ¼, 0, ¼, squared and halved.
    _assert_close(found, np.array([1 / 32, 1 / 16, 1 / 32]) / 3)


def test_relational_angle_by_hand():
    """A right angle at 0 with two of 45° becomes a line, whose cosines are −1, 1, 1."""
    corner = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    line = jnp.array([[0.0], [1.0], [-1.0]])
    acute = (1 - 0.5**0.5) ** 2 / 2
    _assert_close(relational_angle(corner, line), np.array([0.5, acute, acute]) * 2 / 9)


def test_probabilistic_transfer_by_hand():
    """Orthogonal rows have affinities (1, ½), equal ones (1, 1), each over their sum."""
    found = probabilistic_transfer(jnp.ones((2, 1)), jnp.eye(2))
    share = (2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)) / 2
    _assert_close(found, [share, share])


def test_correlation_congruence_by_hand():
    student, teacher = jnp.array([[1.0, 2.0], [0.0, 1.0], [5.0, 5.0]]), jnp.array([[0.0, 0.0]] * 3)
    _assert_close(correlation_congruence(student, -teacher), [1.5 * 2, 1.5 * 5, 0])


def test_maximum_mean_discrepancy_by_hand():
    """Rows 0, 0 and 1, 1: of 12 pairs 8 have d² = 1, so b = 1/6."""
    found = maximum_mean_discrepancy(jnp.zeros((2, 1)), jnp.ones((2, 1)))
    share = 2 * (5 - sum(np.exp(-6 / 2**k) for k in range(5)))
    _assert_close(found, [share, share])


def test_linear_time_discrepancy_by_hand():
    """Rows 0, 1 and 1, 0: of 12 pairs 8 have d² = 1, so b = 1/6."""
    found = linear_time_discrepancy(jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [0.0]]))
    share = 2 * (sum(np.exp(-6 / 2**k) for k in range(5)) - 5)
    _assert_close(found, [share, share])


def test_overhaul_margin_by_hand():
    """The half-normal's mean; no spread; all but never negative; all but always."""
    scale, bias = jnp.array([-2.0, 0.0, 0.0, 1.0, 1.0]), jnp.array([0.0, -3.0, 3.0, 4.0, -9.0])
    expected = [-2 * np.sqrt(2 / np.pi), -3.0, 0.0, -3.0, -9.0]
    _assert_close(overhaul_margin(scale, bias), expected)


def test_overhaul_difference_by_hand():
    student = jnp.array([2.0, 0.5, -3.0, -0.5, -3.0, -2.0])
    teacher = jnp.array([1.0, 1.0, -1.0, -1.0, -9.0, -9.0])
    loss, gradient = jax.vmap(jax.value_and_grad(overhaul_difference), (0, 0, None))(
        student, teacher, -2.0
    )
    # Above and below a positive target; below and above a negative one; below and at the margin.
    _assert_close(loss, [1.0, 0.25, 0.0, 0.25, 0.0, 0.0])
    _assert_close(gradient, [2.0, -1.0, 0.0, 1.0, 0.0, 0.0])


def test_variational_information_by_hand():
    variance = np.array([1.0, 4.0])
    log_scale = np.log(np.expm1(variance - 1e-5))
    found = variational_information(jnp.array([[3.0, 5.0]]), jnp.array([[1.0, 1.0]]), log_scale)
    _assert_close(found, [(4 / 1 + 16 / 4 + np.log(4)) / 4])


def test_hierarchical_context_by_hand():
    """A checkerboard vanishes in every average; a constant has the same error in each."""
    board = jnp.asarray((-1.0) ** np.add.outer(np.arange(8), np.arange(8)))[None, :, :, None]
    zeros = jnp.zeros_like(board)
    _assert_close(hierarchical_context(board, zeros), [1 / (1 + 1 / 2 + 1 / 4 + 1 / 8)])
    _assert_close(hierarchical_context(zeros + 3, zeros), [9.0])
    # Maps of two rows are compared as they are, and as their mean.
    small = board[:, :2, :2]
    _assert_close(hierarchical_context(small, 0 * small), [1 / 1.5])


def test_factor_transfer_by_hand():
    student, teacher = (
        jnp.array([[[[3.0, 0.0]], [[0.0, 4.0]]]]),
        jnp.array([[[[0.0, 0.0]], [[0.0, 2.0]]]]),
    )
    _assert_close(factor_transfer(student, teacher), [(0.6 + 0.2) / 4])
    norm = np.sqrt(9**2 + 16**2)
    expected = (9 / norm + 1 - 16 / norm) / 2
    _assert_close(factor_transfer(student, teacher, channels_averaged=True), [expected])
    gradient = jax.grad(lambda s: factor_transfer(s, s).sum())(teacher)
    _assert_close(gradient, np.zeros(teacher.shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: decoupled_distillation(x, x[:, :2], jnp.zeros(2, int)), "the student's shape"),
        (lambda x: decoupled_distillation(x, x, jnp.zeros(2)), "labels are integers"),
        (lambda x: decoupled_distillation(x[:, :1], x[:, :1], jnp.zeros(2, int)), "two classes"),
        (lambda x: standardized_logits(x[:, :1]), "two classes"),
        (lambda x: correlation_distillation(x[0], x[0]), r"\[batch, classes\]"),
        (lambda x: similarity_preserving(x, x[:1]), "batch sizes"),
        (lambda x: relational_angle(x[0], x[0]), r"\[batch, …\]"),
        (lambda x: relational_distance(x[:1], x[:1]), "two examples"),
        (lambda x: correlation_congruence(x, x[:, :2]), "the student's shape"),
        (lambda x: maximum_mean_discrepancy(x[0], x[0]), r"\[batch, features\]"),
        (lambda x: overhaul_margin(x[0], x[0, :1]), "the student's shape"),
        (lambda x: overhaul_difference(x, x, x[:, :2]), "a margin"),
        (lambda x: variational_information(x, x, x[0, :2]), "a log_scale"),
        (lambda x: hierarchical_context(x, x), "a feature map"),
        (lambda x: factor_transfer(x, x), "a feature map"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call(jnp.ones((2, 3)))
