"""The loop: records, resuming, devices, dispatches, numbers that are none."""

import dataclasses
import json
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from abflax import (
    Dataset,
    InputError,
    Interrupted,
    Network,
    NonFiniteError,
    Resources,
    distill,
    evaluate,
    load,
)
from abflax.models import MODELS
from abflax.models.variables import init_variables
from abflax.runtime.reporter import NullReporter
from abflax.storage.checkpoint import Checkpoints
from abflax.training.parallel import compile_evaluation, compile_phase, compile_steps
from abflax.training.record import read_record
from tests.conftest import Tiny
from tests.stopping import StopAt

ONE = Resources(devices=1)
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits():
    """Sixty-four digits to train on, fifty held out (no multiple of a batch)."""
    train, test = load("digits", "train"), load("digits", "test")
    return train.take(np.arange(64)), test.take(np.arange(50))


@pytest.fixture(scope="module")
def teacher():
    return Network(Tiny(12), init_variables(Tiny(12), jax.random.key(7), SHAPE), "teacher")


def _distill(digits, teacher, **options):
    settings = {
        "student": Tiny(6), "test": digits[1], "epochs": (1, 1), "batch_size": 16,
        "protocol": "official", "resources": ONE,
    } | options  # fmt: skip
    return distill(teacher=teacher, data=digits[0], **settings)


@pytest.fixture(params=["small", pytest.param("wide ResNets", marks=pytest.mark.slow)])
def pair(request, teacher):
    """A student and its teacher, of batch norms that average over the devices."""
    if request.param == "small":
        return {"student": Tiny(6), "teacher": teacher}
    wide = MODELS["wrn10-2"]()
    known = Network(wide, init_variables(wide, jax.random.key(7), SHAPE), "wide")
    return {"student": MODELS["wrn10-1"](), "teacher": known}


@pytest.fixture(scope="module")
def whole(digits, teacher, tmp_path_factory):
    """A run that nothing disturbed."""
    return _distill(digits, teacher, workdir=tmp_path_factory.mktemp("whole"))


def test_record(whole):
    record = whole.record
    assert json.loads((whole.directory / "record.json").read_text()) == record
    assert [p["name"] for p in record["phases"]] == ["initialise", "classify"]
    assert [(h["epoch"], h["step"], h["phase"]) for h in record["history"]] == [
        (1, 4, "initialise"), (2, 8, "classify"),
    ]  # fmt: skip
    first, last = record["history"]
    assert set(first["agreement"]) == {"layer1", "layer2"}
    assert set(first["training"]["agreement"]) == {"layer1", "layer2"}
    assert last["agreement"] == {}  # other widths, and no connectors any more
    assert record["result"]["initialise_agreement"] == first["agreement"]
    assert record["result"]["test_error"] == last["test_error"]
    assert set(record["environment"]) >= {"jax", "jaxlib", "flax", "optax", "device", "commit"}
    assert sorted(p.name for p in whole.directory.iterdir()) == [
        "config.json", "connectors.safetensors", "fingerprint.json", "record.json",
        "student.safetensors",
    ]  # fmt: skip


def test_held_out_error_counts_every_example_once(whole, digits):
    found = evaluate(Network(Tiny(6), whole.variables), digits[1], devices=1)
    assert found["examples"] == 50
    assert found["test_error"] == whole.record["result"]["test_error"]
    logits = Tiny(6).apply(whole.variables, (digits[1].images - 4.88) / 6.02, train=False)
    assert found["errors"] == int((logits.argmax(-1) != digits[1].labels).sum())


def test_a_finished_run_is_not_run_twice(whole, digits, teacher):
    before = (whole.directory / "record.json").stat().st_mtime_ns
    again = _distill(digits, teacher, workdir=whole.directory.parents[1])
    assert again.record == whole.record and again.trained is None
    assert (whole.directory / "record.json").stat().st_mtime_ns == before


