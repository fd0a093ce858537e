"""Writes networks as functions that run without abflax, for JAX and ONNX, and checks the files."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abflax.data import Preprocessing, normalize
from abflax.errors import DiskError, InputError
from abflax.models.network import Network, configure_model
from abflax.taps import module_of, run_model
from abflax.weights import from_torch, read_state_dict, to_torch

PLATFORMS = ("cpu", "cuda", "tpu")
"""What an exported function runs on."""

_TOLERANCE = 1e-5  # of the largest logit; the batch size may change the order of sums


def serialize(
    network: Network, image_shape: tuple[int, ...], dtype: Any, preprocessing: Preprocessing
) -> bytes:
    """Serializes a network in evaluation mode, with weights and normalization inside.

    Args:
      network: its model and variables.
      image_shape: `(height, width, channels)`.
      dtype: of the images, which are not normalized.
      preprocessing: the mean and deviation that they are normalized with.

    Returns:
      A `jax.export` function of one argument, `[batch, *image_shape]` for any batch size, to
      float32 logits `[batch, classes]`.

    Raises:
      ValueError: if the model needs its batch size as a number.
    """
    shape = jax.export.symbolic_shape("batch, " + ", ".join(map(str, image_shape)))
    exported = jax.export.export(jax.jit(_logits_of(network, preprocessing)), platforms=PLATFORMS)
    try:
        return bytes(exported(jax.ShapeDtypeStruct(shape, dtype)).serialize())
    except TypeError as error:
        if "_DimExpr" not in str(error):
            raise
        raise InputError(
            "the model needs its batch size as a number, so it cannot be exported for any: write "
            "images.shape[0] in place of len(images)"
        ) from error


def serialize_onnx(
    network: Network, image_shape: tuple[int, ...], dtype: Any, preprocessing: Preprocessing
) -> bytes:
    """Serializes a network as `serialize` does, for runtimes of ONNX: phones, pages, servers.

    The graph has one input, `images`, and one output, `logits`. The package jax2onnx writes it.

    Raises:
      ValueError: if jax2onnx is not installed.
    """
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)  # hides notes on its unused plugins
    model = _import_onnx("jax2onnx").to_onnx(
        _logits_of(network, preprocessing),
        [jax.ShapeDtypeStruct(("batch", *image_shape), dtype)],
        model_name="abflax",
        input_names=["images"],
        output_names=["logits"],
    )
    return bytes(model.SerializeToString())


def _import_onnx(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed: pip install 'abflax[onnx]' && "
            "pip install --no-deps jax2onnx"
        ) from error


def signature_of(function: bytes) -> dict[str, Any]:
    """Describes what a serialized function takes, returns and runs on."""
    exported = jax.export.deserialize(bytearray(function))
    (images,), (logits,) = exported.in_avals, exported.out_avals
    signature = {
        name: {"shape": [size if isinstance(size, int) else str(size) for size in value.shape],
               "dtype": str(value.dtype)}
        for name, value in (("images", images), ("logits", logits))
    }  # fmt: skip
    version = exported.calling_convention_version
    return signature | {"platforms": exported.platforms, "calling_convention_version": version}


def require_same_weights(path: Path, name: str, network: Network) -> None:
    """Raises `DiskError` if a state dict does not hold the network's weights, bit for bit.

    `name` is the architecture's in `abflax.models.MODELS`.
    """
    module = module_of(network.model)
    written = to_torch(module, from_torch(name, read_state_dict(path)))
    for entry, value in to_torch(module, network.variables).items():
        other = written[entry]
        if other.dtype != value.dtype or other.tobytes() != value.tobytes():
            raise DiskError(f"{path} does not give back '{entry}' as it was written")


def require_same_logits(
    path: Path, network: Network, images: np.ndarray, preprocessing: Preprocessing
) -> float:
    """Raises `DiskError` if a serialized function does not compute the network's logits.

    The file's name ends in `.jaxexport` or `.onnx`. The function is called with all the images in
    one batch, and with the first alone.

    Returns:
      The largest difference, as a share of the largest logit.
    """
    function = _READERS[path.suffix](path)
    with jax.default_device(jax.devices("cpu")[0]):  # where float32 is float32
        expected = np.asarray(jax.jit(_logits_of(network, preprocessing))(jnp.asarray(images)))
        batches = [function(part) for part in (images, images[:1])]
    difference = max(np.abs(logits - expected[: len(logits)]).max() for logits in batches)
    share = float(difference / np.abs(expected).max())
    if not share <= _TOLERANCE:
        raise DiskError(
            f"{path} gives other logits than the student: by {share:.1e} of the largest"
        )
    return share


def _read_jaxexport(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(exported.call(jnp.asarray(images)))


def _read_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    runtime = _import_onnx("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])


_READERS: Mapping[str, Callable[[Path], Callable[[np.ndarray], np.ndarray]]] = {
    ".jaxexport": _read_jaxexport,
    ".onnx": _read_onnx,
}


def _logits_of(network: Network, preprocessing: Preprocessing) -> Callable[[jax.Array], jax.Array]:
    model = configure_model(network.model, "float32", None)

    def logits(images: jax.Array) -> jax.Array:
        pixels = normalize(images, preprocessing)
        return run_model(model, network.variables, pixels, train=False).logits

    return logits
