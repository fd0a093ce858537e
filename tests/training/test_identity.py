"""A result is never another experiment's, and a damaged one is never returned."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from abflax import InputError, Interrupted, Network, RunConfig, Tapped, distill, evaluate
from abflax.analysis import examine
from abflax.data.image_files import exactly_named
from abflax.methods.views import VIEWS
from abflax.models import model_name
from abflax.runtime.reporter import NullReporter
from abflax.training import fingerprint
from abflax.training.fingerprint import program_digests
from abflax.training.record import read_record
from abflax.weights import read_state_dict
from tests import identity
from tests.identity import (
    MIXED,
    NAMED,
    REFUSED,
    base,
    experiments,
    flip,
    make_net,
    make_teacher,
    outcome,
    tapped,
)
from tests.stopping import StopAt


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The folder of the base experiment, finished."""
    return identity.finished(tmp_path_factory.mktemp("finished"), base())


@pytest.fixture(scope="module")
def workdir(directory):
    return directory.parent.parent


CASES = {
    ("training data", "one label"): NAMED,
    ("training data", "reversed, under the same name"): REFUSED,
    ("training data", "taken under the same name"): NAMED,
    ("test data", "one pixel, under the same name"): REFUSED,
    ("student", "initializer"): REFUSED,
    ("student", "unnamed function"): REFUSED,
    ("student", "unnamed object"): REFUSED,
    ("student", "factor in its code"): REFUSED,
    ("student", "gradient in its code"): REFUSED,
    ("student", "evaluation in its code"): REFUSED,
    ("student", "loss in its code"): REFUSED,
    ("student", "tap"): NAMED,
    ("teacher", "a bias"): REFUSED,
    ("teacher", "epsilon in its code"): REFUSED,
    ("configuration", "margin"): NAMED,
    ("surroundings", "seed offset"): REFUSED,
}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_another_experiment(case, workdir):
    (found,) = [each for each in experiments(base()) if each[:2] == case]
    with found[3]:
        assert outcome(found[2], workdir)[0] == CASES[case]


def test_the_same_experiment_is_served(workdir, directory):
    """Also with data and networks that are copies, and functions and objects without names."""
    name = json.loads((directory / "record.json").read_text())["config"]["student"]
    assert "<lambda>" in name and "_Shift object" in name and "0x" not in name
    before = (directory / "record.json").read_bytes()
    result = distill(**base(), workdir=workdir)
    assert result.record == json.loads(before) and result.directory == directory


OWN_CASES = {
    "augmentation": NAMED,
    "augmentation, by little": REFUSED,
    "metric's array": REFUSED,
    "no metric": REFUSED,
    "term": REFUSED,
    "term's module": REFUSED,
    "schedule": REFUSED,
    "optimizer after many steps": REFUSED,
    "average": NAMED,
}


@pytest.mark.slow  # the tests of own methods, functions and optimizers try some of them
def test_other_code_of_ones_own(tmp_path):
    identity.finished(tmp_path, identity.own())
    for _, what, changed, _ in identity.own_experiments():
        if what in OWN_CASES:
            assert outcome(changed, tmp_path)[0] == OWN_CASES[what], what
    assert outcome(identity.own(), tmp_path) == (MIXED, "served")


FACTOR = 1.0


