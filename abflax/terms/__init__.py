"""Terms: one summand of an objective each, and what it takes of the teacher."""

from abflax.terms.activation_boundary import ActivationBoundary
from abflax.terms.base import LayerTerm, Term
from abflax.terms.classification import CrossEntropy, KnowledgeDistillation, LogitRegression
from abflax.terms.features import FeatureDifference
from abflax.terms.jacobian import JacobianMatching
from abflax.terms.relations import AttentionTransfer, FlowOfSolution, NeuronSelectivity

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "CrossEntropy",
    "FeatureDifference",
    "FlowOfSolution",
    "JacobianMatching",
    "KnowledgeDistillation",
    "LayerTerm",
    "LogitRegression",
    "NeuronSelectivity",
    "Term",
]
