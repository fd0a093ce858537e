"""Reads and writes weights: published PyTorch state dicts, and a network's own variables."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.errors import InputError, brief, require_instances
from abflax.models import MODELS
from abflax.models.checks import require_fits
from abflax.models.network import Network
from abflax.models.torch_names import IGNORED, PUBLISHED_NAMES, torch_name_of
from abflax.models.variables import abstract_variables
from abflax.storage.files import write_whole

_WRAPPED = r"^((module|_orig_mod)\.)+"  # by torch's DataParallel and torch.compile
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # of the state dict, in a checkpoint
_LARGEST_EXPANSION = 100


def from_torch(name: str, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Converts a PyTorch-style state dict to Flax variables.

    Convolution kernels are transposed from OIHW to HWIO, dense weights from [out, in] to [in, out].
    The weight, bias, running mean and running variance of batch norms are unchanged.
    `num_batches_tracked` is ignored.

    Args:
      name: of the architecture, in `abflax.models.MODELS`. The numbers of classes and of image
        channels are inferred from the weights.
      state_dict: name -> array, with the published names; or a checkpoint that holds it as
        "state_dict", "model_state_dict" or "model".
      prefix: of all names; "module." and "_orig_mod." need not be given.

    Returns:
      {"params", "batch_stats"} as NumPy arrays of the state dict's dtypes.

    Raises:
      ValueError: if an entry is missing, has a wrong shape or dtype, or is left over; the message
        names it.
    """
    what = f"state dict for {name}"
    arrays = {}
    for key, value in _unwrap(state_dict).items():
        if not isinstance(key, str):
            raise InputError(f"{what}: {brief(key)} is no name")
        if not key.endswith(IGNORED):
            bare = re.sub(_WRAPPED, "", key.removeprefix(prefix))
            if bare in arrays:
                raise InputError(f"{what}: '{bare}' is there twice")
            arrays[bare] = _array(f"{what}: '{key}'", value)
    model, image_shape = _architecture(name, arrays)
    flat, unused = {}, set(arrays)
    for path, leaf in flatten_dict(abstract_variables(model, image_shape)).items():
        torch_name = torch_name_of(model, path)
        if torch_name not in arrays:
            raise _missing(name, torch_name, arrays)
        array = arrays[torch_name]
        unused.remove(torch_name)
        flat[path] = _from_layout(array)
        if flat[path].shape != leaf.shape:
            expected = _to_layout(np.empty(leaf.shape, bool)).shape
            raise InputError(f"{what}: '{torch_name}' has shape {array.shape}, expected {expected}")
        if not np.issubdtype(array.dtype, np.floating) and array.dtype != jnp.bfloat16:
            raise InputError(f"{what}: '{torch_name}' holds {array.dtype}, no floats")
        _require_numbers(f"{what}: '{torch_name}'", array, path)
    if unused:
        raise InputError(f"{what}: '{min(unused)}' is no weight of this architecture")
    return unflatten_dict(flat)


def to_torch(model: nn.Module, variables: Any) -> dict[str, np.ndarray]:
    """Converts Flax variables to {published name: array}, without `num_batches_tracked`.

    It is the inverse of `from_torch`.

    Raises:
      ValueError: if the architecture has no published names.
    """
    if type(model) not in PUBLISHED_NAMES:
        raise InputError(f"there are no published names for {type(model).__name__}")
    return {
        torch_name_of(model, path): _to_layout(np.asarray(leaf))
        for path, leaf in flatten_dict(variables).items()
    }


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads {name: array} from `.npz`, `.safetensors`, or `.pt` or `.pth` (which need torch).

    Nothing in a file is executed; pickled objects are refused.

    Raises:
      ValueError: if the file is missing or damaged, or has another format.
    """
    require_instances({"path": (path, str | Path)})
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file would raise if the name is too long
        raise InputError(f"there is no weights file {path}")
    if path.suffix not in _READERS:
        raise InputError(
            f"weights file {path} must end in one of {', '.join(_READERS)}, not '{path.suffix}'"
        )
    try:
        _require_plain_zip(path)
        return _READERS[path.suffix](path)
    except InputError:
        raise
    except Exception as error:  # each reader raises its own errors for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"weights file {path} cannot be read: {reason}") from error


def save_variables(path: str | Path, variables: Any) -> None:
    """Writes a tree of arrays as `.safetensors`, with names such as `params/stem/kernel`."""
    leaves = flatten_dict(variables, sep="/").items()
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in leaves}
    write_whole(Path(path), safetensors.numpy.save(flat))


def require_savable(what: str, variables: Any) -> None:
    """Raises `InputError` where `save_variables` cannot write arrays of those dtypes.

    Args:
      what: begins the message.
      variables: a tree of arrays, or of their shapes and dtypes.
    """
    for name, leaf in flatten_dict(variables, sep="/").items():
        try:
            safetensors.numpy.save({"": np.zeros(1, leaf.dtype)})
        except (safetensors.SafetensorError, TypeError) as error:
            raise InputError(
                f"{what} '{name}' holds {leaf.dtype}, which cannot be saved with the weights"
            ) from error


def read_variables(path: str | Path) -> dict[str, Any]:
    """Reads what `save_variables` wrote, for any Flax model: {"params", "batch_stats", …}.

    Raises:
      ValueError: if the file is missing, damaged, or holds no variables of a Flax model.
    """
    arrays = read_state_dict(path)
    if not any(name.startswith("params/") for name in arrays):
        raise InputError(f"{path} holds no variables of a Flax model, named params/…")
    return {"batch_stats": {}, **unflatten_dict(arrays, sep="/")}


def save_state_dict(path: str | Path, model: nn.Module, variables: Any) -> None:
    """Writes variables as a published state dict (`to_torch`) in `.safetensors`, for other tools.

    Raises:
      ValueError: if the architecture has no published names.
    """
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in to_torch(model, variables).items()}
    write_whole(Path(path), safetensors.numpy.save(flat, metadata={"format": "pt"}))


def load_network(name: str, path: str | Path, label: str | None = None) -> Network:
    """Loads a network of a known architecture from a file of weights.

    Args:
      name: of the architecture, in `abflax.models.MODELS`.
      path: a file that `save_variables` wrote, or a published state dict.
      label: the network's name in records; None: the architecture and a digest.

    Raises:
      ValueError: if the file cannot be read or does not fit the architecture.
    """
    arrays = read_state_dict(path)
    if any(key.startswith("params/") for key in arrays):
        for key, axes in (("params/stem/kernel", 4), ("params/classifier/bias", 1)):
            if key not in arrays:
                raise InputError(f"weights file {path} for {name}: '{key}' is missing")
            shape = arrays[key].shape
            if len(shape) != axes or 0 in shape:
                raise InputError(f"weights file {path} for {name}: '{key}' has shape {shape}")
        for key in arrays:
            if any(other.startswith(f"{key}/") for other in arrays):
                raise InputError(f"weights file {path}: '{key}' is an array and a folder of them")
        variables = {"batch_stats": {}, **unflatten_dict(arrays, sep="/")}
        model = MODELS[name](num_classes=len(arrays["params/classifier/bias"]))
        channels = arrays["params/stem/kernel"].shape[2]
        require_fits(f"weights file {path}", model, variables, (32, 32, channels))
        for key, array in arrays.items():
            _require_numbers(f"weights file {path} for {name}: '{key}'", array, key.split("/"))
    else:
        variables = from_torch(name, arrays)
        model, _ = _architecture(name, arrays)
    return Network(model, variables, label)


def _require_numbers(what: str, array: np.ndarray, path: Sequence[str]) -> None:
    """Raises `InputError` for NaN or infinity, and for a running variance below 0."""
    if not np.isfinite(array).all():
        raise InputError(f"{what} holds NaN or infinity")
    if path[0] == "batch_stats" and path[-1] == "var" and (array < 0).any():
        raise InputError(f"{what} is a variance, but below 0")


def _unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a checkpoint, or in the checkpoint in a checkpoint."""
    for key in _WRAPPERS:
        if isinstance(inner := checkpoint.get(key), Mapping):
            return _unwrap(inner)
    return checkpoint


