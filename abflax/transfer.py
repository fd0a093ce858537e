"""What becomes of a method where the teacher tells other classes apart than the student."""

from __future__ import annotations

from abflax.errors import InputError
from abflax.terms import CrossEntropy, KnowledgeDistillation, LogitRegression, Term

Weighted = tuple[tuple[float, Term], ...]
"""(weight, term), …: an objective."""


def without_logits(
    name: str, initialise: Weighted, classify: Weighted, weight: float
) -> tuple[Weighted, Weighted]:
    """A method's two stages without a comparison of the two networks' own logits.

    KD, which would compare them, gives way to cross-entropy and DTL (Srinivas, Fleuret 2018), which
    compares logits over the teacher's classes through an extra head; DTL stands beside what a
    stage before it transfers, as in the published code of Heo et al. 2019. Of a method that
    transfers the same to the end, both stages are one, as its authors train it.

    Args:
      name: of the method.
      initialise, classify: its stages.
      weight: of DTL.

    Raises:
      ValueError: if the method is KD from the start.
    """
    kept = tuple(pair for pair in classify if not isinstance(pair[1], KnowledgeDistillation))
    if any(isinstance(term, KnowledgeDistillation) for _, term in initialise):
        raise InputError(
            f"method {name} compares logits over the same classes, which a teacher of other "
            "classes does not have; dtl compares those over the teacher's own"
        )
    if kept == classify:
        return initialise, classify
    logits = (weight, LogitRegression())
    after = (*kept, (1.0, CrossEntropy()), logits)
    return after if kept == initialise else (*initialise, logits), after
