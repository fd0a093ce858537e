"""Training on a loader of the user's: the numbers, exact resume, what cannot be resumed exactly."""

import chex
import jax
import numpy as np
import pytest

from abflax import (
    Batches,
    Dataset,
    InputError,
    Interrupted,
    NonFiniteError,
    Resources,
    Seeds,
    distill,
    distill_group,
)
from abflax.data import BatchReader, Preprocessing, Stream
from abflax.training.record import read_record
from tests.conftest import Small
from tests.stopping import StopAt

ONE = Resources(devices=1)
NORMALIZED = Preprocessing((128.0,), (64.0,))


@pytest.fixture(scope="module")
def data():
    """Sixteen images of noise."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    return Dataset(images, np.arange(16) % 10, 10, NORMALIZED)


class Shuffled:
    """An endless loader in the order of a `Dataset` with the order's seed 0, made by hand."""

    def __init__(self, data):
        self.data, self.stream = data, Stream(len(data), 8, 0)

    def __iter__(self):
        return ShuffledIterator(self)


class ShuffledIterator:
    def __init__(self, parent):
        self.parent, self.step = parent, 0

    def __iter__(self):
        return self

    def __next__(self):
        (rows,), _ = self.parent.stream.batches(self.step, 1)
        self.step += 1
        return {"image": self.parent.data.images[rows], "label": self.parent.data.labels[rows]}

    def get_state(self):
        return {"step": np.int64(self.step)}

    def set_state(self, state):
        self.step = state["step"]


def passes(data):
    """A loader of two batches that knows no position: a function that makes a generator."""

    def loader():
        for part in (slice(0, 8), slice(8, 16)):
            yield {"image": data.images[part], "label": data.labels[part].tolist()}

    return Batches(loader, 10, epoch=2, preprocessing=NORMALIZED)


def test_a_loader_is_known_by_its_first_batch(data, tmp_path, caplog):
    """One that shuffles by the shapes of its batches. A run that is found says so."""
    other = Dataset(data.images[::-1], data.labels[::-1], 10, NORMALIZED)
    assert passes(data).name == passes(data).name != passes(other).name
    draw = np.random.default_rng(0)

    def shuffling():
        rows = draw.permutation(16)[:8]
        yield {"image": data.images[rows], "label": data.labels[rows]}

    shuffled = Batches(shuffling, 10, epoch=1)
    assert shuffled.name == Batches(shuffling, 10, epoch=1).name
    for batches, known in ((passes(data), "its first batch"), (shuffled, "the shapes of its")):
        for _ in range(2):
            trained(batches, epochs=(0, 1), workdir=tmp_path)
        assert f"its loader is known by {known}" in caplog.text
        caplog.clear()


def trained(data, **settings):
    fixed = {"method": "cross-entropy", "epochs": (0, 3), "resources": ONE}
    return distill(Small(), None, data, **{**fixed, **settings})


def stopped(tmp_path, data, step, **settings):
    """A run that was stopped at a step, and resumed."""
    with pytest.raises(Interrupted):
        trained(data, workdir=tmp_path, reporter=StopAt(step), **settings)
    return trained(data, workdir=tmp_path, **settings)


@pytest.fixture
def shuffled(data):
    return Batches(Shuffled(data), 10, epoch=2, preprocessing=NORMALIZED, name="mine")


def test_a_loader_gives_the_numbers_of_the_same_images_in_memory(data, shuffled):
    assert (shuffled.batch_size, shuffled.image_shape, len(shuffled)) == (8, (8, 8, 1), 16)
    found, wanted = trained(shuffled, test=data), trained(data, test=data, batch_size=8)
    chex.assert_trees_all_close(found.variables, wanted.variables, rtol=1e-6)
    for ours, theirs in zip(found.record["history"], wanted.record["history"], strict=True):
        assert (ours["step"], ours["epoch"]) == (theirs["step"], theirs["epoch"])
        assert ours["test_error"] == theirs["test_error"]
    assert found.record["config"]["dataset"] == shuffled.name and "mine-" in shuffled.name
    assert found.record["loader"] == {"resumes_exactly": True, "restarted_at": []}
    assert "loader" not in wanted.record