def test_force_runs_it_again_to_the_same_bits(whole, digits, teacher):
    again = _distill(digits, teacher, workdir=whole.directory.parents[1], force=True)
    chex.assert_trees_all_equal(again.variables, whole.variables)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@pytest.mark.parametrize(
    ("step", "number"),
    [*zip([2, 4, 7], _SIGNALS, strict=True)],
    ids=["initialise", "boundary", "classify"],
)
def test_stopped_and_resumed_is_never_stopped(whole, digits, teacher, tmp_path, step, number):
    handlers = [signal.getsignal(each) for each in _SIGNALS]
    with pytest.raises(Interrupted, match=f"goes on from step {step}") as stopped:
        _distill(digits, teacher, workdir=tmp_path, reporter=StopAt(step, number))
    assert stopped.value.signal == number
    assert handlers == [signal.getsignal(each) for each in _SIGNALS]
    resumed = _distill(digits, teacher, workdir=tmp_path)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)
    assert _without_times(resumed.record) == _without_times(whole.record)


@pytest.mark.slow  # two more programs of each phase to compile
def test_steps_per_dispatch_change_no_number(digits, teacher):
    one, three = (
        _distill(digits, teacher, precision="float64", resources=Resources(1, count))
        for count in (1, 3)
    )
    chex.assert_trees_all_close(one.variables, three.variables, rtol=1e-9, atol=1e-9)
    assert [h["step"] for h in three.record["history"]] == [4, 8]


def test_one_device_and_eight_give_the_same_numbers(digits, pair):
    runs = [
        _distill(digits, **pair, precision="float64", resources=Resources(devices=count))
        for count in (1, 8)
    ]
    one, eight = (run.variables for run in runs)
    assert jax.tree.leaves(one)[0].dtype == np.float64
    chex.assert_trees_all_close(one, eight, rtol=1e-9, atol=1e-9)
    curves = [
        jax.tree.map(np.float64, [{k: h[k] for k in ("loss", "gradient_norm", "training",
                                                    "test_error", "agreement")}
                                  for h in run.record["history"]])
        for run in runs
    ]  # fmt: skip
    chex.assert_trees_all_close(*curves, rtol=1e-9, atol=1e-9)


def test_replicas_agree_on_every_leaf(digits, pair, monkeypatch):
    """`out_axes=None` does not check it."""
    from abflax.training.run import Run

    states = []
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self: (states.append(self.state),
                                                               save(self)))  # fmt: skip
    _distill(digits, **pair, precision="float64", resources=Resources(devices=8))  # compiled above
    assert len(states) == 2
    for leaf in jax.tree.leaves(states[0]):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0], copy)


def test_a_batch_that_does_not_divide_is_refused(digits, teacher, tmp_path):
    with pytest.raises(InputError, match="a batch of 12 does not divide among 8 devices"):
        _distill(digits, teacher, batch_size=12, resources=Resources(), workdir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_fewer_examples_than_a_batch(digits, teacher):
    few = (digits[0].take(np.arange(5)), digits[1])
    record = _distill(few, None, method="cross-entropy", epochs=(0, 7)).record
    # ⌊7 · 5 / 16⌋ = 2 steps, of which the first ends with epoch 4 (20 ≥ 16).
    assert record["phases"][0]["steps"] == 2
    assert [(h["epoch"], h["step"]) for h in record["history"]] == [(6, 1), (7, 2)]
    with pytest.raises(InputError, match="3 epochs of 5 examples are less than one batch of 16"):
        _distill(few, None, method="cross-entropy", epochs=(0, 3))
    with pytest.raises(InputError, match="so phase initialise would have no step"):
        _distill(few, teacher, epochs=(1, 9))


def _poisoned(digits, at):
    """Data whose one bad pixel comes in a later step."""
    images = digits[0].images.astype(np.float32)
    images[at] = 1e38
    return Dataset(images, digits[0].labels, preprocessing=digits[0].preprocessing), digits[1]


@pytest.mark.slow
def test_numbers_that_are_none_stop_the_run(digits, teacher, tmp_path):
    from abflax.data import Stream

    order = Stream(64, 16, 0).batches(0, 4)[0]
    poisoned = _poisoned(digits, order[2, 5])
    resources = Resources(devices=1, checkpoint_seconds=0.0)
    with pytest.raises(NonFiniteError, match=r"is not finite at step 2 of phase initialise.*"
                                             r"last good checkpoint is step 2,"):  # fmt: skip
        _distill(poisoned, teacher, workdir=tmp_path, resources=resources)
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "record.json").exists()
    assert read_record(run / "diverged.json")["error"].startswith(
        "the loss is not finite at step 2"
    )
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest()["history"]["step"] == 2


