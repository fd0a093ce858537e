"""Records: one JSON file a run.

Schema 1. A record is an object with

- `schema`: 1; `hash`: the run's name; `config`: every field of `abflax.config.RunConfig`;
- `state`: "finished"; a record is written once, when its run is;
- `phases`: a list of {`name`, `steps`, `epochs`, `seconds`, `objective`: its terms with their
  weights and its optimizer, fields at their defaults left out};
- `history`: one entry an evaluation: {`epoch` and `step` (of the run), `phase`,
  `epoch_of_phase`, `learning_rate` (not known of an optimizer that was given), `loss`,
  `gradient_norm` (means since the entry before),
  `training` (what the terms measure, e.g. `agreement` of each layer as training saw it; means),
  and where there is held-out data `test_error` (a share), `test_cross_entropy` (nats),
  `agreement` (layer -> share of held-out neurons on whose indicator student and teacher agree;
  only where both have the same neurons), `silent` (layer -> share of the student's neurons, each
  a channel at a position and before any connector, that fire on no held-out image; not in
  records made before it was measured), `metrics` (name -> mean of a metric of the user's, where
  there are some); `teacher_test_error`, where the teacher is trained along; `ema`: the same of
  averaged weights, where there are some};
- `result`: `test_error`, `agreement` and, if there is one, `teacher_test_error` of the last entry,
  `best_test_error`, `best_epoch`, and `initialise_agreement`: agreement at the end of the
  initialise phase, if there was one; `metrics` of the last entry, where there are some;
  `ema_test_error` of the last entry, where there are averaged weights;
- `images`: what the student takes: `shape` (height, width, channels), `dtype`, and the `mean` and
  `std` that pixels are normalized with; of image files also `classes`, their names in the order of
  the logits, and `shorter_side`, what an image is resized to before its central crop (not in
  records made before it was written);
- `weights`: the digest of the student's weights, as `abflax.Network` has it in its name (not in
  records made before it was written);
- `ema_weights`: likewise of the averaged weights, where there are some;
- `connectors`: likewise of the connectors of the last phase that trained some;
- `anchors`: only where some are kept: epoch -> the digest of the student after it;
- `loader`: only where a loader of the user's gave the batches: `resumes_exactly`, whether its
  position is in checkpoints, and `restarted_at`, the steps at which another pass over the data
  began because it is not;
- `grown_from`: only where the run began with the end of a shorter one: its hash;
- `warning`: only where the loss of a phase has grown a thousandfold: one sentence;
- `seconds`: training and evaluation, compilation included, over all sittings;
- `environment`: `abflax`, `python`, `jax`, `jaxlib`, `flax`, `optax`, `device`, `devices` (of all
  `processes`; that count is not in records made before there could be several), `commit` (with "+"
  where the code was changed, null outside a repository): of the sitting that finished the run, read
  when it began; and `abreast`, where several runs were trained in one program: how many at most;
- `finished`: UTC, ISO 8601.

A run whose numbers went wrong has another file, of `schema`, `hash`, `config`, `environment`,
`finished`, `state`: "diverged", and `error`: where, and what is known of why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax
import pydantic

from abflax.config import RunConfig
from abflax.data import Batches, Dataset, ImageFiles
from abflax.data.decoding import resized_side
from abflax.errors import InputError, path_error
from abflax.storage.files import as_json, read_json, write_whole

SCHEMA = 1
"""The schema that records are written in, and the only one that is read."""


def environment(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Versions, commit and device, as records hold them."""
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "abflax": _version("abflax"),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": device_name(devices[0]),
        "devices": len(devices),
        "processes": len({device.process_index for device in devices}),
        "commit": _commit(),
    }


def device_name(device: jax.Device) -> str:
    """What a reader would call the device; a CPU says how many cores the process may use."""
    if device.platform != "cpu":
        return device.device_kind
    model = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or model
    if hasattr(os, "sched_getaffinity"):
        return f"{model}, {len(os.sched_getaffinity(0))} cores"
    return f"{model}, {os.cpu_count()} cores"


def describe_images(data: Dataset | ImageFiles | Batches) -> dict[str, Any]:
    """What a student of that data takes, as records hold it."""
    images: dict[str, Any] = {
        "shape": list(data.image_shape),
        "dtype": str(data.dtype),
        "mean": list(data.preprocessing.mean),
        "std": list(data.preprocessing.std),
    }
    if isinstance(data, ImageFiles):
        images |= {"classes": list(data.classes), "shorter_side": resized_side(data.side)}
    return images


