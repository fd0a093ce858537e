"""Whatever is given: the documented result, or the documented exception naming the culprit.

`--hypothesis-profile=slow` tries three hundred examples of each.
"""

import copy
import dataclasses
import io
import json
import pickle
import re
import tempfile
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from abflax import Dataset, InputError, Resources, RunConfig, Seeds, distill
from abflax.data import Preprocessing, holdout, subset
from abflax.methods import METHODS
from abflax.models import MODELS
from abflax.storage.checkpoint import Checkpoints
from abflax.weights import from_torch, load_network, read_state_dict, save_variables
from experiments import run
from experiments.common import cli
from tests.conftest import Small, under
from tests.experiments.conftest import plain
from tests.strategies import SIDES, arrays

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text(max_size=8),
    st.binary(max_size=3), st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    st.lists(st.integers(), max_size=2), st.just(Seeds()), st.just({"a": 1}),
)  # fmt: skip
NAMES = st.sampled_from([*METHODS, "l3", "kd+nst", "l0", "l", "+", "kd+", "paper", "official"])
CONFIG = {
    "dataset": st.just("digits"), "student": st.just("wrn10-1"), "teacher": st.none(),
    "method": NAMES, "protocol": st.sampled_from(["paper", "official"]),
    "setting": st.sampled_from(["cifar", "transfer"]),
    "epochs": st.tuples(st.integers(-1, 3), st.integers(-1, 3)), "batch_size": st.integers(0, 3),
    "fraction": st.floats(-1, 2), "evaluate_every": st.integers(-1, 9),
    "precision": st.sampled_from(["float32", "bfloat16", "float16"]),
    "options": st.lists(st.tuples(st.sampled_from(["margin", "layers", "temperature", "power",
                                                   "transfer_weight", "kernel", "margni"]),
                                  ANYTHING), max_size=2).map(tuple),
}  # fmt: skip


@given(data=st.data())
def test_configurations(data):
    """One or two fields are anything at all, the others plausible."""
    names = data.draw(st.lists(st.sampled_from(sorted(CONFIG)), max_size=4, unique=True))
    odd = data.draw(st.lists(st.sampled_from(sorted(CONFIG)), max_size=2, unique=True))
    given_fields = {name: data.draw(CONFIG[name]) for name in names}
    given_fields |= {name: data.draw(ANYTHING) for name in odd}
    try:
        config = RunConfig(**{"dataset": "digits", "student": "wrn10-1", **given_fields})
    except InputError as error:
        assert given_fields and len(str(error)) > 15
        return
    assert re.fullmatch("[0-9a-f]{12}", config.hash)
    text = json.dumps(config.as_json(), allow_nan=False)
    assert config.hash == RunConfig(**given_fields | _required(given_fields)).hash
    assert json.loads(text)["epochs"] == list(config.epochs)


def _required(fields):
    return {k: fields.get(k, v) for k, v in (("dataset", "digits"), ("student", "wrn10-1"))}


@pytest.mark.parametrize("kind", [Seeds, Resources, Preprocessing])
@given(data=st.data())
def test_settings(kind, data):
    fields = [field.name for field in dataclasses.fields(kind)]
    values = {name: data.draw(ANYTHING) for name in data.draw(st.lists(st.sampled_from(fields)))}
    try:
        kind(**values)
    except InputError as error:
        assert any(name in str(error) for name in values), error


@given(name=st.one_of(st.text(max_size=12), st.from_regex(r"wrn-?\d{1,3}-\d{1,2}")))
def test_model_names(name):
    try:
        MODELS[name]
    except InputError as error:
        assert name in str(error) or not name.isprintable()
        return
    depth = int(re.match(r"wrn-?(\d+)", name)[1])
    assert depth >= 10 and depth % 6 == 4


