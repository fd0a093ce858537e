"""Terms on logits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from abflax.errors import InputError
from abflax.losses import (
    centred_logits_difference,
    correlation_distillation,
    cross_entropy,
    decoupled_distillation,
    knowledge_distillation,
    standardized_logits,
)
from abflax.methods.connectors import ExtraHead, Pair
from abflax.methods.terms.base import Term
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Term):
    """−log p(label), for each example. It needs no teacher."""

    needs_teacher: ClassVar[bool] = False

    def targets(self, teacher: Forward) -> None:
        """Returns None, since the labels are enough."""
        return

    def loss(self, student: Forward, targets: None, labels: jax.Array) -> jax.Array:
        """Computes the cross-entropy."""
        return cross_entropy(student.logits, labels)


@dataclasses.dataclass(frozen=True)
class KnowledgeDistillation(Term):
    """KL(softmax(T/τ) ‖ softmax(S/τ)), for each example (Hinton, Vinyals, Dean 2015).

    The defaults are those of the published code of activation boundaries: τ = 3, no factor τ² and
    no cross-entropy. The targets are the teacher's logits.

    Attributes:
      temperature: τ > 0.
      temperature_squared: whether to multiply by τ², as Hinton et al. do.
      cross_entropy_share: a in (1 − a)·KD + a·cross-entropy, in [0, 1].
      standardized: whether both networks' logits are standardized first (Sun et al. 2024).
    """

    same_classes: ClassVar[bool] = True
    temperature: float = 3.0
    temperature_squared: bool = False
    cross_entropy_share: float = 0.0
    standardized: bool = False

    def __post_init__(self) -> None:
        _require_temperature(self.temperature)
        if not 0 <= self.cross_entropy_share <= 1:
            raise InputError(
                f"the cross-entropy share must be in [0, 1], not {self.cross_entropy_share}"
            )

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the divergence, mixed with the cross-entropy if its share is not 0."""
        logits = _both(student.logits, targets, self.standardized)
        softened = knowledge_distillation(*logits, self.temperature)
        if self.temperature_squared:
            softened = softened * self.temperature**2
        if not self.cross_entropy_share:
            return softened
        share = self.cross_entropy_share
        return (1 - share) * softened + share * cross_entropy(student.logits, labels)


@dataclasses.dataclass(frozen=True)
class DecoupledDistillation(Term):
    """τ²·(α·TCKD + β·NCKD), for each example (Zhao et al. 2022); see `decoupled_distillation`.

    The targets are the teacher's logits.

    Attributes:
      temperature: τ > 0. The authors' is 4.
      alpha: the weight of the label's class against the others.
      beta: the weight of the distribution over the others; the authors' is 8, by pair 2 to 6.
      standardized: whether both networks' logits are standardized first (Sun et al. 2024, who take
        α 9, β 72 and τ 2).
    """

    same_classes: ClassVar[bool] = True
    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    standardized: bool = False

    def __post_init__(self) -> None:
        _require_temperature(self.temperature)

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the weighted divergences."""
        logits = _both(student.logits, targets, self.standardized)
        return decoupled_distillation(*logits, labels, self.temperature, self.alpha, self.beta)


@dataclasses.dataclass(frozen=True)
class CorrelationDistillation(Term):
    """β·inter + γ·mean over the classes of intra (Huang et al. 2022).

    See `correlation_distillation`. The targets are the teacher's logits.

    Attributes:
      temperature: τ > 0. The authors' is 4 on CIFAR-100, 1 on ImageNet.
      inter_share: β, of the correlations over the classes.
      intra_share: γ, of the correlations over the batch.
    """

    same_classes: ClassVar[bool] = True
    relates: ClassVar = "batch"
    temperature: float = 4.0
    inter_share: float = 1.0
    intra_share: float = 1.0

    def __post_init__(self) -> None:
        _require_temperature(self.temperature)

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Adds the classes' mean to each example's number."""
        del labels
        inter, intra = correlation_distillation(student.logits, targets, self.temperature)
        return self.inter_share * inter + self.intra_share * intra.mean()


def _require_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"the temperature must be above 0, not {temperature}")


def _both(
    student: jax.Array, teacher: jax.Array, standardized: bool
) -> tuple[jax.Array, jax.Array]:
    if standardized:
        return standardized_logits(student), standardized_logits(teacher)
    return student, teacher


@dataclasses.dataclass(frozen=True)
class LogitRegression(Term):
    """The mean over the teacher's classes of (S − mean S − (T − mean T))², for each example.

    S are the logits of an extra head on the student's features, over the teacher's classes, which
    may differ from those of the images (Srinivas, Fleuret, ICML 2018). The targets are the
    teacher's logits.
    """

    transfers: ClassVar[bool] = True

    def module(self, pair: Pair) -> ExtraHead:
        """Adds the extra head."""
        return ExtraHead.between(pair)

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the mean squared difference of centered logits."""
        del labels
        return centred_logits_difference(student.logits, targets).mean(axis=-1)
