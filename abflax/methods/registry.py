"""Methods, as data: a name, and the terms of the phases that it stands for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from abflax.errors import InputError, require_types, type_hints, unknown
from abflax.methods.phase import Phase
from abflax.methods.protocols import Protocol, WeightedTerms, find_protocol
from abflax.methods.terms import (
    ActivationBoundary,
    AttentionTransfer,
    BoundarySupport,
    CorrelationCongruence,
    CorrelationDistillation,
    CrossEntropy,
    DecoupledDistillation,
    DomainDiscrepancy,
    FactorTransfer,
    FeatureDifference,
    FlowOfSolution,
    JacobianMatching,
    KnowledgeDistillation,
    KnowledgeReview,
    LogitRegression,
    NeuronSelectivity,
    OverhaulDifference,
    Paraphrasing,
    ProbabilisticTransfer,
    RelationalDistillation,
    SimilarityPreserving,
    SoftmaxRegression,
    TeacherCrossEntropy,
    Term,
    TwoDomainDistillation,
    VariationalInformation,
)
from abflax.methods.weights import Progressive, Ramp, Schedule, Weight


@dataclasses.dataclass(frozen=True)
class Method:
    """A name's meaning: which terms fill the initialise and the classify phase.

    Two phases with the same terms merge into one, "joint", over all epochs.

    Attributes:
      summary: one line.
      reference: the source.
      initialise: terms with the method's own defaults. The protocol's choices (`layer_ratio`,
        `temperature`) and the caller's options replace their fields.
      classify: the terms of the second phase, likewise.
      classifies: whether the method, added to one that transfers, replaces the knowledge
        distillation that this brings, and leaves the initialise phase to it.
      weights: class of a term -> its weight, where that is not 1 or, of a transfer loss, the
        protocol's.
    """

    summary: str
    reference: str
    initialise: tuple[Term, ...]
    classify: tuple[Term, ...]
    classifies: bool = False
    weights: Mapping[type[Term], Weight] = dataclasses.field(default_factory=dict)

    @property
    def transfers(self) -> bool:
        """Whether one of its terms is a transfer loss."""
        return any(term.transfers for term in (*self.initialise, *self.classify))


def _alone(*terms: Term) -> dict[str, Any]:
    return {"initialise": terms, "classify": terms}


def _two_stage(term: Term) -> dict[str, Any]:
    return {"initialise": (term,), "classify": (KnowledgeDistillation(),)}


def _joint(term: Term) -> dict[str, Any]:
    return {"initialise": (term,), "classify": (term, KnowledgeDistillation())}


def _power(power: float) -> Method:
    return Method(
        f"activations neuron by neuron, |difference|^{power:g}, then softened logits",
        "Heo et al., AAAI 2019, Table 7",
        **_two_stage(FeatureDifference(power=power)),
    )


_METHODS: dict[str, Method] = {
    "cross-entropy": Method("labels alone, no teacher", "-", **_alone(CrossEntropy())),
    "kd": Method(
        "softened logits", "Hinton, Vinyals, Dean 2015", **_alone(KnowledgeDistillation())
    ),
    "rco": Method(
        "softened logits, of a list of teachers one after the other",
        "Jin et al., ICCV 2019",
        **_alone(KnowledgeDistillation()),
    ),
    "fitnet": Method(
        "the last layer's activations, then softened logits",
        "Romero et al., ICLR 2015",
        **_two_stage(FeatureDifference(layers=("last",))),
    ),
    "fsp": Method(
        "Gram matrices between consecutive layers, then softened logits",
        "Yim et al., CVPR 2017",
        **_two_stage(FlowOfSolution()),
    ),
    "attention": Method(
        "where each layer is active, all along",
        "Zagoruyko, Komodakis, ICLR 2017",
        **_joint(AttentionTransfer()),
    ),
    "jacobian": Method(
        "the input-gradient of each layer's largest attention, and attention, all along",
        "Srinivas, Fleuret, ICML 2018",
        **_joint(JacobianMatching()),
    ),
    "activation-boundary": Method(
        "whether each hidden neuron fires, then softened logits",
        "Heo, Lee, Yun, Choi, AAAI 2019",
        **_two_stage(ActivationBoundary()),
    ),
    "l2": _power(2.0),
    "l1": _power(1.0),
    "l0.5": _power(0.5),
    "nst": Method(
        "where each channel is active, all along",
        "Huang, Wang 2017",
        **_joint(NeuronSelectivity()),
    ),
    "dkd": Method(
        "softened logits, the label's class apart from the others; and labels",
        "Zhao et al., CVPR 2022",
        **_alone(CrossEntropy(), DecoupledDistillation()),
        classifies=True,
    ),
    "kd-standardized": Method(
        "softened logits up to shift and scale, and labels",
        "Sun et al., CVPR 2024",
        **_alone(
            KnowledgeDistillation(
                temperature_squared=True, cross_entropy_share=0.1, standardized=True
            )
        ),
        classifies=True,
    ),
    "dist": Method(
        "correlations of probabilities over the classes and over the batch, and labels",
        "Huang et al., NeurIPS 2022",
        **_alone(CrossEntropy(), CorrelationDistillation()),
        classifies=True,
    ),
    "bss": Method(
        "softened logits, on images and on images at the teacher's boundary; and labels",
        "Heo et al., AAAI 2019 (boundary-supporting samples)",
        **_alone(CrossEntropy(), KnowledgeDistillation(), BoundarySupport()),
        classifies=True,
        # Published: 1 + 3·(1 − e/80) and max(2·(1 − 4/3·e/80), 0) in the epoch e of 80.
        weights={
            KnowledgeDistillation: Ramp(4.0, 1.0),
            BoundarySupport: Ramp(2.0, 0.0, share=0.75),
        },
    ),
    "progressive-uda": Method(
        "two domains: the teacher adapts to unlabelled target_data, the student learns from it",
        "Nguyen-Meidine et al., IJCNN 2020",
        **_alone(TeacherCrossEntropy(), DomainDiscrepancy(), TwoDomainDistillation()),
        weights={
            TeacherCrossEntropy: Progressive("teacher"),
            DomainDiscrepancy: Progressive("discrepancy"),
            TwoDomainDistillation: Progressive("student"),
        },
    ),
    "sp": Method(
        "which examples are similar in the last layer, all along",
        "Tung, Mori, ICCV 2019",
        **_joint(SimilarityPreserving()),
    ),
    "rkd": Method(
        "distances and angles between the examples' features, all along",
        "Park et al., CVPR 2019",
        **_joint(RelationalDistillation()),
    ),
    "pkt": Method(
        "how near the examples' features are to each other, as probabilities, all along",
        "Passalis, Tefas, ECCV 2018",
        **_joint(ProbabilisticTransfer()),
    ),
    "cc": Method(
        "products of neighbours' differences of embedded features, all along",
        "Peng et al., ICCV 2019",
        **_joint(CorrelationCongruence()),
    ),
    "vid": Method(
        "the likelihood of the teacher's taps given the student's, all along",
        "Ahn et al., CVPR 2019",
        **_joint(VariationalInformation()),
    ),
    "ofd": Method(
        "activations neuron by neuron where the teacher's or the excess is positive; and labels",
        "Heo et al., ICCV 2019",
        **_alone(CrossEntropy(), OverhaulDifference()),
    ),
    "reviewkd": Method(
        "each layer, fused with the deeper ones, against the teacher's; and labels",
        "Chen et al., CVPR 2021",
        **_alone(CrossEntropy(), KnowledgeReview()),
    ),
    "ft": Method(
        "a paraphraser of the teacher's last layer alone; then its factors, and labels",
        "Kim, Park, Kwak, NeurIPS 2018",
        initialise=(Paraphrasing(),),
        classify=(CrossEntropy(), FactorTransfer()),
    ),
    "srrl": Method(
        "the features, also through the teacher's classifier; and labels",
        "Yang et al., ICLR 2021",
        **_alone(CrossEntropy(), SoftmaxRegression()),
    ),
    "dtl": Method(
        "labels, and through an extra head the teacher's centred logits over its own classes",
        "Srinivas, Fleuret, ICML 2018",
        **_alone(CrossEntropy(), LogitRegression()),
    ),
}
_POWER = re.compile(r"l(\d+(?:\.\d+)?)")


class Methods(Mapping[str, Any]):
    """name -> a callable that makes the phases; names add up with "+".

    `METHODS["activation-boundary"](protocol="official", setting="cifar", margin=2.0)` is a tuple
    of `Phase`. An option is a field of one of the method's terms (`margin`, `layers`,
    `temperature`, …) or `transfer_weight`, a factor on every transfer loss; any other raises
    `ValueError`, and so does an unknown method, protocol or setting.

    Examples:
      >>> phases = METHODS["activation-boundary"](protocol="official", margin=2.0)
      >>> for phase in phases:
      ...     print(phase.name, phase.terms)
      initialise ((0.003, ActivationBoundary(layers=None, layer_ratio=0.5, margin=2.0)),)
      classify ((1.0, KnowledgeDistillation(temperature=3.0, temperature_squared=False, \
cross_entropy_share=0.0, standardized=False)),)
      >>> [type(term).__name__ for _, term in METHODS["kd+nst"]()[0].terms]
      ['KnowledgeDistillation', 'NeuronSelectivity']
      >>> METHODS["activation-boundary"](margn=2.0)
      Traceback (most recent call last):
      abflax.errors.UnknownNameError: unknown option of method activation-boundary 'margn'; did \
