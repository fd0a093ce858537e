"""Photographs through a run: decoded ahead by other processes, in an order that is given."""

import contextlib
import signal

import chex
import jax
import numpy as np
import pytest

from abflax import Dataset, InputError, Network, Resources, distill, evaluate
from abflax.data import DecodedBatches, Stream, decoding, normalize, read_folder
from abflax.data.decoders import Decoders
from abflax.data.decoding import centre_crop, random_crop
from abflax.models.variables import init_variables
from abflax.runtime.preemption import Interrupted
from abflax.training.inputs import EvaluationInputs, OrderedInputs
from abflax.training.parallel import InputSpec
from tests.conftest import Small
from tests.image_files import make_folder
from tests.stopping import StopAt

SIDE = 16
ONE = Resources(devices=1, workers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return read_folder(make_folder(tmp_path_factory.mktemp("photographs")), side=SIDE, workers=1)


@pytest.fixture(scope="module")
def teacher():
    variables = init_variables(Small(3), jax.random.key(7), (SIDE, SIDE, 3))
    return Network(Small(3), variables, "teacher")


def _distill(folder, teacher=None, **options):
    settings = {
        "test": folder.test, "method": "cross-entropy", "protocol": "official", "epochs": (0, 3),
        "batch_size": 8, "resources": ONE,
    } | options  # fmt: skip
    return distill(Small(3), teacher, folder.train, **settings)


BOTH_PHASES = {"method": "activation-boundary", "epochs": (1, 2)}


@pytest.fixture(scope="module")
def whole(folder):
    return _distill(folder)


def _image(folder, example):
    with open(folder.train.places[example], "rb") as file:
        return file.read()


def test_a_dispatch_has_the_crops_of_its_seed_epochs_and_examples(folder):
    stream, devices = Stream(30, 8, seed=3), jax.local_devices()[:2]
    spec = InputSpec(folder.train.preprocessing, (SIDE, SIDE, 3), devices, True, 3)
    inputs = OrderedInputs(folder.train, stream, spec, 5, 2)
    try:
        for step, count in ((4, 3), (7, 2), (0, 1), (1, 3)):  # it goes on, and anywhere else
            dispatch = inputs(step, count)
            assert dispatch.images.shape == (2, 3, 4, SIDE, SIDE, 3)
            expected = stream.batches(step, 3)
            found = [
                each.swapaxes(0, 1).reshape(3, 8) for each in (dispatch.examples, dispatch.epochs)
            ]
            chex.assert_trees_all_equal(tuple(found), expected)
            images = dispatch.images.swapaxes(0, 1).reshape(3, 8, SIDE, SIDE, 3)
            for index in range(count):
                for place in (0, 7):
                    example, epoch = (int(each[index, place]) for each in expected)
                    wanted = random_crop(_image(folder, example), SIDE, 5, epoch, example)
                    chex.assert_trees_all_equal(images[index, place], wanted)
            labels = dispatch.labels.swapaxes(0, 1).reshape(3, 8)
            chex.assert_trees_all_equal(labels, folder.train.labels[expected[0]])
    finally:
        inputs.close()


def test_held_out_photographs_are_evaluated_as_their_centres(folder, teacher, monkeypatch):
    """In batches of 5 of the 12, the last of them padded; the same numbers as from memory."""
    monkeypatch.setattr("abflax.training.inputs._FILES_EVALUATION_BATCH", 5)
    centres = []
    for place in folder.test.places:
        with open(place, "rb") as file:
            centres.append(centre_crop(file.read(), SIDE))
    in_memory = Dataset(np.stack(centres), folder.test.labels, 3, folder.test.preprocessing)
    found, wanted = evaluate(teacher, folder.test, 1), evaluate(teacher, in_memory, 1)
    assert found["examples"] == 12 and found["errors"] == wanted["errors"]
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    held_out = EvaluationInputs(folder.test, jax.local_devices()[:1], 1)
    try:
        for _ in range(2):  # and at every evaluation again
            masks, images = [], []
            for dispatch in held_out:
                masks.append(dispatch.mask[0, 0])
                images.append(dispatch.images[0, 0])
            mask = np.concatenate(masks)
            assert mask.tolist() == [True] * 12 + [False] * 3
            chex.assert_trees_all_equal(np.concatenate(images)[mask], in_memory.images)
    finally:
        held_out.close()


def test_no_image_is_decoded_in_this_process(folder, whole, monkeypatch):
    asked = []
    close = DecodedBatches.close
    monkeypatch.setattr(
        DecodedBatches, "close", lambda self: (asked.append(self.decoders.decoded), close(self))
    )

    def refuse(*_, **__):
        raise AssertionError("an image was opened here")

    monkeypatch.setattr(decoding.Image, "open", refuse)
    result = _distill(folder)
    chex.assert_trees_all_equal(result.variables, whole.variables)
    training, evaluation = asked
    # 11 steps of 8 and three evaluations of 12; what was decoded ahead comes on top.
    assert len(training) == 2 and 88 <= sum(training) <= 88 + 4 * 8
    assert 36 <= sum(evaluation) <= 36 + 4 * 12


def test_stopped_and_resumed_is_never_stopped(folder, whole, tmp_path):
    with pytest.raises(Interrupted):
        _distill(folder, workdir=tmp_path, reporter=StopAt(6, signal.SIGINT))
    result = _distill(folder, workdir=tmp_path)
    chex.assert_trees_all_equal(result.variables, whole.variables)
    assert result.record["history"] == whole.record["history"]


@pytest.mark.slow
def test_dispatches_and_devices_change_no_number(folder, teacher):
    runs = [
        _distill(folder, teacher, precision="float64", resources=each, **BOTH_PHASES).variables
        for each in (
            ONE,
            Resources(devices=2, steps_per_dispatch=3, workers=1),
        )
    ]
    chex.assert_trees_all_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_shots_are_of_each_class_and_part_of_the_run(folder, teacher, whole):
    few = _distill(folder, teacher, **BOTH_PHASES | {"epochs": (1, 1)}, per_class=4, batch_size=4)
    assert few.record["config"]["per_class"] == 4 and few.record["hash"] != whole.record["hash"]
    assert [phase["steps"] for phase in few.record["phases"]] == [3, 3]
    assert whole.record["config"]["per_class"] is None


def test_what_photographs_cannot_do(folder):
    with pytest.raises(InputError, match="views cannot be counted"):
        _distill(folder, views=2, protocol="paper")
    with pytest.raises(InputError, match="not both"):
        _distill(folder, per_class=2, fraction=0.5)
    with pytest.raises(InputError, match="per_class must be at least 1"):
        _distill(folder, per_class=0)


def test_an_image_that_is_gone_is_named(tmp_path):
    folder = read_folder(make_folder(tmp_path), side=SIDE, workers=1)
    (tmp_path / "train" / "cat" / "03.png").unlink()
    with pytest.raises(InputError, match=r"image .*cat/03.png cannot be read any more"):
        _distill(folder)


def test_a_process_that_dies_is_told(folder):
    batches = DecodedBatches(folder.train, lambda step: ("centre crop", [0], [()]), 1, 2, 1)
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    batches.into(0, images)
    assert images.any() and (images[0] == centre_crop(_image(folder, 0), SIDE)).all()
    batches.decoders._processes[0].kill()
    with pytest.raises(InputError, match="has ended with signal 9"):
        for number in range(1, 4):
            batches.into(number, images)
    batches.close()


def test_more_answers_than_a_connection_holds():
    """Neither side waits for the other to read first."""
    decoders = Decoders(1, 1, workers=1)
    with contextlib.closing(decoders), _at_most(30):
        # A task that fails at once, and is longer than its answer, as tasks are.
        tickets = [decoders.ask([("no such work", None, "x" * 200, ())] * 32) for _ in range(1000)]
        for ticket in tickets:
            assert decoders.wait(ticket) == [(False, "'no such work'")] * 32
    assert decoders.decoded == [32_000]


@contextlib.contextmanager
def _at_most(seconds):
    """Fails in whatever takes longer."""

    def late(*_):
        pytest.fail(f"{seconds} s are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_normalised_by_imagenets_mean(folder):
    grey = np.full((1, 2, 2, 3), 128, np.uint8)
    found = np.asarray(normalize(grey, folder.train.preprocessing))[0, 0, 0]
    np.testing.assert_allclose(found, [(0.50196 - m) / s for m, s in (
        (0.485, 0.229), (0.456, 0.224), (0.406, 0.225))], atol=1e-4)  # fmt: skip