def _array(what: str, value: Any) -> np.ndarray:
    """Converts to an array on the host. Raises `InputError` if that is impossible."""
    try:
        return np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{what} is no array: {str(error).splitlines()[0]}") from error


def _architecture(
    name: str, state_dict: Mapping[str, np.ndarray]
) -> tuple[nn.Module, tuple[int, int, int]]:
    """Returns the module that fits a state dict, and the shape of its images.

    The number of classes comes from the classifier, the number of channels from the stem.
    """
    model = MODELS[name]()
    if type(model) not in PUBLISHED_NAMES:
        raise InputError(f"there are no published names for {name}")
    shapes = {}
    for *path, axes in (("params", "classifier", "bias", 1), ("params", "stem", "kernel", 4)):
        torch_name = torch_name_of(model, tuple(path))
        if torch_name not in state_dict:
            raise _missing(name, torch_name, state_dict)
        shape = shapes[path[1]] = state_dict[torch_name].shape
        if len(shape) != axes or 0 in shape:
            raise InputError(f"state dict for {name}: '{torch_name}' has shape {shape}")
    return MODELS[name](num_classes=shapes["classifier"][0]), (32, 32, shapes["stem"][1])


def _missing(name: str, torch_name: str, state_dict: Mapping[str, Any]) -> InputError:
    """Returns the error for a missing entry, with the architecture that the others resemble."""

    def named_like(architecture: str) -> bool:
        model = MODELS[architecture]()
        if type(model) not in PUBLISHED_NAMES:
            return False
        _, module = PUBLISHED_NAMES[type(model)]
        return torch_name_of(model, ("params", *module.split("/"), "kernel")) in state_dict

    like = [] if named_like(name) else [other for other in MODELS if named_like(other)]
    hint = f"; these are named like the weights of {like[0]}" if like else ""
    return InputError(f"state dict for {name}: '{torch_name}' is missing{hint}")


def _from_layout(array: np.ndarray) -> np.ndarray:
    """Transposes OIHW -> HWIO and [out, in] -> [in, out]; leaves vectors unchanged."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def _to_layout(array: np.ndarray) -> np.ndarray:
    """Transposes HWIO -> OIHW and [in, out] -> [out, in]; leaves vectors unchanged."""
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def _require_plain_zip(path: Path) -> None:
    """Raises `InputError` for a zip file that holds a name twice, or expands a hundredfold."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        names = [entry.filename.removesuffix(".npy") for entry in file.infolist()]
        size = sum(entry.file_size for entry in file.infolist())
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"weights file {path} has '{twice[0]}' twice")
    if size > _LARGEST_EXPANSION * max(path.stat().st_size, 2**16):
        raise InputError(f"weights file {path} would expand to {size:,} bytes: is it damaged?")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"reading {path} needs PyTorch (pip install torch); or convert it to .safetensors"
        ) from None
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for key, value in _unwrap(loaded).items()
    }


_READERS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".npz": _read_npz,
    ".safetensors": safetensors.numpy.load_file,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
