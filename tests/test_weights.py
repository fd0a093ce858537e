"""Published weights in every format, and every way in which they can be wrong."""

import io
import pickle
import warnings
import zipfile

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.errors import InputError
from abflax.models import MODELS
from abflax.weights import (
    from_torch,
    load_network,
    read_state_dict,
    save_variables,
    to_torch,
)
from tests.conftest import draw_variables, under


@pytest.fixture(scope="module")
def state_dict(reference):
    return under("state_dict/", reference("wrn10_1"))


def test_npz_and_safetensors(tmp_path, state_dict):
    np.savez(tmp_path / "w.npz", **state_dict)
    safetensors.numpy.save_file(state_dict, tmp_path / "w.safetensors")
    expected = from_torch("wrn10-1", state_dict)
    for name in ("w.npz", "w.safetensors"):
        network = load_network("wrn10-1", tmp_path / name)
        chex.assert_trees_all_equal(network.variables, expected)
        assert network.model == MODELS["wrn10-1"](num_classes=10)


def test_torch_files(tmp_path, state_dict):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}
    for name, content in (("w.pt", tensors), ("w.pth", {"state_dict": tensors})):
        torch.save(content, tmp_path / name)
        chex.assert_trees_all_equal(
            load_network("wrn10-1", tmp_path / name).variables, from_torch("wrn10-1", state_dict)
        )


def test_own_format_round_trip(tmp_path, state_dict):
    variables = from_torch("wrn10-1", state_dict)
    save_variables(tmp_path / "deep" / "s.safetensors", variables)
    network = load_network("wrn10-1", tmp_path / "deep" / "s.safetensors", "mine")
    chex.assert_trees_all_equal(network.variables, variables)
    assert network.name == "mine"


def test_number_of_classes_is_read_off(state_dict):
    hundred = {**state_dict, "fc.weight": np.zeros((100, 64), np.float32),
               "fc.bias": np.zeros(100, np.float32)}  # fmt: skip
    variables = from_torch("wrn10-1", hundred)
    assert variables["params"]["classifier"]["kernel"].shape == (64, 100)


def test_prefix(state_dict):
    wrapped = {f"module.{k}": v for k, v in state_dict.items()}
    chex.assert_trees_all_equal(
        from_torch("wrn10-1", wrapped, prefix="module."), from_torch("wrn10-1", state_dict)
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_of_wrapped_modules(state_dict, prefix, key):
    """As DataParallel and torch.compile name their entries, and trainers save them."""
    checkpoint = {key: {prefix + name: v for name, v in state_dict.items()}, "epoch": 7}
    for given in (checkpoint, {"model": checkpoint}):
        chex.assert_trees_all_equal(from_torch("wrn10-1", given), from_torch("wrn10-1", state_dict))


def test_names_that_are_there_twice(tmp_path, state_dict):
    with pytest.raises(InputError, match="'fc.bias' is there twice"):
        from_torch("wrn10-1", state_dict | {"module.fc.bias": state_dict["fc.bias"]})
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for second in ("fc.bias.npy", "fc.bias"):
        with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "w.npz", "w") as file:
            warnings.simplefilter("ignore")
            file.writestr("fc.bias.npy", array.getvalue())
            file.writestr(second, array.getvalue())
        with pytest.raises(InputError, match="has 'fc.bias' twice"):
            read_state_dict(tmp_path / "w.npz")


def test_an_array_that_expands_a_thousandfold_is_not_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "w.npz", **{"fc.bias": np.zeros(10**8, np.uint8)})
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(InputError, match="w.npz would expand to 100,000,"):
        read_state_dict(tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["\x1b[2Jx", "a\rb", "\x9b31m", "a\nb", "\udcff"])
def test_messages_hold_no_escape_codes(tmp_path, state_dict, name):
    with pytest.raises(InputError) as raised:
        from_torch("wrn10-1", state_dict | {name: np.zeros(3)})
    assert str(raised.value).isprintable() and "is no weight of this" in str(raised.value)


