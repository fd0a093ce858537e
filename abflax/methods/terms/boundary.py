"""A term on boundary-supporting samples."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from abflax.errors import InputError
from abflax.losses import knowledge_distillation
from abflax.methods.terms.base import Term
from abflax.methods.views import boundary_base
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class BoundarySupport(Term):
    """KL(boundary samples), for each example (Heo et al., AAAI 2019).

    KL is that of the teacher's and the student's probabilities, both softened by τ, without τ².
    (The published code has the cross-entropy, whose gradient is the same.) It is the mean over the
    examples of `boundary_base`. The targets are the teacher's logits of images and samples.

    Attributes:
      temperature: τ > 0.
      attack_size: the most examples of a batch that count; the authors' is 64 of 256.
    """

    view: ClassVar[str | None] = "boundary"
    same_classes: ClassVar[bool] = True
    relates: ClassVar = "batch"
    temperature: float = 3.0
    attack_size: int = 64

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"the temperature must be above 0, not {self.temperature}")
        if self.attack_size < 1:
            raise InputError(f"attack_size must be at least 1, not {self.attack_size}")

    def targets(self, teacher: Forward) -> tuple[jax.Array, jax.Array]:
        """Returns the teacher's logits of the images and of the boundary samples."""
        return teacher.logits, teacher.views["boundary"].logits

    def loss(
        self, student: Forward, targets: tuple[jax.Array, jax.Array], labels: jax.Array
    ) -> jax.Array:
        """Computes the divergence."""
        teacher, at_boundary = targets
        base = boundary_base(student.logits, teacher, labels, self.attack_size)
        share = jnp.where(base, len(base) / jnp.maximum(base.sum(), 1), 0)
        return share * knowledge_distillation(
            student.views["boundary"].logits, at_boundary, self.temperature
        )
