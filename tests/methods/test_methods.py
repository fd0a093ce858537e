"""Protocols, methods and optimizers agree with the paper and the published code."""

import dataclasses
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from abflax.config import RunConfig, Seeds
from abflax.errors import InputError
from abflax.methods import METHODS, PROTOCOLS, Ramp
from abflax.methods.optimizer import Optimizer, PhaseSchedule
from abflax.methods.terms import (
    ActivationBoundary,
    CrossEntropy,
    DecoupledDistillation,
    KnowledgeDistillation,
    OverhaulDifference,
    SimilarityPreserving,
)


def test_official_weights_are_the_published_ones():
    initialise, classify = METHODS["activation-boundary"](protocol="official")
    ((scale, term),) = initialise.terms
    weights = term.layer_weights(dict.fromkeys(("layer1", "layer2", "layer3")))
    assert scale == 3 / 1000
    assert weights == {"layer1": 0.25, "layer2": 0.5, "layer3": 1.0}
    # "49.152 × the sum of the three means for a wrn22-4 teacher"
    neurons_of = {"layer1": 64 * 32**2, "layer2": 128 * 16**2, "layer3": 256 * 8**2}
    for layer, neurons in neurons_of.items():
        assert scale * weights[layer] * neurons == pytest.approx(49.152)
    assert initialise.teacher_batch_statistics and not classify.teacher_batch_statistics
    assert classify.terms == ((1.0, KnowledgeDistillation(temperature=3.0)),)


def test_paper_weights_are_equal():
    (initialise, _) = METHODS["activation-boundary"](protocol="paper", transfer_weight=2.0)
    ((scale, term),) = initialise.terms
    assert scale * term.layer_weights({"layer1": 0, "layer3": 0})["layer1"] == pytest.approx(
        2 * 3 / 4000
    )
    assert not initialise.teacher_batch_statistics


def test_a_layer_keeps_its_weight_when_others_are_left_out():
    term = ActivationBoundary(layers=("layer2",), layer_ratio=0.5)
    assert term.layer_weights({"layer1": 0, "layer2": 0, "layer3": 0}) == {"layer2": 0.5}


def test_single_objectives_are_one_joint_phase():
    for name, kind in {"cross-entropy": CrossEntropy, "kd": KnowledgeDistillation}.items():
        (phase,) = METHODS[name](protocol="official")
        assert phase.name == "joint" and isinstance(phase.terms[0][1], kind)


def test_methods_add_up():
    initialise, classify = METHODS["activation-boundary+cross-entropy"]()
    kinds = lambda phase: [type(term) for _, term in phase.terms]
    assert kinds(initialise) == [ActivationBoundary, CrossEntropy]
    assert kinds(classify) == [KnowledgeDistillation, CrossEntropy]


