"""Where networks' weights come from: a file, a run, or what the repository ships. Their data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from abflax.data import DATASETS, PHOTOGRAPHS, Dataset, Photographs, load, load_photographs
from abflax.errors import InputError, unknown
from abflax.models import MODELS
from abflax.networks import Network
from abflax.record import read_record
from abflax.weights import load_network

SHIPPED = Path(__file__).parent / "teachers"


def is_shipped(name: str, dataset: str) -> bool:
    """Whether the repository has a teacher of that architecture, trained on that data."""
    return _shipped(name, dataset).is_file()


def _shipped(name: str, dataset: str) -> Path:
    return SHIPPED / f"{name}-{dataset}.npz"


def find_teacher(name: str, dataset: str, weights: str | None, workdir: Path) -> Network:
    """The teacher of that architecture, with its weights.

    Args:
      name: of the architecture, in `MODELS`.
      dataset: what it was trained on.
      weights: a file, or the hash of a finished run; None: what the repository ships for the
        pair of name and dataset.
      workdir: where runs are looked for.

    Raises:
      ValueError: if there are no such weights, or they do not fit.
    """
    MODELS[name]  # an unknown name is what should be complained of first
    if dataset not in DATASETS and dataset not in PHOTOGRAPHS:
        raise unknown("dataset", dataset, DATASETS)
    if weights is None:
        if dataset in PHOTOGRAPHS:
            raise InputError(f"give the published weights of {name} with --teacher-weights FILE")
        if not is_shipped(name, dataset):
            raise InputError(
                f"no {name} trained on {dataset} is shipped; give its weights with "
                f"--teacher-weights FILE or RUN, or train one: python -m experiments.run "
                f"--dataset {dataset} --student {name} --method cross-entropy --epochs 0+200"
            )
        return load_network(name, _shipped(name, dataset))
    run = workdir / "runs" / weights
    if record := read_record(run / "record.json"):
        if record["config"]["student"] != name:
            raise InputError(f"run {weights} trained a {record['config']['student']}, not a {name}")
        return load_network(name, run / "student.safetensors")
    return load_network(name, weights)


def begun(name: str, path: str | Path) -> Network:
    """A student's published weights but its classifier's, whose classes are others."""
    network = load_network(name, path)
    params = dict(network.variables["params"])
    params.pop("classifier")
    return dataclasses.replace(network, variables={**network.variables, "params": params})


def read(dataset: str, split: str, data_dir: str | None) -> Dataset | Photographs:
    """The data set of that name, in memory or photographs."""
    if dataset in PHOTOGRAPHS:
        return load_photographs(dataset, split, data_dir)
    return load(dataset, split, data_dir)


def setting_of(protocol: str, student: str) -> str:
    """Of transfer learning; the published code has a learning rate of its own for MobileNet V2."""
    own = protocol == "official" and student.startswith("mobilenet-v2")
    return "transfer-v2" if own else "transfer"