@given(
    images=st.one_of(arrays(), arrays(st.tuples(*[st.integers(1, 3)] * 4))),
    labels=arrays(st.lists(SIDES, max_size=2).map(tuple)),
    classes=st.one_of(st.none(), ANYTHING),
    preprocessing=st.builds(
        Preprocessing,
        st.lists(st.floats(-9, 9), min_size=1, max_size=3).map(tuple),
        pad=st.integers(0, 3),
    ),  # fmt: skip
    share=st.floats(),
)
def test_datasets(images, labels, classes, preprocessing, share):
    fitting = jnp.arange(len(images) if images.ndim else 0) % 3
    for given_labels in (labels, fitting):
        try:
            data = Dataset(images, np.asarray(given_labels), classes, preprocessing)
        except InputError as error:
            assert len(str(error)) > 15
            continue
        assert data.labels.min() >= 0 and data.labels.max() < data.num_classes
        assert data.images.ndim == 4 and len(data.images) == len(data.labels) > 0
        for split in (subset, holdout):
            try:
                split(data, share, 0)
            except InputError as error:
                assert str(share) in str(error)


@pytest.fixture(scope="module")
def published(reference):
    return under("state_dict/", reference("wrn10_1"))


@given(data=st.data())
def test_changed_state_dicts(published, data):
    """Entries dropped, added, renamed, misshapen, of other dtypes, or no arrays at all."""
    changed = dict(published)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(changed, key=str)))
        change = data.draw(st.sampled_from(["drop", "rename", "replace", "cast", "add"]))
        if change in ("drop", "rename"):
            value = changed.pop(name)
        if change == "rename":
            changed[data.draw(st.one_of(st.text(max_size=9), st.integers()))] = value
        if change == "replace":
            changed[name] = data.draw(st.one_of(ANYTHING, arrays().map(np.asarray)))
        if change == "cast":
            changed[name] = changed[name].astype(
                data.draw(st.sampled_from(["float16", "int8", "complex64", "O"]))
            )
        if change == "add":
            changed["extra"] = np.zeros(3)
    try:
        variables = from_torch("wrn10-1", changed)
    except InputError as error:
        assert "state dict for wrn10-1" in str(error) and "'" in str(error)
        return
    wanted = flatten_dict(from_torch("wrn10-1", published))
    for path, leaf in flatten_dict(variables).items():
        assert jnp.issubdtype(leaf.dtype, jnp.floating)
        assert leaf.shape == wanted[path].shape or path[1] in ("classifier", "stem")


@pytest.mark.parametrize(("name", "value"), [(0, np.zeros(3)), (None, np.zeros(3)),
                                             ("bn1.bias", [[1.0], [1.0, 2.0]]),
                                             ("bn1.bias", None), ("fc.bias", 3.0),
                                             ("fc.bias", np.zeros(0)),
                                             ("conv1.weight", np.zeros((16, 3, 3)))])  # fmt: skip
def test_state_dicts_that_are_none(published, name, value):
    with pytest.raises(InputError, match=f"state dict for wrn10-1: .*{name}"):
        from_torch("wrn10-1", published | {name: value})


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("params/classifier/bias", np.float32(3), r"has shape \(\)"),
    ("params/classifier/bias", np.zeros(0, np.float32), r"has shape \(0,\)"),
    ("params/stem/kernel", np.zeros((3, 3, 3), np.float32), r"has shape \(3, 3, 3\)"),
    ("params/stem", np.zeros(3, np.float32), "is an array and a folder of them"),
    ("params", np.zeros(3, np.float32), "is an array and a folder of them"),
    ("other/stem", np.zeros(3, np.float32), "is no weight of this architecture"),
    ("other", np.zeros(3, np.float32), "is no weight of this architecture"),
    ("batch_stats/norm/mean", np.zeros(64, int), "holds int64, no floats"),
])  # fmt: skip
def test_own_weights_that_are_none(published, tmp_path, name, value, sentence):
    flat = flatten_dict(from_torch("wrn10-1", published), sep="/")
    np.savez(tmp_path / "w.npz", **flat | {name: value})
    with pytest.raises(InputError, match=f"w.npz.*'{name}' {sentence}"):
        load_network("wrn10-1", tmp_path / "w.npz")


