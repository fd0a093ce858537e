r"""Export a run's student: its weights for PyTorch, and a function that runs anywhere.

WORKDIR/exports/RUN/ gets
  ARCHITECTURE.safetensors  the weights under their published PyTorch names, or under those of the
                            Flax model where there are none
  ARCHITECTURE.jaxexport    a serialized function from images to logits for CPUs, NVIDIA GPUs and
                            TPUs and any batch size, with weights and normalization inside
  ARCHITECTURE.onnx         with --onnx: the same for the runtimes of ONNX
  signature.json            the labels, and what the functions take and return
All are read back and compared with the student; signature.json is written last.

The function takes images as the data set stores them. If the run's record does not describe them,
as those of older versions do not, do so by flags.

Examples:
  python -m experiments.export 3fa1b2c4d5e6
  python -m experiments.export 3fa1b2c4d5e6 --onnx
  python -m experiments.export workdir/runs/3fa1b2c4d5e6 --model my_package.models:make_student
  python -m experiments.export 3fa1b2c4d5e6 --image-size 224 \
      --mean 123.675,116.28,103.53 --std 58.395,57.12,57.375

and elsewhere, with nothing but JAX (and flatbuffers):
  function = jax.export.deserialize(pathlib.Path("wrn16-1.jaxexport").read_bytes())
  logits = function.call(images)   # uint8 [batch, height, width, channels]
"""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import linen as nn
from flax import nnx
from rich.console import Console

from abflax import Network, load
from abflax.data import CLASSES, DATASETS, Preprocessing
from abflax.errors import InputError, local_path, unknown
from abflax.export import (
    require_same_logits,
    require_same_weights,
    serialize,
    serialize_onnx,
    signature_of,
)
from abflax.models import MODELS
from abflax.models.checks import require_fits
from abflax.storage.files import as_json, write_whole
from abflax.taps import module_of, side_of
from abflax.training.record import read_record, require_writable
from abflax.weights import load_network, read_variables, save_state_dict, save_variables
from experiments.common import cli


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      run: hash of a finished run (python -m experiments.run list), or its folder.
      model: MODULE:FUNCTION that makes the run's student, a Linen or NNX module; left out: the
        architecture is one of abflax.models.MODELS.
      onnx: write ARCHITECTURE.onnx too, by the package jax2onnx.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      image_size: height and width of an image, in pixels; left out: the data set's.
      mean: of the pixels of each channel, with --image-size.
      std: of the pixels of each channel, with --image-size.
      workdir: where the run is, and where the export goes.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    model: str | None = None
    onnx: bool = False
    data_dir: str | None = None
    image_size: int | None = None
    mean: cli.Numbers | None = None
    std: cli.Numbers | None = None
    workdir: Path = cli.WORKDIR


def main(console: Console) -> None:
    """Writes both files and the signature."""
    arguments = cli.parse(Arguments, "experiments.export", __doc__)
    folder = _folder(arguments)
    record, student = _finished(folder, arguments.model)
    config = record["config"]
    dataset, published = config["dataset"], config["student"] in MODELS and arguments.model is None
    name = config["student"] if published else side_of(student.model).name
    images, preprocessing = _images(arguments, record, student)
    require_fits("the run's weights", student.model, student.variables, images.shape[1:])
    directory = arguments.workdir / "exports" / folder.name
    require_writable(directory)
    cli.cache_compilation(arguments.workdir)
    weights = directory / f"{name}.safetensors"
    if published:
        save_state_dict(weights, module_of(student.model), student.variables)
        require_same_weights(weights, name, student)
    else:
        save_variables(weights, student.variables)
    console.print(f"{weights}  read back: the same bits" if published else weights, soft_wrap=True)
    differences = {}
    writers = {"jaxexport": serialize} | ({"onnx": serialize_onnx} if arguments.onnx else {})
    for kind, write in writers.items():
        function = directory / f"{name}.{kind}"
        write_whole(function, write(student, images.shape[1:], images.dtype, preprocessing))
        differences[kind] = require_same_logits(function, student, images, preprocessing)
        console.print(
            f"{function}  read back: logits of {len(images)} images to {differences[kind]:.1e} of "
            "the largest",
            soft_wrap=True,
        )
    described = record.get("images", {})
    signature = {
        "run": folder.name,
        "architecture": name,
        "dataset": dataset,
        "weights": weights.name,
        "function": f"{name}.jaxexport",
        "onnx": f"{name}.onnx" if arguments.onnx else None,
        **signature_of((directory / f"{name}.jaxexport").read_bytes()),
        "labels": described.get("classes", CLASSES.get(dataset)),
        "shorter_side": described.get("shorter_side"),
        "normalised_inside": {"mean": preprocessing.mean, "std": preprocessing.std},
        "jax": jax.__version__,
        "largest_difference": max(differences.values()),
    }
    path = directory / "signature.json"
    write_whole(path, as_json(signature).encode())
    console.print(f"{path}", soft_wrap=True)


