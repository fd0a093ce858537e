"""Measure by a linear probe what a teacher's features tell of classes that it was not trained on.

A logistic regression on the teacher's features, standardized, of a few training images a class. Its
regularization is chosen by cross-validation among them. It says what a data set's size and blur
leave of a teacher, before a student learns from it.

Examples:
  python -m experiments.probe --teacher efficientnet-lite0 --dataset cifar10-64
  python -m experiments.probe --teacher wrn16-2 --dataset cifar10 --per-class 20,500
"""

import dataclasses

import jax
import numpy as np
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from abflax import Dataset, InputError, Network
from abflax.data import few_shot_subset, load, normalize
from abflax.taps import run_model
from abflax.training.inputs import padded_batches
from abflax.training.record import write_record
from experiments.common import cli
from experiments.common.networks import find_teacher
from experiments.common.stats import percent

_BATCH = 100
_STRENGTHS = np.logspace(-4, 0, 5)


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      teacher: architecture of the teacher; its weights are those of a package, or shipped.
      teacher_weights: file or run with its weights.
      dataset: whose classes are told.
      per_class: training images of each class.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
    """

    teacher: str = "efficientnet-lite0"
    teacher_weights: str | None = None
    dataset: str = "cifar10-64"
    per_class: cli.Names = ("20", "50", "80", "500")
    data_dir: str | None = None


def main(console: Console) -> None:
    """Runs the command; writes WORKDIR/probe/TEACHER-DATASET.json."""
    arguments = cli.parse(Arguments, "experiments.probe", __doc__)
    if not all(count.isdigit() and int(count) > 1 for count in arguments.per_class):
        given = ",".join(arguments.per_class)
        raise InputError(f"'{given}' is no list of numbers of images, 2 or more each")
    name, dataset = arguments.teacher, arguments.dataset
    teacher = find_teacher(name, dataset, arguments.teacher_weights, arguments.workdir)
    train, test = (load(dataset, split, arguments.data_dir) for split in ("train", "test"))
    errors = probe(teacher, train, test, [int(count) for count in arguments.per_class])
    for count, error in errors.items():
        console.print(f"{count} images a class: {percent(1 - error)} % right")
    record = {"teacher": teacher.name, "dataset": dataset, "test_error": errors}
    path = arguments.workdir / "probe" / f"{name}-{dataset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, record)
    console.print(f"{path}", soft_wrap=True)


def probe(
    teacher: Network, train: Dataset, test: Dataset, per_class: list[int]
) -> dict[str, float]:
    """Fits a probe for each number of images of a class.

    Args:
      teacher: must have features.
      train: of which the images of a class are chosen, as tables with seed 0 do.
      test: on which the probes are measured.
      per_class: how many images of each class, for each probe.

    Returns:
      Number of images of a class -> the share of test examples that are told wrong.
    """
    chosen = {count: few_shot_subset(train, count, 0) for count in per_class}
    held_out, errors = _features(teacher, test), {}
    for count, data in chosen.items():
        fitted = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            {"logisticregression__C": _STRENGTHS},
            cv=min(5, count),
        ).fit(_features(teacher, data), data.labels)
        errors[str(count)] = 1 - float(fitted.score(held_out, test.labels))
    return errors


def _features(teacher: Network, data: Dataset) -> np.ndarray:
    """The features of all examples, `[examples, channels]`."""

    @jax.jit
    def forward(images: jax.Array) -> jax.Array | None:
        images = normalize(images, data.preprocessing)
        return run_model(teacher.model, teacher.variables, images, train=False).features

    parts = []
    for index, mask in zip(*padded_batches(len(data), _BATCH), strict=True):
        found = forward(data.images[index])
        if found is None:
            raise InputError(f"{teacher.name} has no features to probe")
        parts.append(np.asarray(found)[mask])
    return np.concatenate(parts)


if __name__ == "__main__":
    cli.main(main)