def make_record(
    config: RunConfig,
    phases: list[dict[str, Any]],
    history: list[dict[str, Any]],
    images: dict[str, Any],
    weights: str,
    seconds: float,
    made_by: dict[str, Any],
) -> dict[str, Any]:
    """The record of a finished run; see the schema above.

    `images` is from `describe_images`, `made_by` from `environment`.
    """
    last = history[-1]
    result: dict[str, Any] = {}
    if "test_error" in last:
        best = min(history, key=lambda entry: entry["test_error"])
        result = {
            "test_error": last["test_error"],
            "best_test_error": best["test_error"],
            "best_epoch": best["epoch"],
            "agreement": last["agreement"],
        }
        if "metrics" in last:
            result["metrics"] = last["metrics"]
        if "teacher_test_error" in last:
            result["teacher_test_error"] = last["teacher_test_error"]
        if "test_error" in last.get("ema", {}):
            result["ema_test_error"] = last["ema"]["test_error"]
        initialised = [entry for entry in history if entry["phase"] == "initialise"]
        if initialised:
            result["initialise_agreement"] = initialised[-1]["agreement"]
    return {
        "schema": SCHEMA,
        "hash": config.hash,
        "config": config.as_json(),
        "state": "finished",
        "phases": phases,
        "history": history,
        "result": result,
        "images": images,
        "weights": weights,
        "seconds": round(seconds, 3),
        "environment": made_by,
        "finished": _now(),
    }


def make_diverged(config: RunConfig, error: str, made_by: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of a run whose numbers went wrong; see the schema above."""
    return {
        "schema": SCHEMA,
        "hash": config.hash,
        "config": config.as_json(),
        "state": "diverged",
        "error": error,
        "environment": made_by,
        "finished": _now(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_record(path: Path, record: Any) -> None:
    """Writes a record whole or not at all. Raises `DiskError` where it cannot be written."""
    write_whole(path, as_json(record).encode())


def require_writable(directory: Path) -> None:
    """Makes a directory, and raises `InputError` where nothing can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise path_error(f"cannot write to {directory}", error) from error


def read_record(path: Path, name: str | None = None) -> dict[str, Any] | None:
    """Reads the record at a path; None: there is none.

    Args:
      path: of the file.
      name: the hash that a finished run's record must have, which is that of its configuration.

    Raises:
      ValueError: if there is one, but it is damaged, of another schema or of another run.
    """
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"{path} is no record of schema {SCHEMA}")
    try:
        _Record.model_validate(record)
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{path} is damaged: {where}: {error.errors()[0]['msg']}") from None
    names = (record["hash"], read_config(path, record["config"]).hash)
    if name is not None and (*names, record["state"]) != (name, name, "finished"):
        raise InputError(f"{path} is not the record of the finished run {name}")
    return record


def finished_records(workdir: Path, name: str = "record.json") -> dict[str, dict[str, Any]]:
    """Reads the records of a workdir's runs: hash -> record. A warning names what is none."""
    records = {}
    for path in sorted((workdir / "runs").glob(f"*/{name}")):
        with skip_damaged():
            if record := read_record(path):
                if record["hash"] != path.parent.name:
                    raise InputError(f"{path} is the record of another run, {record['hash']}")
                records[record["hash"]] = record
    return records


@contextlib.contextmanager
def skip_damaged() -> Iterator[None]:
    """Makes a warning of an `InputError` in a `with` block that reads one of many files."""
    try:
        yield
    except InputError as error:
        warnings.warn(f"{error}; it is skipped", stacklevel=3)


def read_config(path: Path, config: Any) -> RunConfig:
    """The configuration in a file's JSON. Raises `InputError` where it is none."""
    try:
        return RunConfig.from_json(config)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged: it holds no configuration of a run") from None


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Phase(_Part):
    name: str
    steps: int
    epochs: int
    seconds: float


class _Entry(_Part):
    epoch: float
    step: int
    phase: str
    loss: float
    test_error: float = 0.0
    agreement: dict[str, float] = {}


class _Measured(_Part):
    test_error: float = 0.0
    best_test_error: float = 0.0
    agreement: dict[str, float] = {}


class _Environment(_Part):
    device: str


class _Record(_Part):
    """The schema, as far as it is checked; see the page of this module."""

    hash: str = pydantic.Field(pattern=r"^[0-9a-f]{12}$")
    config: dict[str, Any]
    state: Literal["finished", "diverged"]
    environment: _Environment
    finished: str
    error: str | None = None
    phases: list[_Phase] = []
    history: list[_Entry] = []
    result: _Measured = _Measured()
    weights: str | None = None
    seconds: float = 0.0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the repository that holds this file, and a "+" if its code was changed."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some other repository's
        changed = git("status", "--porcelain", "--", "..", "../../experiments/*.py")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