def _folder(arguments: Arguments) -> Path:
    """The folder of the run, which is given by its hash or by its path."""
    folder = local_path(arguments.run)
    return folder if len(folder.parts) > 1 else arguments.workdir / "runs" / arguments.run


def _finished(folder: Path, factory: str | None) -> tuple[dict[str, Any], Network]:
    record = read_record(folder / "record.json")
    if record is None:
        runs = [path.parent.name for path in folder.parent.glob("*/record.json")]
        if not runs:
            raise InputError(f"there is no finished run in {folder.parent.parent}")
        raise unknown("run", folder.name, runs)
    name, weights = record["config"]["student"], folder / "student.safetensors"
    if factory is not None:
        model = _made_by(factory)
        return record, Network(model, read_variables(weights))
    if name not in MODELS:
        raise InputError(
            f"run {folder.name} trained a {name.partition('(')[0]}, which abflax.models.MODELS "
            "does not name: say what makes it with --model MODULE:FUNCTION"
        )
    return record, load_network(name, weights)


def _made_by(factory: str) -> Any:
    """The module that MODULE:FUNCTION makes."""
    module, _, function = factory.partition(":")
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"--model {factory} makes no model: {error}") from error
    if not isinstance(model, nn.Module | nnx.Module):
        raise InputError(f"--model {factory} makes a {type(model).__name__}, no Flax module")
    return model


def _images(
    arguments: Arguments, record: dict[str, Any], student: Network
) -> tuple[np.ndarray, Preprocessing]:
    """Four images to compare logits of, held-out ones where possible, and their preprocessing."""
    size, mean, std = arguments.image_size, arguments.mean, arguments.std
    dataset, described = record["config"]["dataset"], record.get("images")
    if size is None and mean is None and std is None:
        if dataset in DATASETS:
            test = load(dataset, "test", arguments.data_dir)
            return test.images[:4], test.preprocessing
        if described is not None:
            preprocessing = Preprocessing(tuple(described["mean"]), tuple(described["std"]))
            return _drawn(described["shape"], described["dtype"]), preprocessing
    if size is None or mean is None or std is None:
        raise InputError(
            f"give --image-size, --mean and --std of the images of data set {dataset}, all three"
        )
    if size < 1:
        raise InputError(f"--image-size must be at least 1, not {size}")
    stem = student.variables["params"].get("stem")
    channels = len(mean) if stem is None else np.shape(stem["kernel"])[2]
    preprocessing = Preprocessing(mean, std)
    preprocessing.require_fits((size, size, channels))
    return _drawn((size, size, channels), "uint8"), preprocessing


def _drawn(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Four random images."""
    rng = np.random.default_rng(0)
    if dtype == "uint8":
        return rng.integers(0, 256, (4, *shape), dtype=np.uint8)
    return rng.standard_normal((4, *shape)).astype(dtype)


if __name__ == "__main__":
    cli.main(main)
