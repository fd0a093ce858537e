"""Take a run's student out of the house: its weights for PyTorch, and a function for anywhere.

WORKDIR/exports/RUN/ gets ARCHITECTURE.safetensors, the weights under their published PyTorch names;
ARCHITECTURE.jaxexport, a serialised function from images to logits for CPUs, NVIDIA GPUs and TPUs
and any batch size, with weights and normalisation inside; and signature.json, what it takes and
gives. Both are read back and compared with the student; signature.json is written last.

The function takes images as the data set stores them. Where the run's data set has no name, or is
not at hand, say what its images are like.

examples:
  python -m experiments.export 3fa1b2c4d5e6
  python -m experiments.export 3fa1b2c4d5e6 --data-dir ~/tensorflow_datasets
  python -m experiments.export 3fa1b2c4d5e6 --image-size 224 \\
      --mean 123.675,116.28,103.53 --std 58.395,57.12,57.375

and elsewhere, with nothing but JAX (and flatbuffers):
  function = jax.export.deserialize(pathlib.Path("wrn16-1.jaxexport").read_bytes())
  logits = function.call(images)   # uint8 [batch, height, width, channels]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from abflax import Network, load
from abflax.data import DATASETS, Preprocessing, normalise
from abflax.errors import DiskError, InputError, unknown
from abflax.files import write_whole
from abflax.models import MODELS
from abflax.networks import prepared
from abflax.record import read_record, require_writable
from abflax.taps import module_of, run_model
from abflax.weights import from_torch, load_network, read_state_dict, save_state_dict, to_torch
from experiments import cli

PLATFORMS = ("cpu", "cuda", "tpu")
_TOLERANCE = 1e-5  # of the largest logit; the batch's size may change the order of sums


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser("experiments.export", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="hash of a finished run (python -m experiments.run list)")
    add("--data-dir", help="of TensorFlow Datasets; default: TFDS_DATA_DIR")
    add("--image-size", type=int, metavar="PIXELS",
        help="height and width of an image (default: the data set's)")  # fmt: skip
    add("--mean", type=_numbers, metavar="R,G,B", help="of a pixel, with --image-size")
    add("--std", type=_numbers, metavar="R,G,B", help="of a pixel, with --image-size")
    add("--workdir", type=Path, default=cli.WORKDIR, help="where all is (default ./workdir)")
    return parser.parse_args(arguments)


def main(console: Console) -> None:
    arguments = parse()
    record, student = _finished(arguments.workdir, arguments.run)
    name = record["config"]["student"]
    images, preprocessing = _images(arguments, record["config"]["dataset"], student)
    directory = arguments.workdir / "exports" / arguments.run
    require_writable(directory)
    cli.cache_compilation(arguments.workdir)
    weights, function = (directory / f"{name}.{kind}" for kind in ("safetensors", "jaxexport"))
    save_state_dict(weights, module_of(student.model), student.variables)
    _require_same_weights(weights, name, student)
    console.print(f"{weights}  read back: the same bits", soft_wrap=True)
    write_whole(function, serialise(student, images.shape[1:], images.dtype, preprocessing))
    difference = _require_same_logits(function, student, images, preprocessing)
    console.print(
        f"{function}  read back: logits of {len(images)} images to {difference:.1e} of the largest",
        soft_wrap=True,
    )
    signature = {
        "run": arguments.run,
        "architecture": name,
        "dataset": record["config"]["dataset"],
        "weights": weights.name,
        "function": function.name,
        **signature_of(function),
        "normalised_inside": {"mean": preprocessing.mean, "std": preprocessing.std},
        "jax": jax.__version__,
        "largest_difference": difference,
    }
    path = directory / "signature.json"
    write_whole(path, (json.dumps(signature, indent=1) + "\n").encode())
    console.print(f"{path}", soft_wrap=True)


def serialise(
    network: Network, image_shape: tuple[int, ...], dtype: Any, preprocessing: Preprocessing
) -> bytes:
    """A network in evaluation mode as a `jax.export` function of images that are not normalised.

    One argument, `[batch, *image_shape]` for any batch, to float32 logits `[batch, classes]`.
    """
    shape = jax.export.symbolic_shape("batch, " + ", ".join(map(str, image_shape)))
    exported = jax.export.export(jax.jit(_function(network, preprocessing)), platforms=PLATFORMS)
    return bytes(exported(jax.ShapeDtypeStruct(shape, dtype)).serialize())


def signature_of(path: Path) -> dict[str, Any]:
    """What a serialised function says that it takes, gives and runs on."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    (images,), (logits,) = exported.in_avals, exported.out_avals
    told = {
        name: {"shape": [each if isinstance(each, int) else str(each) for each in value.shape],
               "dtype": str(value.dtype)}
        for name, value in (("images", images), ("logits", logits))
    }  # fmt: skip
    version = exported.calling_convention_version
    return told | {"platforms": exported.platforms, "calling_convention_version": version}