class Global(nn.Module):
    """A network that reads a global."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(2, (3, 3), strides=2)(images)).mean(axis=(1, 2))
        return FACTOR * nn.Dense(10)(x)


def test_code_that_reads_a_global_is_compiled_anew(tmp_path, monkeypatch):
    """Though the module is the same object: in training, evaluation and analysis."""
    student, test = Global(), base()["test"]
    settings = base() | {"epochs": (0, 1), "method": "cross-entropy", "teacher": None}
    settings["student"] = student

    def numbers():
        result = distill(**settings)
        network = Network(student, variables)
        seen = [evaluate(network, test)["test_cross_entropy"], first_order(network, test)]
        return [result.record["history"][0]["loss"], *seen]

    def first_order(network, test):
        tapped = Network(Tapped(student, {"layer1": "Dense_0"}), network.variables)
        return examine(tapped, test).student.wrong.mean()

    variables = distill(**settings, workdir=tmp_path).variables
    first = numbers()
    monkeypatch.setattr(f"{__name__}.FACTOR", -2.0)
    assert all(ours != theirs for ours, theirs in zip(numbers(), first, strict=True))
    with pytest.raises(InputError, match="another student's computation"):
        distill(**settings, workdir=tmp_path)
    monkeypatch.undo()
    assert numbers() == first


def test_what_a_teacher_computes_in_training_mode_counts_where_it_is_run_in_it():
    """Under protocol official its batch norms use the batch, and their statistics move."""
    start = base()
    teachers = [make_teacher(make_net(momentum=momentum)) for momentum in (0.9, 0.5)]
    for protocol, same in (("paper", True), ("official", False)):
        config = RunConfig("digits", "net", "teacher", protocol=protocol)
        one, two = (
            program_digests([(config, start["student"])], [teacher], start["data"])[config.hash]
            for teacher in teachers
        )
        assert (one["teacher's computation"] == two["teacher's computation"]) == same


def test_a_view_that_is_replaced_counts(monkeypatch):
    start = base()
    config = RunConfig("digits", "net", "teacher", method="bss")
    arguments = [(config, start["student"])], [start["teacher"]], start["data"]
    assert not any(name.startswith("phase") for name in program_digests(*arguments)[config.hash])
    found = []
    for factor in (1.0, 2.0):
        moved = lambda apply, images, labels, keys, factor=factor: factor * images  # noqa: E731
        (name,) = {view for phase in config.phases for view in phase.views}
        monkeypatch.setitem(VIEWS, name, moved)
        found.append(program_digests(*arguments)[config.hash])
    assert found[0] != found[1]


def _cell(layers, factor=1.0):
    """A student of a local class, as a notebook's cell makes it."""

    class Student(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = factor * nn.Conv(2, (3, 3), strides=2, name="conv")(images)
            x = nn.relu(x).mean(axis=(1, 2))
            for _ in range(layers):
                x = nn.relu(nn.Dense(3)(x))
            return nn.Dense(10)(x)

    return Tapped(Student(), {"layer1": "conv"})


def test_an_edited_class_is_another_run_or_refused(tmp_path):
    """Another run where its variables differ; what else was edited shows in its program."""
    settings = base() | {"epochs": (0, 1), "method": "cross-entropy", "teacher": None}

    def run(student, workdir=tmp_path):
        return distill(**settings | {"student": student}, workdir=workdir).record

    first, edited = run(_cell(0)), run(_cell(1))
    assert edited["history"] == run(_cell(1), None)["history"] != first["history"]
    assert run(_cell(0)) == first and run(_cell(1)) == edited
    with pytest.raises(InputError, match="another student's computation"):
        run(_cell(1, factor=2.0))
    assert run(_cell(1)) == edited


def test_what_differs_is_named_and_force_trains_anew(tmp_path):
    settings = base() | {"epochs": (0, 1), "method": "cross-entropy", "teacher": None}
    first = distill(**settings, workdir=tmp_path)
    _, _, changed, _ = next(
        each for each in experiments(settings) if each[1] == "one label, under the same name"
    )
    with pytest.raises(InputError, match="another training labels, .* --force"):
        distill(**changed, workdir=tmp_path)
    second = distill(**changed, workdir=tmp_path, force=True)
    assert second.record["hash"] == first.record["hash"]
    assert second.record["history"] != first.record["history"]
    with pytest.raises(InputError, match="another training labels"):
        distill(**settings, workdir=tmp_path)


@pytest.mark.parametrize("name", ["record.json", "student.safetensors", "fingerprint.json"])
def test_a_flipped_bit(name, workdir, directory):
    path = directory / name
    content = path.read_bytes()
    try:
        for place in (0.1, 0.5, 0.9):
            flip(path, int(8 * len(content) * place))
            told = f"{directory}.* (damaged|another|is no|cannot be read)"
            with pytest.raises(InputError, match=told):
                distill(**base(), workdir=workdir)
            path.write_bytes(content)
    finally:
        path.write_bytes(content)


def test_a_record_says_what_its_weights_are(workdir, directory):
    """As the name of a teacher with these weights does; and it is checked without a fingerprint."""
    record = json.loads((directory / "record.json").read_text())
    variables = unflatten_dict(read_state_dict(directory / "student.safetensors"), sep="/")
    student = base()["student"]
    assert Network(student, variables).name == f"{model_name(student)}:{record['weights']}"
    changed = {
        "record.json": json.dumps(record | {"config": record["config"] | {"batch_size": 8}}),
        "student.safetensors": safetensors.numpy.save(
            {name: array + 1 for name, array in flatten_dict(variables, sep="/").items()}
        ),
    }
    stamp = (directory / "fingerprint.json").read_bytes()
    for name, content in changed.items():
        before = (directory / name).read_bytes()
        (directory / "fingerprint.json").unlink()
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=f"{name} is (not the record|damaged)"):
            distill(**base(), workdir=workdir)
        (directory / name).write_bytes(before)
        (directory / "fingerprint.json").write_bytes(stamp)
    del record["weights"]
    assert read_record(_written(workdir / "old.json", record)) == record


def _written(path, record):
    path.write_text(json.dumps(record))
    return path


def test_another_version_is_said(workdir, directory, monkeypatch):
    """Lowered programs are not compared then; data and weights are."""
    versions = fingerprint._versions() | {"jax": "0.0.1"}
    monkeypatch.setattr(fingerprint, "_versions", lambda: versions)
    notes = []
    reporter = NullReporter()
    monkeypatch.setattr(reporter, "finished", lambda note="": notes.append(note), raising=False)
    distill(**base(), workdir=workdir, reporter=reporter)
    assert "it was made by other versions: jax " in notes[0] and "not 0.0.1" in notes[0]
    _, _, changed, _ = next(
        each for each in experiments(base()) if each[1] == "one pixel, under the same name"
    )
    with pytest.raises(InputError, match="another training images"):
        distill(**changed, workdir=workdir)