@pytest.mark.slow
def test_a_teacher_that_is_not_a_number(digits, teacher):
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), teacher.variables)
    with pytest.raises(NonFiniteError, match="loss is not finite at step 0 of phase joint"):
        _distill(digits, Network(teacher.model, broken), method="kd")


@pytest.mark.slow
def test_a_checkpoint_of_another_configuration(digits, teacher, tmp_path):
    with pytest.raises(Interrupted):
        _distill(digits, teacher, workdir=tmp_path, reporter=StopAt(2))
    (run,) = (tmp_path / "runs").iterdir()
    other = _distill(digits, teacher, workdir=tmp_path / "x", epochs=(1, 2)).directory
    run.rename(tmp_path / "runs" / other.name)
    with pytest.raises(
        InputError, match=r"another configuration: epochs is \[1, 1\], not \[1, 2\]"
    ):
        _distill(digits, teacher, workdir=tmp_path, epochs=(1, 2))


@pytest.mark.parametrize("damaged", [pytest.param("meta", marks=pytest.mark.slow), "state"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    whole, digits, teacher, tmp_path, damaged
):
    resources = Resources(devices=1, checkpoint_seconds=0.0)
    with pytest.raises(Interrupted):
        _distill(digits, teacher, workdir=tmp_path, reporter=StopAt(3), resources=resources)
    (run,) = (tmp_path / "runs").iterdir()
    for file in (run / "checkpoints" / "3" / damaged).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"checkpoints/3 cannot be read.*the one before"):
        resumed = _distill(digits, teacher, workdir=tmp_path, resources=resources)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)


@pytest.mark.parametrize("damaged", [pytest.param("meta", marks=pytest.mark.slow), "state"])
def test_where_every_checkpoint_is_damaged_the_run_does_not_begin_anew(
    digits, teacher, tmp_path, damaged
):
    with pytest.raises(Interrupted):
        _distill(digits, teacher, workdir=tmp_path, reporter=StopAt(1))
    for file in tmp_path.glob(f"runs/*/checkpoints/*/{damaged}/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(InputError, match="no checkpoint in .* fits and can be read; remove"),
    ):
        _distill(digits, teacher, workdir=tmp_path)


def test_what_cannot_be_distilled(digits, teacher, tmp_path):
    with pytest.raises(InputError, match="needs a teacher"):
        _distill(digits, None, workdir=tmp_path)
    with pytest.raises(InputError, match="unknown layer 'layer4'; did you mean layer"):
        _distill(digits, teacher, layers=("layer4",), workdir=tmp_path)
    test = Dataset(np.zeros((1, 4, 4, 1)), np.zeros(1, int))
    with pytest.raises(InputError, match=r"test images have shape \(4, 4, 1\)"):
        _distill((digits[0], test), teacher, workdir=tmp_path)
    eleven = dataclasses.replace(digits[1], num_classes=11)
    with pytest.raises(InputError, match="test images are of 11 classes, the training images of 1"):
        _distill((digits[0], eleven), teacher, workdir=tmp_path)
    for name, meant in (("seed", "seeds"), ("batchsize", "batch_size"), ("epoch", "epochs")):
        with pytest.raises(InputError, match=f"unknown setting '{name}'; did you mean {meant}"):
            _distill(digits, teacher, workdir=tmp_path, **{name: 3})
    with pytest.raises(InputError, match="unknown option of method activation-boundary 'options'"):
        _distill(digits, teacher, workdir=tmp_path, options={"margin": 2.0})
    assert not list(tmp_path.iterdir())


