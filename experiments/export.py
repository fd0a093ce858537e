r"""Export a run's student: its weights for PyTorch, and a function that runs anywhere.

WORKDIR/exports/RUN/ gets ARCHITECTURE.safetensors, the weights under their published PyTorch names;
ARCHITECTURE.jaxexport, a serialized function from images to logits for CPUs, NVIDIA GPUs and TPUs
and any batch size, with weights and normalization inside; and signature.json, which describes its
argument and result. Both are read back and compared with the student; signature.json is written
last.

The function takes images as the data set stores them. If the run's data set has no name, or cannot
be read here, describe its images by flags.

Examples:
  python -m experiments.export 3fa1b2c4d5e6
  python -m experiments.export 3fa1b2c4d5e6 --data-dir ~/tensorflow_datasets
  python -m experiments.export 3fa1b2c4d5e6 --image-size 224 \
      --mean 123.675,116.28,103.53 --std 58.395,57.12,57.375

and elsewhere, with nothing but JAX (and flatbuffers):
  function = jax.export.deserialize(pathlib.Path("wrn16-1.jaxexport").read_bytes())
  logits = function.call(images)   # uint8 [batch, height, width, channels]
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from abflax import Network, load
from abflax.data import DATASETS, Preprocessing
from abflax.errors import InputError, unknown
from abflax.export import require_same_logits, require_same_weights, serialize, signature_of
from abflax.models import MODELS
from abflax.storage.files import as_json, write_whole
from abflax.taps import module_of
from abflax.training.record import read_record, require_writable
from abflax.weights import load_network, save_state_dict
from experiments.common import cli


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      run: hash of a finished run (python -m experiments.run list).
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      image_size: height and width of an image, in pixels; left out: the data set's.
      mean: of the pixels of each channel, with --image-size.
      std: of the pixels of each channel, with --image-size.
      workdir: where the run is, and where the export goes.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    data_dir: str | None = None
    image_size: int | None = None
    mean: cli.Numbers | None = None
    std: cli.Numbers | None = None
    workdir: Path = cli.WORKDIR


def main(console: Console) -> None:
    """Writes both files and the signature."""
    arguments = cli.parse(Arguments, "experiments.export", __doc__)
    config, student = _finished(arguments.workdir, arguments.run)
    name, dataset = config["student"], config["dataset"]
    images, preprocessing = _images(arguments, dataset, student)
    directory = arguments.workdir / "exports" / arguments.run
    require_writable(directory)
    cli.cache_compilation(arguments.workdir)
    weights, function = (directory / f"{name}.{kind}" for kind in ("safetensors", "jaxexport"))
    save_state_dict(weights, module_of(student.model), student.variables)
    require_same_weights(weights, name, student)
    console.print(f"{weights}  read back: the same bits", soft_wrap=True)
    write_whole(function, serialize(student, images.shape[1:], images.dtype, preprocessing))
    difference = require_same_logits(function, student, images, preprocessing)
    console.print(
        f"{function}  read back: logits of {len(images)} images to {difference:.1e} of the largest",
        soft_wrap=True,
    )
    signature = {
        "run": arguments.run,
        "architecture": name,
        "dataset": dataset,
        "weights": weights.name,
        "function": function.name,
        **signature_of(function.read_bytes()),
        "normalised_inside": {"mean": preprocessing.mean, "std": preprocessing.std},
        "jax": jax.__version__,
        "largest_difference": difference,
    }
    path = directory / "signature.json"
    write_whole(path, as_json(signature).encode())
    console.print(f"{path}", soft_wrap=True)


def _finished(workdir: Path, run: str) -> tuple[dict[str, Any], Network]:
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
    return record["config"], load_network(name, workdir / "runs" / run / "student.safetensors")


def _images(
    arguments: Arguments, dataset: str, student: Network
) -> tuple[np.ndarray, Preprocessing]:
    """Four images to compare logits of, held-out ones where possible, and their preprocessing."""
    size, mean, std = arguments.image_size, arguments.mean, arguments.std
    if size is None and mean is None and std is None and dataset in DATASETS:
        test = load(dataset, "test", arguments.data_dir)
        return test.images[:4], test.preprocessing
    if size is None or mean is None or std is None:
        raise InputError(
            f"give --image-size, --mean and --std of the images of data set {dataset}, all three"
        )
    if size < 1:
        raise InputError(f"--image-size must be at least 1, not {size}")
    channels = np.shape(student.variables["params"]["stem"]["kernel"])[2]
    preprocessing = Preprocessing(mean, std)
    preprocessing.require_fits((size, size, channels))
    shape = (4, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), preprocessing


if __name__ == "__main__":
    cli.main(main)