@pytest.mark.parametrize("step", [1, 4])
def test_a_loader_that_is_checkpointed_resumes_to_the_same_bits(data, shuffled, tmp_path, step):
    """In the middle of an epoch and at its end; in several steps a dispatch as well."""
    whole = trained(shuffled)
    resumed = stopped(tmp_path, shuffled, step)
    chex.assert_trees_all_equal(whole.variables, resumed.variables)
    assert resumed.record["loader"] == {"resumes_exactly": True, "restarted_at": []}
    assert read_record(resumed.directory / "record.json", resumed.record["hash"])


def test_runs_of_a_group_at_other_steps_get_the_batches_of_their_own(shuffled, tmp_path):
    """One was stopped at step 2; the other begins and catches up."""
    seeds = [Seeds(weights=seed) for seed in (0, 1)]
    alone = [trained(shuffled, seeds=each) for each in seeds]
    with pytest.raises(Interrupted):
        trained(shuffled, seeds=seeds[0], workdir=tmp_path, reporter=StopAt(2))
    both = distill_group(
        [{"seeds": each} for each in seeds], Small(), None, shuffled, workdir=tmp_path,
        method="cross-entropy", epochs=(0, 3), resources=ONE,
    )  # fmt: skip
    for ours, theirs in zip(both, alone, strict=True):
        chex.assert_trees_all_close(ours.variables, theirs.variables, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_devices_and_dispatches_change_nothing(shuffled):
    cropped = Batches(shuffled.loader, 10, 2, Preprocessing((128.0,), (64.0,), pad=1, flip=True))
    one = trained(cropped)
    many = trained(cropped, resources=Resources(devices=8, steps_per_dispatch=4))
    chex.assert_trees_all_close(one.variables, many.variables, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_resumed_exactly_says_so(data, tmp_path):
    """Stopped at step 3, the second pass begins anew: batches 0, 1, 0 and then 0, 1, 0."""
    batches = passes(data)
    resumed = stopped(tmp_path, batches, 3)
    assert resumed.record["loader"] == {"resumes_exactly": False, "restarted_at": [3]}
    order = [data.take(np.arange(8) + 8 * index) for index in (0, 1, 0, 0, 1, 0)]
    same = trained(
        Batches(lambda: iter([{"image": each.images, "label": each.labels} for each in order]),
                10, 2, NORMALIZED)
    )  # fmt: skip
    chex.assert_trees_all_equal(resumed.variables, same.variables)
    assert trained(batches).record["loader"]["restarted_at"] == []


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_batch_that_is_not_finite_is_named_where_it_can_be_read_again(data, checkpointed):
    images = data.images.astype(np.float32)

    class Broken(Shuffled):
        def __iter__(self):
            found = super().__iter__()
            return found if checkpointed else iter(lambda: next(found), None)

    loader = Broken(Dataset(images, data.labels, 10))
    batches = Batches(loader, 10, epoch=2)
    loader.data = type("", (), {"images": np.where(images == images[13, 0, 0], np.nan, images),
                                "labels": data.labels})  # fmt: skip
    where = "images" if checkpointed else "cannot give that batch again"
    with pytest.raises(NonFiniteError, match=where):
        trained(batches, epochs=(0, 30))


def test_a_pass_in_memory(data):
    """For held-out data; the last batch may be short."""

    def loader():
        for part in (slice(0, 9), slice(9, 16)):
            yield {"image": data.images[part], "label": data.labels[part]}

    read = Batches(loader, 10, epoch=2, preprocessing=NORMALIZED).read()
    chex.assert_trees_all_equal((read.images, read.labels), (data.images, data.labels))
    assert read.preprocessing == NORMALIZED
    with pytest.raises(InputError, match="drop what is left over"):
        trained(Batches(loader, 10, epoch=2))


def first(**changed):
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2, int)} | changed
    return lambda: iter([batch])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(first()(), 10, 2), "only once: give what makes it"),
        (lambda: Batches(3, 10, 2), "yields no batches: it is 3"),
        (lambda: Batches(first(), 10), "has no length"),
        (lambda: Batches(first(), 10, 0), "at least 1, not 0"),
        (lambda: Batches(lambda: iter([]), 10, 2), "yields no batch"),
        (lambda: Batches(lambda: iter([(1, 2)]), 10, 2), 'must yield {"image"'),
        (lambda: Batches(first(image=np.zeros((2, 8, 8), np.uint8)), 10, 2), r"got \(2, 8, 8\)"),
        (lambda: Batches(first(image=np.zeros((2, 8, 8, 1), int)), 10, 2), "uint8 or floating"),
        (lambda: Batches(first(label=np.array([0, 10])), 10, 2), r"must lie in \[0, 10\)"),
        (lambda: trained(Batches(first(), 10, 2), batch_size=4), "batch_size cannot be 4"),
        (lambda: trained(Batches(first(), 10, 2), fraction=0.5), "so fraction is said there"),
        (lambda: trained(Batches(first(), 10, 2), views=1), "so views is said there"),
        (lambda: trained(Batches(first(), 10, 2), resources=Resources(1, cache_targets=True)),
         "targets cannot be cached"),
        (lambda: Batches(lambda epoch: first()(), 10, 2), "without arguments: missing a required"),
        (lambda: Batches(lambda: 3, 10, 2), "must return an iterator, not 3"),
        (lambda: Batches(first(), 10, 2, (0.0, 1.0)), r"must be Preprocessing, not \(0.0, 1.0\)"),
        (lambda: Batches(first(), 10, 2, name=3), "name must be str, not 3"),
        (lambda: Batches(first(image=[[1], [2, 3]]), 10, 2), "images or labels are no arrays"),
        (lambda: trained(Batches(first(), 10, 2), test=Batches(first(), 10, 2)), r"\.read\(\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_said_in_a_sentence(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert len(str(error.value)) <= 400


def test_a_state_that_cannot_be_saved_is_refused(data, monkeypatch):
    monkeypatch.setattr(ShuffledIterator, "get_state", lambda self: {"step": object()})
    with pytest.raises(InputError, match="bytes or plain JSON values, not a dict|not {'step'"):
        Batches(Shuffled(data), 10, epoch=2)


def test_the_reader_goes_anywhere_it_has_a_position_of(shuffled):
    reader = BatchReader(shuffled)
    rows = [reader.next() for _ in range(2)]
    position = reader.position
    rows += [reader.next() for _ in range(2)]
    reader.seek(2, position)
    chex.assert_trees_all_equal(reader.next(), rows[2])
    assert reader.step == 3


@pytest.mark.parametrize("kind", [pytest.param("DataLoader", marks=pytest.mark.slow), "Dataset"])
def test_a_grain_loader_resumes_to_the_same_bits(data, kind, tmp_path):
    grain = pytest.importorskip("grain")
    rows = [{"image": i, "label": n} for i, n in zip(data.images, data.labels, strict=True)]
    if kind == "DataLoader":
        sampler = grain.samplers.IndexSampler(16, shuffle=True, seed=3)
        loader = grain.DataLoader(
            data_source=rows, sampler=sampler,
            operations=[grain.transforms.Batch(8, drop_remainder=True)],
        )  # fmt: skip
    else:
        loader = grain.MapDataset.source(rows).seed(3).shuffle().repeat().batch(8)
    batches = Batches(loader, 10, epoch=2, preprocessing=NORMALIZED)
    whole, resumed = trained(batches), stopped(tmp_path, batches, 3)
    chex.assert_trees_all_equal(whole.variables, resumed.variables)
    assert resumed.record["loader"] == {"resumes_exactly": True, "restarted_at": []}


def test_a_pytorch_loader(data):
    torch = pytest.importorskip("torch")
    tensors = torch.tensor(data.images), torch.tensor(data.labels)
    rows = [{"image": i, "label": n} for i, n in zip(*tensors, strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8, drop_last=True)
    batches = Batches(loader, 10, preprocessing=NORMALIZED)
    assert len(batches) == 16 and not batches.resumes
    same = trained(passes(data))
    chex.assert_trees_all_equal(trained(batches).variables, same.variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(same.variables))