def test_positions_that_do_not_match(digits):
    from flax import linen as nn

    class Coarse(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            from abflax.taps import sow_tap

            for layer in (1, 2):
                images = nn.Conv(4, (3, 3), (2, 2))(images)
                sow_tap(self, f"layer{layer}", images)
            return nn.Dense(10)(images.mean(axis=(1, 2)))

    variables = init_variables(Coarse(), jax.random.key(0), SHAPE)
    with pytest.raises(InputError, match="layer1: the student's positions 8×8 are not the "
                                         "teacher's 4×4"):  # fmt: skip
        _distill(digits, Network(Coarse(), variables))


def test_a_workdir_that_cannot_be_written(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*file"):
        _distill(digits, None, method="cross-entropy", workdir=tmp_path / "file")


def test_weights_on_disk_are_those_returned(whole):
    from flax.traverse_util import flatten_dict

    on_disk = safetensors.numpy.load_file(whole.directory / "student.safetensors")
    chex.assert_trees_all_equal(on_disk, flatten_dict(whole.variables, sep="/"))


def test_seeds_can_be_varied_alone_and_share_a_program(digits, whole, teacher):
    from abflax import Seeds

    functions = compile_phase, compile_steps, compile_evaluation
    compiled = [each.cache_info().misses for each in functions]
    for name in ("weights", "order", "augmentation"):
        seeds = dataclasses.replace(Seeds(), **{name: 1})
        other = _distill(digits, teacher, seeds=seeds).variables
        stem = lambda variables: np.asarray(variables["params"]["Conv_0"]["kernel"])
        assert not np.array_equal(stem(other), stem(whole.variables)), name
    assert [each.cache_info().misses for each in functions] == compiled


def _without_times(record):
    copy = json.loads(json.dumps(record))
    for key in ("seconds", "finished"):
        copy.pop(key)
    for phase in copy["phases"]:
        phase.pop("seconds")
    return copy


def test_a_teacher_of_other_images(digits):
    model = MODELS["wrn10-1"]()
    colour = Network(model, init_variables(model, jax.random.key(0), (8, 8, 3)))
    with pytest.raises(InputError, match=r"'params/stem/kernel' has shape \(3, 3, 3, 16\), where "
                                         r"images of 1 channels need \(3, 3, 1, 16\)"):  # fmt: skip
        _distill(digits, colour)
    with pytest.raises(
        InputError, match=r"the network's weights for wrn10-1: 'params/stem/kernel'"
    ):
        evaluate(colour, digits[1])


def test_force_lets_what_is_not_finished_go_on(whole, digits, teacher, tmp_path):
    with pytest.raises(Interrupted):
        _distill(digits, teacher, workdir=tmp_path, reporter=StopAt(5), force=True)
    steps = []

    class Count(NullReporter):
        def steps(self, count, images, epoch, loss):
            steps.append(count)

    _distill(digits, teacher, workdir=tmp_path, reporter=Count(), force=True)
    assert sum(steps) == 3


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_with_one(digits, teacher, tmp_path):
    eight = Resources(devices=8)
    with pytest.raises(Interrupted):
        _distill(digits, teacher, workdir=tmp_path, reporter=StopAt(2), resources=eight)
    assert _distill(digits, teacher, workdir=tmp_path).record["phases"][1]["steps"] == 4


@pytest.mark.slow
def test_data_of_other_contents_is_another_run(digits, teacher, tmp_path):
    train, test = digits
    fewer = train.take(np.arange(32)), test.take(np.arange(9))
    for data in (digits, (train, fewer[1]), (fewer[0], test), (train, None)):
        with pytest.raises(Interrupted):
            _distill(data, teacher, workdir=tmp_path, reporter=StopAt(1))
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert dataclasses.replace(train, num_classes=11, name=None).name != train.name


def test_classes_and_normalisation_must_fit(digits, teacher):
    eleven = dataclasses.replace(digits[0], num_classes=11)
    with pytest.raises(InputError, match="the student, Tiny, has 10 logits for 11 classes"):
        _distill((eleven, digits[1]), teacher)
    with pytest.raises(InputError, match="the network, Tiny, has 10 logits for 11 classes"):
        evaluate(teacher, eleven)
    raw = Dataset(digits[1].images, digits[1].labels)
    with pytest.raises(InputError, match=r"normalized by \(0.0,\) and \(1.0,\)"):
        _distill((digits[0], raw), teacher)


def test_dispatches_need_a_step():
    with pytest.raises(InputError, match="at least 1, not -1"):
        Resources(steps_per_dispatch=-1)
