"""Terms on two domains, a labelled source and an unlabelled target; the teacher is trained along.

Nguyen-Meidine et al., Joint Progressive Knowledge Distillation and Unsupervised Domain Adaptation,
IJCNN 2020. Their targets are the moving teacher's, and their gradient flows into it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from abflax.errors import InputError
from abflax.losses import cross_entropy, knowledge_distillation, maximum_mean_discrepancy
from abflax.methods.terms.base import Term, features_of
from abflax.methods.views import TARGET_DOMAIN
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class TeacherCrossEntropy(Term):
    """−log p_T(label), for each example of the source. The targets are the teacher's logits."""

    trains_teacher: ClassVar[bool] = True

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's logits."""
        return teacher.logits

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the teacher's cross-entropy."""
        del student
        return cross_entropy(targets, labels)


@dataclasses.dataclass(frozen=True)
class DomainDiscrepancy(Term):
    """`maximum_mean_discrepancy` of the teacher's features of both domains.

    The targets are these features.
    """

    trains_teacher: ClassVar[bool] = True
    relates: ClassVar = "batch"
    view: ClassVar[str | None] = TARGET_DOMAIN

    def targets(self, teacher: Forward) -> tuple[jax.Array, jax.Array]:
        """Returns the teacher's features of the source and of the target."""
        return features_of(teacher), features_of(teacher.views[TARGET_DOMAIN])

    def loss(
        self, student: Forward, targets: tuple[jax.Array, jax.Array], labels: jax.Array
    ) -> jax.Array:
        """Computes the discrepancy."""
        del student, labels
        return maximum_mean_discrepancy(*targets)


@dataclasses.dataclass(frozen=True)
class TwoDomainDistillation(Term):
    """a·KD(source) + (1 − a)·cross-entropy(source) + KD(target), for each example.

    KD is τ²·KL(softmax(S/τ) ‖ softmax(T/τ)): the student's probabilities come first, which is the
    reverse of Hinton's, as in the published code. The targets are the teacher's logits of both
    domains.

    Attributes:
      source_share: a, in [0, 1].
      softening: τ > 0. (A protocol's `temperature` is another method's.)
    """

    trains_teacher: ClassVar[bool] = True
    same_classes: ClassVar[bool] = True
    view: ClassVar[str | None] = TARGET_DOMAIN
    source_share: float = 0.3
    softening: float = 20.0

    def __post_init__(self) -> None:
        if not self.softening > 0:
            raise InputError(f"the softening must be above 0, not {self.softening}")
        if not 0 <= self.source_share <= 1:
            raise InputError(f"the source's share must be in [0, 1], not {self.source_share}")

    def targets(self, teacher: Forward) -> tuple[jax.Array, jax.Array]:
        """Returns the teacher's logits of the source and of the target."""
        return teacher.logits, teacher.views[TARGET_DOMAIN].logits

    def loss(
        self, student: Forward, targets: tuple[jax.Array, jax.Array], labels: jax.Array
    ) -> jax.Array:
        """Adds the three parts."""
        ours = student.logits, student.views[TARGET_DOMAIN].logits
        source, target = (
            self.softening**2 * knowledge_distillation(teacher, own, self.softening)
            for own, teacher in zip(ours, targets, strict=True)
        )
        labelled = cross_entropy(student.logits, labels)
        return self.source_share * source + (1 - self.source_share) * labelled + target