you mean margin?
    """

    def __getitem__(self, name: str) -> Any:
        parts = {part: self.describe(part) for part in name.split("+")}

        def phases(
            *, protocol: str = "paper", setting: str = "cifar", **options: Any
        ) -> tuple[Phase, ...]:
            return _phases(name, parts, find_protocol(protocol, setting), options)

        return phases

    def describe(self, name: str) -> Method:
        """The method of one name (not a sum); any power p > 0 is parsed from "lP"."""
        if name in _METHODS:
            return _METHODS[name]
        if match := _POWER.fullmatch(name):
            return _METHODS.get(_canonical(name)) or _power(float(match[1]))
        raise unknown("method", name, _METHODS)

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


METHODS = Methods()
"""All methods by name; see `Methods`."""


def register_method(name: str, method: Method) -> None:
    """Adds a method to `METHODS`, for this process.

    Its transfer loss has the scale 1 (`transfer_weight` changes it). Every process that trains with
    it, or reads its records, registers it first.

    Args:
      name: not taken, without "+".
      method: its terms; subclasses of `Term` from anywhere.

    Raises:
      ValueError: if the name is taken, or cannot be one.

    Example:
      `register_method("mine", Method("…", "…", initialise=(term,), classify=(term,)))`
    """
    if not isinstance(method, Method):
        raise InputError(f"a method must be an abflax.methods.Method, not {type(method).__name__}")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name == "own":
        raise InputError(f"{name!r} cannot name a method: letters, digits, '-' and '.' can")
    if name in METHODS:
        raise InputError(f"there is a method {name} already: give this one another name")
    terms = (*method.initialise, *method.classify)
    if not terms or not all(isinstance(term, Term) for term in terms):
        raise InputError(f"method {name} needs terms, instances of abflax.methods.terms.Term")
    if weighed := [term.__name__ for term in method.weights if term.transfers]:
        raise InputError(
            f"method {name}: the weight of the transfer loss {weighed[0]} is 1, or transfer_weight"
        )
    _METHODS[name] = method


def _phases(
    name: str, parts: Mapping[str, Method], protocol: Protocol, options: dict[str, Any]
) -> tuple[Phase, ...]:
    """The phases of a method, which may be the sum of several, under a protocol."""
    kinds = {type(t) for part in parts.values() for t in (*part.initialise, *part.classify)}
    if not protocol.same_classes:
        kinds = {kind for kind in kinds if not kind.same_classes}
    transfers = any(part.transfers for part in parts.values())
    if "transfer_weight" in options and not transfers:
        raise InputError(f"method {name} has no transfer loss, so no transfer_weight")
    _require_options(name, kinds, options, transfers)
    factor = options.get("transfer_weight", 1.0)
    if not factor > 0:
        raise InputError(f"transfer_weight must be above 0, not {factor}")
    objectives = {part: _objectives(part, parts[part], protocol, options) for part in parts}

    def terms(phase: int) -> WeightedTerms:
        weighted = [
            (_times(factor, weight) if term.transfers else weight, term)
            for part, method in parts.items()
            if phase or not method.classifies or not _replaces_kd(parts)
            for weight, term in objectives[part][phase]
            if not (method.transfers and _replaces_kd(parts) and _is_kd(term))
        ]
        return tuple(dict.fromkeys(weighted))

    initialise, classify = terms(0), terms(1)
    if not protocol.same_classes:
        dtl = (protocol.transfer_scale["dtl"], LogitRegression())
        initialise, classify = _for_other_classes(name, initialise, classify, dtl)
    if initialise == classify:
        return (Phase("joint", classify, protocol.joint),)
    first, second = protocol.initialise, protocol.classify
    if not any(term.needs_student for _, term in initialise):
        first, second = protocol.alone, dataclasses.replace(protocol.joint, of_run=False)
    return (
        Phase("initialise", initialise, first, protocol.teacher_batch_statistics),
        Phase("classify", classify, second),
    )


def _objectives(
    name: str, method: Method, protocol: Protocol, options: Mapping[str, Any]
) -> tuple[WeightedTerms, WeightedTerms]:
    """A method's weighted terms in both phases, with the caller's options."""
    if protocol.objectives is None:
        choices = {"layer_ratio": protocol.layer_ratio, "temperature": protocol.temperature}
        options = {**choices, **options}
        scale = _scale(name, protocol)
        phases: tuple[WeightedTerms, ...] = tuple(
            tuple(
                (scale if term.transfers else method.weights.get(type(term), 1.0), term)
                for term in terms
            )
            for terms in (method.initialise, method.classify)
        )
    elif name in protocol.objectives:
        phases = protocol.objectives[name]
    else:
        raise unknown("method of this protocol", name, protocol.objectives)
    initialise, classify = (
        tuple((weight, _with_options(term, options)) for weight, term in terms) for terms in phases
    )
    return initialise, classify


def _replaces_kd(parts: Mapping[str, Method]) -> bool:
    """Whether a sum has a method that transfers, and one that classifies in place of its KD."""
    methods = parts.values()
    return any(each.transfers for each in methods) and any(each.classifies for each in methods)


def _is_kd(term: Term) -> bool:
    return isinstance(term, KnowledgeDistillation)


def _times(factor: float, weight: Weight) -> Weight:
    if not isinstance(weight, Schedule):
        return factor * weight
    assert isinstance(weight, Ramp)  # no transfer loss has another schedule
    return dataclasses.replace(weight, start=factor * weight.start, end=factor * weight.end)


def _for_other_classes(
    name: str, initialise: WeightedTerms, classify: WeightedTerms, dtl: tuple[float, Term]
) -> tuple[WeightedTerms, WeightedTerms]:
    """Adapts a method to a teacher with other classes than the student's.

    KD compares the two networks' logits, so cross-entropy and DTL (Srinivas, Fleuret 2018) replace
    it: DTL compares logits over the teacher's classes through an extra head. DTL is also added to
    what the initialise phase transfers, as in the published code of Heo et al. 2019. A method that
    transfers the same in both phases has a single phase, as its authors train it.

    Raises:
      ValueError: if the method is KD from the start.
    """
    if any(term.same_classes for _, term in initialise):
        raise InputError(
            f"method {name} compares logits over the same classes, which a teacher of other "
            "classes does not have; dtl compares those over the teacher's own"
        )
    transfer = tuple(pair for pair in classify if not pair[1].same_classes)
    if transfer == classify:
        return initialise, classify
    supervised = (*transfer, (1.0, CrossEntropy()), dtl)
    return supervised if transfer == initialise else (*initialise, dtl), supervised


def _scale(method: str, protocol: Protocol) -> float:
    """The factor on a method's transfer loss.

    A power that is not listed has that of l2; a method that was registered has 1.
    """
    other = protocol.transfer_scale["l2"] if _POWER.fullmatch(method) else 1.0
    return protocol.transfer_scale.get(_canonical(method), other)


def _canonical(method: str) -> str:
    """The one spelling of a method's name: l0.50 is l0.5."""
    match = _POWER.fullmatch(method)
    return f"l{float(match[1]):g}" if match else method


def _with_options(term: Term, options: Mapping[str, Any]) -> Term:
    """Replaces a term's fields by options.

    Whole numbers become floats where the field is one: margin 2 and margin 2.0 are the same run.
    """
    hints, names = type_hints(type(term)), {field.name for field in dataclasses.fields(term)}
    fields = {k: float(v) if hints[k] is float else v for k, v in options.items() if k in names}
    return dataclasses.replace(term, **fields)


def _require_options(
    name: str, kinds: set[type[Term]], options: Mapping[str, Any], transfers: bool
) -> None:
    """Raises `InputError` for an option that no term has, or whose value is of another type."""
    hints = {
        field.name: type_hints(kind)[field.name]
        for kind in kinds
        for field in dataclasses.fields(kind)
    }
    if transfers:
        hints["transfer_weight"] = float
    for option in options:
        if option not in hints:
            raise unknown(f"option of method {name}", option, hints)
    try:
        require_types(options, hints)
    except InputError as error:
        raise InputError(f"method {name}: option {error}") from None