def test_what_classifies_takes_the_place_of_kd():
    names = lambda phases: [[type(term).__name__ for _, term in phase.terms] for phase in phases]
    decoupled = ["CrossEntropy", "DecoupledDistillation"]
    assert names(METHODS["dkd"]()) == [decoupled]
    assert names(METHODS["activation-boundary+dkd"]()) == [["ActivationBoundary"], decoupled]
    similar = ["SimilarityPreserving"]
    assert names(METHODS["sp+dkd"]()) == [similar, similar + decoupled]
    # No method but the one that transfers gives way.
    assert names(METHODS["kd+dkd"]()) == [["KnowledgeDistillation", *decoupled]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: METHODS["dkd"](setting="transfer"), "compares logits over the same classes"),
        (lambda: METHODS["dist"](temperature=0.0), "temperature must be above 0"),
        (lambda: METHODS["rkd"](angle_ratio=-1.0), "angle_ratio must be at least 0"),
        (lambda: METHODS["cc"](dimensions=0), "dimensions must be at least 1"),
        (lambda: METHODS["activation-bondary"], "did you mean activation-boundary"),
        (lambda: METHODS["kd+nothing"], "unknown method 'nothing'"),
        (lambda: METHODS["kd"](protocol="papr"), "did you mean paper"),
        (lambda: METHODS["kd"](setting="cfar"), "did you mean cifar"),
        (lambda: METHODS["activation-boundary"](margn=1.0), "did you mean margin"),
        (lambda: METHODS["cross-entropy"](margin=1.0), "option of method cross-entropy 'margin'"),
        (lambda: METHODS["activation-boundary"](margin=0.0), "margin must be above 0"),
        (lambda: METHODS["activation-boundary"](margin="1"), "'1'"),
        (lambda: METHODS["activation-boundary"](layers=("layer1", 2)), "layers"),
        (lambda: METHODS["kd"](temperature=-1.0), "temperature must be above 0"),
        (lambda: METHODS["kd"](cross_entropy_share=1.5), "share must be in"),
        (lambda: METHODS["activation-boundary"](transfer_weight=0.0), "transfer_weight"),
        (lambda: METHODS["kd"](transfer_weight=2.0), "method kd has no transfer loss"),
        (lambda: METHODS["fsp"](layers=()), "layers must name at least one tap"),
        (lambda: RunConfig("d", "s", epochs=(0, 0)), "not both 0"),
        (lambda: RunConfig("d", "s", fraction=0.0), r"in \(0, 1\], not 0.0"),
        (lambda: RunConfig("d", "s", precision="float16"), "did you mean"),
        (lambda: RunConfig("d", "s", seeds=Seeds.all(-1)), "whole numbers from 0"),
        (lambda: RunConfig("d", "s", batch_size=0), "batch_size"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_misspelt_field_fails_when_the_object_is_made():
    with pytest.raises(TypeError, match="metod"):
        RunConfig("d", "s", metod="kd")


def test_hash_names_what_changes_numbers():
    base = RunConfig("cifar10", "wrn16-1")
    assert base.hash == RunConfig("cifar10", "wrn16-1", epochs=(20, 100)).hash
    others = [
        RunConfig("cifar10", "wrn16-1", epochs=(1, 1)),
        RunConfig("cifar10", "wrn16-1", seeds=Seeds(weights=1)),
        RunConfig("cifar10", "wrn16-1", options=(("margin", 2.0),)),
        RunConfig("cifar10", "wrn16-1", protocol="official"),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 5


def test_one_objective_has_one_hash_however_it_is_spelt():
    base = RunConfig("d", "s", "t")
    assert base.hash == dataclasses.replace(base, options=(("margin", 1.0),)).hash
    assert base.hash != dataclasses.replace(base, options=(("margin", 1.5),)).hash
    powers = [RunConfig("d", "s", "t", method=name).hash for name in ("l2", "l2.0", "l1.5")]
    assert powers[0] == powers[1] != powers[2]
    margins = [RunConfig("d", "s", "t", options=(("margin", value),)).hash for value in (2, 2.0)]
    assert margins[0] == margins[1]


def test_every_transfer_loss_has_a_scale_in_every_protocol():
    for protocol in ("paper", "official"):
        scale = lambda name, protocol=protocol: METHODS[name](protocol=protocol)[0].terms[0][0]
        for name in METHODS:
            if any(term.transfers for _, term in METHODS[name]()[0].terms):
                assert name in PROTOCOLS[protocol]["cifar"].transfer_scale
        assert 0 < scale("l1.5") == scale("l2.0") == scale("l2") < 0.1
        assert scale("l1.0") == scale("l1") and scale("l0.50") == scale("l0.5")


def test_repdistillers_objectives_are_its_weighted_sums():
    """Cross-entropy beside the transfer loss; the warm-ups of DKD and ReviewKD as published."""

    def terms(name, **options):
        phases = METHODS[name](protocol="repdistiller", **options)
        return [[(weight, type(term)) for weight, term in phase.terms] for phase in phases]

    labels = (1.0, CrossEntropy)
    assert terms("kd") == [[(1.0, KnowledgeDistillation)]]
    assert terms("sp") == [[labels, (3000.0, SimilarityPreserving)]]
    assert terms("sp", transfer_weight=0.1) == [[labels, (300.0, SimilarityPreserving)]]
    assert terms("activation-boundary") == [[(3 / 1000, ActivationBoundary)], [labels]]
    assert terms("dkd") == [[labels, (Ramp(0.0, 1.0, 20), DecoupledDistillation)]]
    (review,) = METHODS["reviewkd"](protocol="repdistiller", transfer_weight=2.0)
    assert review.terms[1][0] == Ramp(0.0, 10.0, 20)
    (kd,) = METHODS["kd"](protocol="repdistiller", temperature=5.0)
    assert kd.terms[0][1] == KnowledgeDistillation(5.0, True, 0.1)
    assert (
        METHODS["activation-boundary+dkd"](protocol="repdistiller")[1].terms
        == METHODS["dkd"](protocol="repdistiller")[0].terms
    )
    for name in PROTOCOLS["repdistiller"]["cifar"].objectives:
        plain, its = (
            {type(term) for phase in METHODS[name](protocol=each) for _, term in phase.terms}
            for each in ("paper", "repdistiller")
        )
        assert its - {CrossEntropy} == plain - {CrossEntropy, KnowledgeDistillation} or "kd" in name
    with pytest.raises(InputError, match="unknown method of this protocol 'jacobian'"):
        METHODS["jacobian"](protocol="repdistiller")


def test_repdistillers_learning_rate():
    """0.05, a tenth after 150, 180 and 210 of 240 epochs, whatever was before."""
    steps = Fraction(50_000, 64)
    optimizer = METHODS["sp"](protocol="repdistiller")[0].optimizer
    drops = [int(epochs * steps) for epochs in (150, 180, 210)]
    for before in (0, 30):
        start = int(before * steps)
        length = int((before + 240) * steps) - start
        span = PhaseSchedule(start, length, before, 240, before + 240, steps)
        rate = optimizer.schedule(span)
        found = [float(rate(each + step)) for each in drops for step in (-2, 1)]
        assert found == pytest.approx([0.05, 0.005, 0.005, 5e-4, 5e-4, 5e-5])
    before = METHODS["ft"](protocol="repdistiller")[0].optimizer
    assert (before.learning_rate, before.drops) == (0.01, ())


def test_names_are_looked_up_as_in_any_mapping():
    assert "nothing" not in METHODS and METHODS.get("nothing") is None
    assert "l0.7" in METHODS and "kd+nst" in METHODS


def test_a_configuration_knows_its_settings():
    config = RunConfig("d", "s", "t", method="l2", options=(("layers", ("layer1",)),), views=3)
    assert config.settings["views"] == 3 and config.settings["layers"] == ("layer1",)
    assert RunConfig.create(dataset="d", student="s", teacher="t", **config.settings) == config
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    # The networks and the data are separate arguments of `distill`.
    given = {"dataset", "student", "teacher", "anchors", "test", "target_data", "options"}
    assert fields - set(config.settings) == given
    assert config.replace(margin=1.0, method="activation-boundary").options == (("margin", 1.0),)


def test_hashes_never_change():
    """Records are found by their hashes."""
    assert RunConfig("cifar10", "wrn16-1").hash == "0c2b83280cfa"
    config = RunConfig("digits", "wrn10-2", "wrn16-2:abc", options=(("margin", 2.0),),
                       epochs=(1, 2), seeds=Seeds.all(3))  # fmt: skip
    assert config.hash == "5ced120fe251"


def _rates(optimizer, span):
    schedule = optimizer.schedule(span)
    return [round(float(schedule(step)), 6) for step in range(span.steps)]


def test_official_classify_schedule_drops_after_whole_epochs():
    # 5 epochs of 2.5 steps: drops after ⌈1.5⌉ = 2, 3 and 4 epochs, so before steps 5, 7 and 10.
    optimizer = PROTOCOLS["official"]["cifar"].classify
    span = PhaseSchedule(5, 12, 2, 5, 7, Fraction(5, 2))
    assert optimizer.boundaries(optimizer.drops, span) == (5, 7, 10)
    assert _rates(optimizer, span) == [0.1] * 5 + [0.02] * 2 + [0.004] * 3 + [0.0008] * 2


def test_official_initialise_is_constant_and_resets_once():
    optimizer = PROTOCOLS["official"]["cifar"].initialise
    span = PhaseSchedule(0, 40, 0, 10, 20, Fraction(4))
    assert _rates(optimizer, span) == [0.1] * 40
    assert optimizer.boundaries(optimizer.resets, span) == (32,)  # ⌈7.5⌉ = 8 epochs


def test_paper_schedule_is_of_the_whole_run():
    # 20+100 epochs of one step: drops at 36, 72 and 96 of 120, so 16, 52, 76 of the classify phase.
    optimizer = PROTOCOLS["paper"]["cifar"].classify
    schedule = PhaseSchedule(20, 100, 20, 100, 120, Fraction(1))
    assert optimizer.boundaries(optimizer.drops, schedule) == (16, 52, 76)
    initialise = PROTOCOLS["paper"]["cifar"].initialise
    assert _rates(initialise, PhaseSchedule(0, 20, 0, 20, 120, Fraction(1))) == [0.1] * 20
    # With 50+10 epochs the first two drops fall into the initialise phase.
    rates = _rates(initialise, PhaseSchedule(0, 50, 0, 50, 60, Fraction(1)))
    assert rates == [0.1] * 18 + [0.02] * 18 + [0.004] * 12 + [0.0008] * 2


def test_shares_are_exact():
    """0.6 · 5 in floating point is 3.0000000000000004, whose ceiling is 4."""
    optimizer = Optimizer(drops=(0.1, 0.3, 0.6), whole_epochs=True)
    assert optimizer.boundaries(optimizer.drops, PhaseSchedule(0, 10, 0, 10, 10, Fraction(1))) == (
        1,
        3,
        6,
    )


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_pytorchs(nesterov, x64):
    """d = g + λp; v = μv + d; p −= η(d + μv), or ηv, and a reset rebuilds the optimizer."""
    optimizer = Optimizer(
        learning_rate=0.1, drops=(0.5,), resets=(0.5,), weight_decay=0.01, nesterov=nesterov
    )
    span = PhaseSchedule(0, 6, 0, 6, 6, Fraction(1))
    transformation = optimizer.transformation(span)
    parameter, velocity = 1.5, 0.0
    params = {"w": jnp.array(1.5)}
    state = transformation.init(params)
    for step, gradient in enumerate([1.0, -2.0, 0.5, 3.0, 0.25, -1.0]):
        rate = 0.1 if step < 3 else 0.02
        velocity = 0.0 if step == 3 else velocity
        direction = gradient + 0.01 * parameter
        velocity = 0.9 * velocity + direction
        parameter -= rate * (direction + 0.9 * velocity if nesterov else velocity)
        updates, state = transformation.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(params["w"], np.float64(parameter), rtol=1e-13)


def test_untrained_parameters_stay():
    optimizer = Optimizer(weight_decay=0.5)
    span = PhaseSchedule(0, 10, 0, 10, 10, Fraction(1))
    params = {"trained": jnp.ones(2), "frozen": jnp.ones(2)}
    transformation = optimizer.transformation(span, {"trained": True, "frozen": False})
    updates, _ = transformation.update(
        jax.tree.map(jnp.zeros_like, params), transformation.init(params), params
    )
    chex.assert_trees_all_equal(updates["frozen"], jnp.zeros(2))
    chex.assert_trees_all_close(updates["trained"], jnp.full(2, -0.1 * 0.5 * 1.9), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_margin_of_the_overhaul_is_computed_in_float32(dtype):
    """The sum over the channel is beyond the largest float16."""
    teacher = jnp.full((100, 1, 1, 1), -512.0, dtype).at[50:].set(-1536.0).at[99].set(-1540.0)
    loss = OverhaulDifference().layer_loss(jnp.zeros(teacher.shape), teacher)
    lowest = teacher.astype(jnp.float32)[99, 0, 0, 0]
    margin = -(50 * 512.0 + 49 * 1536.0 - lowest) / 100
    chex.assert_trees_all_close(loss[0], jnp.float32(512.0**2))
    chex.assert_trees_all_close(loss[99], margin**2, rtol=1e-6)
