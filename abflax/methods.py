"""Methods and protocols, as data: a name, and the phases of weighted terms that it stands for."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from abflax.errors import InputError, unknown
from abflax.optim import Optimiser
from abflax.phase import Phase
from abflax.settings import described, is_of
from abflax.terms import (
    ActivationBoundary,
    AttentionTransfer,
    CrossEntropy,
    FeatureDifference,
    FlowOfSolution,
    JacobianMatching,
    KnowledgeDistillation,
    LogitRegression,
    NeuronSelectivity,
    Term,
)
from abflax.transfer import Weighted, without_logits


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named, complete set of the choices that papers leave open.

    Attributes:
      summary: one line.
      initialise, classify, joint: the optimiser of each phase.
      temperature: of knowledge distillation.
      layer_ratio: the weight of a layer relative to the next deeper one.
      transfer_scale: method -> the factor on its transfer loss at transfer weight 1.
      teacher_batch_statistics: of the initialise phase.
      same_classes: whether teacher and student tell the same classes apart. Where they do not,
        there are no logits to compare in methods' KD: cross-entropy and DTL take its place, and
        DTL stands beside what a phase before it transfers.
    """

    summary: str
    initialise: Optimiser
    classify: Optimiser
    joint: Optimiser
    temperature: float
    layer_ratio: float
    transfer_scale: Mapping[str, float]
    teacher_batch_statistics: bool
    same_classes: bool = True


# Sums over neurons begin where the published code has activation boundaries; the others where
# their authors' own constants put them, for the mean over positions, or pairs, or channels that is
# taken here: attention β/2 = 500, NST 50, DTL 10. The search (`experiments.search`) replaces them.
_SUMS = ("activation-boundary", "fitnet", "l2", "l1", "l0.5")
_START = {"attention": 500.0, "nst": 50.0, "jacobian": 1.0, "fsp": 1.0, "dtl": 10.0}

# The best of each grid, in units of where it began, on CIFAR-10: `experiments/records/search`.
_SEARCHED = {
    "activation-boundary": 1.0 * 3 / 1000,
    "attention": 0.1 * 500.0,
    "nst": 0.1 * 50.0,
    "jacobian": 1.0 * 1.0,
    "fsp": 0.01 * 1.0,
    "fitnet": 10.0 * 3 / 1000,
    "l2": 10.0 * 3 / 1000,
    "l1": 0.001 * 3 / 1000,
    "l0.5": 0.001 * 3 / 1000,
    "dtl": 0.001 * 10.0,
}

_PAPER_SGD = Optimiser(drops=(0.3, 0.6, 0.8), of_run=True)
_OFFICIAL_SGD = Optimiser(drops=(0.3, 0.6, 0.8), resets=(0.3, 0.6, 0.8), whole_epochs=True)

_SLOW_SGD = Optimiser(learning_rate=0.01, drops=(0.5,), drop_factor=10.0, of_run=True)
_CONSTANT_SGD = Optimiser(drops=(), weight_decay=1e-4)
_TENTH_SGD = Optimiser(learning_rate=0.01, drops=(0.5,), drop_factor=10.0, weight_decay=1e-4)


def _transfer(
    initialise: Optimiser, classify: Optimiser, layer_ratio: float, scale: float
) -> Protocol:
    """Of transfer learning, for 60 + 40 epochs of batches of 32. Its constants are the published
    1/1000; where layers are equal, until a search has been made, with 1/8 on each."""
    return Protocol(
        "a teacher of other classes: DTL throughout", initialise, classify, classify, 3.0,
        layer_ratio, {**dict.fromkeys(_SUMS, scale), **_START}, False, same_classes=False,
    )  # fmt: skip


PROTOCOLS: Mapping[str, Mapping[str, Protocol]] = {
    "paper": {
        "cifar": Protocol(
            summary="what the paper states; its open constants as the published code has them",
            initialise=_PAPER_SGD,
            classify=_PAPER_SGD,
            joint=_PAPER_SGD,
            temperature=3.0,
            layer_ratio=1.0,
            # Until a search has been made: the published 3/1000, with 1/4 on each layer.
            transfer_scale={**dict.fromkeys(_SUMS, 3 / 1000 / 4), **_START},
            teacher_batch_statistics=False,
        ),
        "transfer": _transfer(_SLOW_SGD, _SLOW_SGD, layer_ratio=1.0, scale=1 / 1000 / 8),
    },
    "official": {
        "cifar": Protocol(
            summary="the authors' published PyTorch code (commit b337b23 and later)",
            initialise=Optimiser(drops=(), resets=(0.75,), whole_epochs=True),
            classify=_OFFICIAL_SGD,
            joint=_OFFICIAL_SGD,
            temperature=3.0,
            layer_ratio=0.5,
            transfer_scale={**dict.fromkeys(_SUMS, 3 / 1000), **_START, **_SEARCHED},
            teacher_batch_statistics=True,
        ),
        "transfer": _transfer(_CONSTANT_SGD, _TENTH_SGD, layer_ratio=0.5, scale=1 / 1000),
        # The published code trains a MobileNet V2 ten times as fast.
        "transfer-v2": _transfer(
            _CONSTANT_SGD,
            dataclasses.replace(_TENTH_SGD, learning_rate=0.1),
            layer_ratio=0.5,
            scale=1 / 1000,
        ),  # fmt: skip
    },
}
"""Name -> setting -> `Protocol`."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A name's meaning: which terms fill the initialise and the classify phase.

    Two phases with the same terms merge into one, "joint", over all epochs.

    Attributes:
      summary: one line.
      reference: the source.
      initialise, classify: terms with the method's own defaults. The protocol's choices
        (`layer_ratio`, `temperature`) and the caller's options replace their fields.
    """

    summary: str
    reference: str
    initialise: tuple[Term, ...]
    classify: tuple[Term, ...]


