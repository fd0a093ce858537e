"""Terms: the summands of an objective, and the targets that they need from the teacher."""

from abflax.methods.terms.activation_boundary import ActivationBoundary
from abflax.methods.terms.base import LayerTerm, Term
from abflax.methods.terms.boundary import BoundarySupport
from abflax.methods.terms.domains import (
    DomainDiscrepancy,
    TeacherCrossEntropy,
    TwoDomainDistillation,
)
from abflax.methods.terms.factors import FactorTransfer, Paraphrasing
from abflax.methods.terms.features import FeatureDifference
from abflax.methods.terms.jacobian import JacobianMatching
from abflax.methods.terms.logits import (
    CorrelationDistillation,
    CrossEntropy,
    DecoupledDistillation,
    KnowledgeDistillation,
    LogitRegression,
)
from abflax.methods.terms.maps import (
    KnowledgeReview,
    OverhaulDifference,
    SoftmaxRegression,
    VariationalInformation,
)
from abflax.methods.terms.pairs import (
    CorrelationCongruence,
    ProbabilisticTransfer,
    RelationalDistillation,
    SimilarityPreserving,
)
from abflax.methods.terms.relations import AttentionTransfer, FlowOfSolution, NeuronSelectivity

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "BoundarySupport",
    "CorrelationCongruence",
    "CorrelationDistillation",
    "CrossEntropy",
    "DecoupledDistillation",
    "DomainDiscrepancy",
    "FactorTransfer",
    "FeatureDifference",
    "FlowOfSolution",
    "JacobianMatching",
    "KnowledgeDistillation",
    "KnowledgeReview",
    "LayerTerm",
    "LogitRegression",
    "NeuronSelectivity",
    "OverhaulDifference",
    "Paraphrasing",
    "ProbabilisticTransfer",
    "RelationalDistillation",
    "SimilarityPreserving",
    "SoftmaxRegression",
    "TeacherCrossEntropy",
    "Term",
    "TwoDomainDistillation",
    "VariationalInformation",
]