@pytest.fixture(scope="module")
def files(published, tmp_path_factory):
    """The same weights in every format, as bytes."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    np.savez(folder / "w.npz", **published)
    save_variables(folder / "w.safetensors", from_torch("wrn10-1", published))
    try:
        import torch
    except ImportError:
        pass
    else:
        tensors = {k: torch.from_numpy(v.copy()) for k, v in published.items()}
        torch.save(tensors, folder / "w.pt")
    for path in folder.iterdir():
        found[path.suffix] = path.read_bytes()
    return found


@given(data=st.data())
def test_damaged_weights_files(files, data):
    suffix = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[suffix])
    for _ in range(data.draw(st.integers(0, 3))):
        where = data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(content) - 1)))
        content[where] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        path.write_bytes(content)
        try:
            network = load_network("wrn10-1", path)
        except InputError as error:
            assert str(path) in str(error) or "state dict for wrn10-1" in str(error), error
            assert "\n" not in str(error)
            return
    for leaf in jax.tree.leaves(network.variables):
        assert jnp.issubdtype(leaf.dtype, jnp.floating)


def test_a_copy_of_a_configuration_works_out_its_own_hash():
    config = RunConfig("digits", "wrn10-1")
    assert config.hash and config.phases
    for copied in (copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and not {"hash", "phases"} & vars(copied).keys()
        assert copied.hash == config.hash


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_loading_weights_executes_nothing(tmp_path, suffix, protocol):
    """Bare pickles, and pickles inside the formats, that would make a file."""
    if suffix in (".pt", ".pth"):
        torch = pytest.importorskip("torch")
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(_Bomb(trace), protocol))  # it does what it should
    trace.unlink()
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps({"fc.bias": _Bomb(trace)}, protocol))
    with pytest.raises(InputError, match=f"{path} cannot be read"):
        read_state_dict(path)
    if suffix == ".npz":
        np.savez(path, **{"fc.bias": np.array([_Bomb(trace)], dtype=object)})
    elif suffix != ".safetensors":
        torch.save({"fc.bias": _Bomb(trace)}, path, pickle_protocol=max(protocol, 2))
    with pytest.raises(InputError, match=f"{path} cannot be read"):
        read_state_dict(path)
    assert not trace.exists()


@given(junk=st.lists(st.tuples(
    st.sampled_from(["3", "9", "notes", "3.orbax-checkpoint-tmp", "-1", "03"]),
    st.sampled_from(["file", "empty", "meta", "metadata"]), st.binary(max_size=9),
), max_size=3, unique_by=lambda each: each[0]))  # fmt: skip
def test_junk_among_the_checkpoints(junk):
    """What is not a checkpoint is passed over or removed; the good one is found."""
    state = {"a": np.arange(3.0)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(folder) / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(2, state, {"step": 2})
        for name, kind, content in junk:
            if kind == "file":
                (folder / name).write_bytes(content)
                continue
            (folder / name).mkdir()
            if kind != "empty":
                (folder / name / "meta").mkdir()
            if kind == "metadata":
                (folder / name / "meta" / "metadata").write_bytes(content)
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.latest() == {"step": 2} | {"state": checkpoints.latest()["state"]}
            target = {"a": jax.ShapeDtypeStruct((3,), np.float64)}
            meta, found = checkpoints.restore(lambda meta: target)
            assert meta == {"step": 2}
            chex.assert_trees_all_equal(found, state)
            checkpoints.save(9, state, {"step": 9})
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.latest_step() == 9


FLAGS = {
    "--dataset": ["digits", "digit", ""], "--student": ["wrn10-1", "wrn11-1", "wrn-10-0", "x"],
    "--teacher": ["none", "wrn10-1", "wrn99999-1", ""], "--teacher-weights": [".", "x" * 300, ""],
    "--method": [*METHODS, "kd+kd", "+", "l0", "l1e9", "L2", ""], "--protocol": ["paper", "Paper"],
    "--epochs": ["1+1", "0+0", "-1+1", "1+", "²+1", "9" * 30 + "+1", "1.5+1"],
    "--fraction": ["1", "0.1", "nan", "inf", "-0", "2", "1e-400"],
    "--batch-size": ["16", "0", "-5", "1e3", "9" * 20], "--seeds": ["1", "0,", ",", "9" * 15, "²"],
    "--margin": ["1", "0", "nan", "inf", "-1"], "--layers": ["layer1", "", ",", "layer9"],
    "--temperature": ["3", "0", "nan"], "--transfer-weight": ["1", "inf", "-1", "0"],
    "--evaluate-every": ["1", "0", "9" * 30], "--precision": ["float32", "float16"],
    "--devices": ["1", "0", "-1", "999"], "--steps-per-dispatch": ["1", "0", "-1"],
    "--checkpoint-seconds": ["0", "nan", "-1", "inf"], "--force": [None], "--jsn": [None],
    "train": [None], "list": [None], "lst": [None],
}  # fmt: skip


class _Reached(Exception):
    """All was well, and training would begin."""


@given(flags=st.lists(st.sampled_from(sorted(FLAGS)), max_size=5, unique=True), data=st.data())
def test_command_lines(flags, data):
    """No traceback: one sentence and exit code 2, or the run begins."""
    words = ["--dataset", "digits", "--method", "cross-entropy"]
    for flag in flags:
        value = data.draw(st.sampled_from(FLAGS[flag]))
        words += [flag] if value is None else [f"{flag}={value}"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.argv", ["run", *words, "--workdir", folder])
        patch.setattr("sys.stderr", printed)
        patch.setattr(cli, "cache_compilation", lambda workdir: None)
        patch.setattr("abflax.distillation.Run", lambda *_: (_ for _ in ()).throw(_Reached))
        try:
            cli.main(lambda _: run.main(Console(file=io.StringIO())))
        except _Reached:
            assert not printed.getvalue() and "lst" not in flags and "--jsn" not in flags
        except SystemExit as left:
            assert left.code in (0, 2), printed.getvalue()
            assert left.code == 0 or plain(printed.getvalue())
        assert not list(Path(folder).iterdir())


DIGITS = Dataset(np.zeros((32, 8, 8, 1), np.uint8), np.arange(32) % 10, name="zeros")
GIVEN = {
    "student": Small(), "teacher": None, "data": DIGITS, "test": None, "method": "cross-entropy",
    "protocol": "paper", "setting": "cifar", "epochs": (0, 1), "batch_size": 16, "fraction": 1.0,
    "evaluate_every": 1, "seeds": 0, "precision": "float32", "workdir": None,
}  # fmt: skip


@given(name=st.sampled_from(sorted(GIVEN)), value=ANYTHING)
def test_distill(name, value):
    """One argument is anything at all."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("abflax.distillation.Run", lambda *_: (_ for _ in ()).throw(_Reached))
        try:
            distill(**GIVEN | {name: value})
        except _Reached:
            pass
        except InputError as error:
            words = str(error)
            assert name in words or repr(value)[:20] in words or str(value) in words, error
        assert not list(Path(folder).iterdir())


@given(shape=st.lists(st.integers(1, 3), max_size=5).map(tuple))
def test_images_of_any_shape(shape):
    model = MODELS["wrn10-1"]()
    run = lambda: jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False)
    )
    if len(shape) == 4:
        assert run()["params"]["stem"]["kernel"].shape == (3, 3, shape[-1], 16)
    else:
        with pytest.raises(InputError, match=re.escape(str(shape))):
            run()