def _function(network: Network, preprocessing: Preprocessing) -> Any:
    model = prepared(network.model, "float32", None)

    def logits(images: jax.Array) -> jax.Array:
        pixels = normalise(images, preprocessing)
        return run_model(model, network.variables, pixels, train=False).logits

    return logits


def _finished(workdir: Path, run: str) -> tuple[dict[str, Any], Network]:
    """The record of a finished run, and its student."""
    record = read_record(workdir / "runs" / run / "record.json")
    if record is None:
        runs = [path.parent.name for path in (workdir / "runs").glob("*/record.json")]
        if not runs:
            raise InputError(f"there is no finished run in {workdir}")
        raise unknown("run", run, runs)
    name = record["config"]["student"]
    if name not in MODELS:
        raise InputError(
            f"run {run} trained a {name}, which has no published names; only architectures that "
            f"abflax.models.MODELS names can be exported"
        )
    return record, load_network(name, workdir / "runs" / run / "student.safetensors")


def _images(
    arguments: argparse.Namespace, dataset: str, student: Network
) -> tuple[np.ndarray, Preprocessing]:
    """Images to compare with, held-out ones where the data set is read; what they go through."""
    given = (arguments.image_size, arguments.mean, arguments.std)
    if given == (None, None, None) and dataset in DATASETS:
        test = load(dataset, "test", arguments.data_dir)
        return test.images[:4], test.preprocessing
    if None in given:
        raise InputError(
            f"give --image-size, --mean and --std of the images of data set {dataset}, all three"
        )
    if arguments.image_size < 1:
        raise InputError(f"--image-size must be at least 1, not {arguments.image_size}")
    channels = np.shape(student.variables["params"]["stem"]["kernel"])[2]
    shape = (arguments.image_size, arguments.image_size, channels)
    preprocessing = Preprocessing(arguments.mean, arguments.std)
    preprocessing.require_fits(shape)
    drawn = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    return drawn, preprocessing


def _require_same_weights(path: Path, name: str, student: Network) -> None:
    """Raises `DiskError` where a file does not give the student's weights, bit for bit."""
    module = module_of(student.model)
    found = to_torch(module, from_torch(name, read_state_dict(path)))
    wanted = to_torch(module, student.variables)
    for entry, value in wanted.items():
        same = found[entry].dtype == value.dtype and found[entry].tobytes() == value.tobytes()
        if not same:
            raise DiskError(f"{path} does not give back '{entry}' as it was written")


def _require_same_logits(
    path: Path, student: Network, images: np.ndarray, preprocessing: Preprocessing
) -> float:
    """Raises `DiskError` where a function does not give the student's logits, in a batch or alone.

    Returns:
      The largest difference, as a share of the largest logit.
    """
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    with jax.default_device(jax.devices("cpu")[0]):  # where float32 is float32
        wanted = np.asarray(jax.jit(_function(student, preprocessing))(jnp.asarray(images)))
        found = [np.asarray(exported.call(jnp.asarray(part))) for part in (images, images[:1])]
    difference = max(np.abs(each - wanted[: len(each)]).max() for each in found)
    share = float(difference / np.abs(wanted).max())
    if not share <= _TOLERANCE:
        raise DiskError(
            f"{path} gives other logits than the student: by {share:.1e} of the largest"
        )
    return share


def _numbers(text: str) -> tuple[float, ...]:
    """ "1.5,2" -> (1.5, 2.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers") from None


if __name__ == "__main__":
    cli.main(main)
