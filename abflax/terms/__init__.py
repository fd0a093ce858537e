"""Terms: one summand of an objective each, and what it takes of the teacher."""

from abflax.terms.activation_boundary import ActivationBoundary
from abflax.terms.base import Term
from abflax.terms.classification import CrossEntropy, KnowledgeDistillation

__all__ = ["ActivationBoundary", "CrossEntropy", "KnowledgeDistillation", "Term"]