def _alone(*terms: Term) -> dict[str, tuple[Term, ...]]:
    return {"initialise": terms, "classify": terms}


def _two_stage(term: Term) -> dict[str, tuple[Term, ...]]:
    return {"initialise": (term,), "classify": (KnowledgeDistillation(),)}


def _joint(term: Term) -> dict[str, tuple[Term, ...]]:
    return {"initialise": (term,), "classify": (term, KnowledgeDistillation())}


def _power(power: float) -> Method:
    return Method(
        f"activations neuron by neuron, |difference|^{power:g}, then softened logits",
        "Heo et al., AAAI 2019, Table 7",
        **_two_stage(FeatureDifference(power=power)),
    )


_METHODS: Mapping[str, Method] = {
    "cross-entropy": Method("labels alone, no teacher", "-", **_alone(CrossEntropy())),
    "kd": Method(
        "softened logits", "Hinton, Vinyals, Dean 2015", **_alone(KnowledgeDistillation())
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
        "where each layer looks, all along",
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
        "which positions each channel likes, all along",
        "Huang, Wang 2017",
        **_joint(NeuronSelectivity()),
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
cross_entropy_share=0.0)),)
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


def find_protocol(protocol: str, setting: str) -> Protocol:
    """The protocol of that name for that setting. Raises `ValueError` for an unknown one."""
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if setting not in PROTOCOLS[protocol]:
        raise unknown(f"setting of protocol {protocol}", setting, PROTOCOLS[protocol])
    return PROTOCOLS[protocol][setting]


def _phases(
    name: str, parts: Mapping[str, Method], protocol: Protocol, options: dict[str, Any]
) -> tuple[Phase, ...]:
    options = dict(options)
    transfers = any(term.transfers for method in parts.values() for term in method.initialise)
    if "transfer_weight" in options and not transfers:
        raise InputError(f"method {name} has no transfer loss, so no transfer_weight")
    weight = options.pop("transfer_weight", 1.0)
    if not is_of(weight, float) or not weight > 0:
        raise InputError(f"transfer_weight must be a number above 0, not {weight!r}")
    kinds = {type(t) for m in parts.values() for t in (*m.initialise, *m.classify)}
    if not protocol.same_classes:
        kinds -= {KnowledgeDistillation}
    _check_options(name, kinds, options, {"transfer_weight"} if transfers else set())

    def terms(stage: str) -> Weighted:
        weighted = [
            (
                _scale(part, protocol) * weight if term.transfers else 1.0,
                _replaced(term, protocol, options),
            )
            for part, method in parts.items()
            for term in getattr(method, stage)
        ]
        return tuple(dict.fromkeys(weighted))

    initialise, classify = terms("initialise"), terms("classify")
    if not protocol.same_classes:
        dtl = protocol.transfer_scale["dtl"]
        initialise, classify = without_logits(name, initialise, classify, dtl)
    if initialise == classify:
        return (Phase("joint", classify, protocol.joint),)
    drifts = protocol.teacher_batch_statistics
    return (
        Phase("initialise", initialise, protocol.initialise, drifts),
        Phase("classify", classify, protocol.classify),
    )


def _scale(method: str, protocol: Protocol) -> float:
    """The factor on a method's transfer loss; other powers than those listed have that of l2."""
    return protocol.transfer_scale.get(_canonical(method), protocol.transfer_scale["l2"])


def _canonical(method: str) -> str:
    """The name of a method under which tables have it: l0.50 is l0.5."""
    match = _POWER.fullmatch(method)
    return f"l{float(match[1]):g}" if match else method


def _replaced(term: Term, protocol: Protocol, options: dict[str, Any]) -> Term:
    """A term with the protocol's choices, then the caller's; a real number is a float."""
    given = {"layer_ratio": protocol.layer_ratio, "temperature": protocol.temperature, **options}
    hints, names = _type_hints(type(term)), {field.name for field in dataclasses.fields(term)}
    return dataclasses.replace(
        term, **{k: float(v) if hints[k] is float else v for k, v in given.items() if k in names}
    )


_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _check_options(
    name: str, kinds: set[type[Term]], options: dict[str, Any], others: set[str]
) -> None:
    """Raises for an option that no term has, or whose value is of another type."""
    hints = {
        key: hint
        for kind in kinds
        for key, hint in _type_hints(kind).items()
        if key in {field.name for field in dataclasses.fields(kind)}
    }
    for option, value in options.items():
        if option not in hints:
            raise unknown(f"option of method {name}", option, {*hints, *others})
        if not is_of(value, hints[option]):
            kind = described(hints[option])
            raise InputError(f"option {option} of method {name} must be {kind}, not {value!r}")
