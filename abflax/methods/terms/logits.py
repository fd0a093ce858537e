"""Terms on logits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from abflax.errors import InputError
from abflax.losses import centred_logits_difference, cross_entropy, knowledge_distillation
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
    """

    temperature: float = 3.0
    temperature_squared: bool = False
    cross_entropy_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"the temperature must be above 0, not {self.temperature}")
        if not 0 <= self.cross_entropy_share <= 1:
            raise InputError(
                f"the cross-entropy share must be in [0, 1], not {self.cross_entropy_share}"
            )

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the divergence, mixed with the cross-entropy if its share is not 0."""
        softened = knowledge_distillation(student.logits, targets, self.temperature)
        if self.temperature_squared:
            softened = softened * self.temperature**2
        if not self.cross_entropy_share:
            return softened
        share = self.cross_entropy_share
        return (1 - share) * softened + share * cross_entropy(student.logits, labels)


@dataclasses.dataclass(frozen=True)
class LogitRegression(Term):
    """The mean over the teacher's classes of (S − mean S − (T − mean T))², for each example.

    S are the logits of an extra head on the student's features, over the teacher's classes, which
    may differ from those of the images (Srinivas, Fleuret, ICML 2018). The targets are the
    teacher's logits.
    """

    transfers: ClassVar[bool] = True
    connects: ClassVar = "features"

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the mean squared difference of centered logits."""
        del labels
        return centred_logits_difference(student.logits, targets).mean(axis=-1)