def test_wrong_entries_are_named(state_dict):
    without = lambda name: {k: v for k, v in state_dict.items() if k != name}
    misshapen = state_dict | {"block2.layer.0.conv1.weight": np.zeros((32, 16, 1, 3), np.float32)}
    cases = [
        (without("block1.layer.0.bn2.bias"), "'block1.layer.0.bn2.bias' is missing"),
        (without("fc.bias"), "'fc.bias' is missing"),
        (state_dict | {"extra.weight": np.ones(3)}, "'extra.weight' is no weight of this"),
        (misshapen, r"'block2.layer.0.conv1.weight' has shape \(32, 16, 1, 3\), expected "
                    r"\(32, 16, 3, 3\)"),
        (state_dict | {"bn1.bias": np.zeros(64, int)}, "'bn1.bias' holds int64, no floats"),
    ]  # fmt: skip
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            from_torch("wrn10-1", given)
    with pytest.raises(InputError, match="'block1.layer.1"):
        from_torch("wrn16-1", state_dict)  # another architecture: the first that is missing


def test_own_files_of_another_architecture(tmp_path, state_dict):
    save_variables(tmp_path / "s.safetensors", from_torch("wrn10-1", state_dict))
    with pytest.raises(InputError, match=r"'batch_stats/group1_block1/norm1/mean' is missing"):
        load_network("wrn16-1", tmp_path / "s.safetensors")


def test_unreadable_files(tmp_path, state_dict):
    np.savez(tmp_path / "whole.npz", **state_dict)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "w.txt").write_text("weights")
    for name, message in (
        ("absent.npz", "there is no weights file"),
        ("half.npz", "half.npz cannot be read"),
        ("noise.safetensors", "cannot be read"),
        ("w.txt", r"must end in one of .npz, .safetensors, .pt, .pth, not '.txt'"),
    ):
        with pytest.raises(InputError, match=message):
            read_state_dict(tmp_path / name)


class _Bomb:
    def __reduce__(self):
        return (open, ("/tmp/abflax-was-here", "w"))


@pytest.mark.parametrize("name", ["bomb.npz", "bomb.pt"])
def test_nothing_in_a_file_is_executed(tmp_path, name, monkeypatch):
    if name.endswith(".pt"):
        pytest.importorskip("torch")
        (tmp_path / name).write_bytes(pickle.dumps({"fc.bias": _Bomb()}))
    else:
        np.savez(tmp_path / name, bomb=np.array([_Bomb()], dtype=object))
    opened = []
    monkeypatch.setattr("builtins.open", _spy(open, opened))
    with pytest.raises(InputError, match="cannot be read"):
        read_state_dict(tmp_path / name)
    assert "/tmp/abflax-was-here" not in opened


def _spy(real, opened):
    def spying(path, *arguments, **options):
        opened.append(str(path))
        return real(path, *arguments, **options)

    return spying


def test_to_torch_inverts(state_dict):
    variables = from_torch("wrn10-1", state_dict)
    back = to_torch(MODELS["wrn10-1"](), variables)
    chex.assert_trees_all_equal(from_torch("wrn10-1", back), variables)


@pytest.mark.parametrize("published", [False, True])
def test_weights_that_are_none_are_named(tmp_path, published):
    model = MODELS["wrn10-1"]()
    good = draw_variables(model, (8, 8, 1))
    for value, where, sentence in (
        (np.nan, ("params", "classifier", "bias"), "holds NaN or infinity"),
        (-1.0, ("batch_stats", "norm", "var"), "is a variance, but below 0"),
    ):
        flat = flatten_dict(jax.tree.map(np.array, good))
        path = next(key for key in flat if key[0] == where[0] and key[-1] == where[-1])
        flat[path].ravel()[0] = value
        variables = unflatten_dict(flat)
        if published:
            np.savez(tmp_path / "weights.npz", **to_torch(model, variables))
        else:
            np.savez(tmp_path / "weights.npz", **flatten_dict(variables, sep="/"))
        with pytest.raises(InputError, match=f"'[^']+' {sentence}"):
            load_network("wrn10-1", tmp_path / "weights.npz")