def test_another_version_is_said_when_a_run_goes_on(tmp_path, monkeypatch):
    settings = base() | {"epochs": (0, 1), "method": "cross-entropy", "teacher": None}
    with pytest.raises(Interrupted):
        distill(**settings, workdir=tmp_path, reporter=StopAt(2))
    versions = fingerprint._versions() | {"jax": "0.0.1"}
    monkeypatch.setattr(fingerprint, "_versions", lambda: versions)
    notes = []
    reporter = NullReporter()
    monkeypatch.setattr(reporter, "finished", lambda note="": notes.append(note), raising=False)
    distill(**settings, workdir=tmp_path, reporter=reporter)
    assert "it goes on from a checkpoint, though it was made by other versions: jax" in notes[0]


def test_images_of_bfloat16_are_known_by_their_contents(tmp_path):
    settings = base() | {"epochs": (0, 1), "method": "cross-entropy", "teacher": None, "test": None}
    data = settings["data"].take(np.arange(16))
    data = dataclasses.replace(data, images=data.images.astype(jnp.bfloat16))
    settings |= {"data": data, "workdir": tmp_path}
    assert distill(**settings).record == distill(**settings).record
    changed = dataclasses.replace(data, images=data.images[::-1])
    with pytest.raises(InputError, match="another training images"):
        distill(**settings | {"data": exactly_named(changed, data.name)})


EDITS = st.fixed_dictionaries(
    {
        "seeds": st.sampled_from([0, np.int64(0), 1]),
        "margin": st.sampled_from([1, 1.0, np.float32(1), 2.0]),
        "temperature": st.sampled_from([3, 3.0, 4.0]),
        "epochs": st.sampled_from([(1, 1), (1, 2)]),
        "test label": st.sampled_from([0, 0, 1]),  # training labels enter no number of this method
        "pixel": st.sampled_from([0, 0, 1]),
        "test pixel": st.sampled_from([0, 0, 1]),
        "teacher's bias": st.sampled_from([0, 0, 1]),
        "initializer": st.sampled_from([0.1, 0.1, 0.2]),
        "copied": st.booleans(),
    }
)
"""Random edits, of which some say the same in another way. A data set's name stays the same."""


def _edited(edit):
    """The settings of the base experiment under an edit."""
    edit = dict(edit)
    start, scale = base(), edit.pop("initializer")
    pixel, test_pixel, label = (edit.pop(each) for each in ("pixel", "test pixel", "test label"))

    def data(role, pixel, label):
        found = start[role]
        images, labels = found.images.copy(), found.labels.copy()
        images[3, 4, 4] += pixel
        labels[5] = (labels[5] + label) % 10
        if not edit["copied"] and not pixel and not label:
            return found
        return dataclasses.replace(found, images=images, labels=labels)

    def nudged(variables):
        variables["params"]["Dense_0"]["bias"][0] += edit.pop("teacher's bias")
        return variables

    changed = {
        "data": data("data", pixel, 0),
        "test": data("test", test_pixel, label),
        "teacher": make_teacher(change=nudged),
        "student": tapped(make_net(scale)(2)),
    }
    del edit["copied"]
    return start | changed | edit


SEEN = {}  # what the examples so far have found, both ways


@pytest.mark.slow
@settings(max_examples=30, phases=[Phase.generate])
@given(edit=EDITS)
def test_equal_fingerprints_and_equal_numbers(edit, tmp_path_factory):
    """Over all examples: one fingerprint (and name) has one result, and one result one of them."""
    folder = tmp_path_factory.mktemp("edited")
    result = distill(**_edited(edit), workdir=folder)
    stamp = json.loads((result.directory / fingerprint.FILE).read_text())
    identity = json.dumps([result.record["hash"], stamp["inputs"], stamp["surroundings"]])
    history = [{**entry, "seconds": 0} for entry in result.record["history"]]
    numbers = json.dumps([result.record["weights"], history])
    assert SEEN.setdefault(("numbers of", identity), numbers) == numbers
    assert SEEN.setdefault(("identity of", numbers), identity) == identity


def test_the_page_says_what_was_measured():
    facts = json.loads(identity.FACTS.read_text())
    tried = [sum(sum(counts.values()) for counts in facts[kind].values())
             for kind in ("finished", "stopped halfway")]  # fmt: skip
    assert min(tried) >= 60
    for kind in ("finished", "stopped halfway"):
        assert not any(MIXED in counts for counts in facts[kind].values())
    assert all(counts["served"] == 0 for counts in facts["flips"].values())


@pytest.mark.slow
def test_everything_that_the_page_counts():
    facts = identity.measure(lambda line: None)
    assert facts == json.loads(identity.FACTS.read_text())
