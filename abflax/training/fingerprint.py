"""Digests of everything that a run computes with: a result is never another experiment's.

A run's name is the hash of its configuration, in which data, networks and code are only names. So
every run's folder holds the digests of what stands behind the names, `fingerprint.json`:

- `inputs`: contents of the data, weights, and what networks compute, and terms, their weights,
  views, optimizers, metrics and augmentations that were made outside abflax (their lowered
  programs);
- `surroundings`: JAX's flags that change numbers;
- `versions`: of the packages, and a digest of abflax's own source;
- `record`: of a finished run's `record.json`, which holds that of the weights;
- `digest`: of all the above.

They are compared before a finished result is returned and before a checkpoint is resumed. Lowered
programs and versions are compared only between equal versions: others lower to other texts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abflax.config import RunConfig
from abflax.data import Batches, Dataset, DataSets, TrainData
from abflax.errors import InputError
from abflax.methods import Phase, PhaseSchedule, bind
from abflax.methods.objective import Objective, make_targets
from abflax.methods.optimizer import OwnOptimizer
from abflax.methods.terms import Term
from abflax.methods.views import VIEWS
from abflax.methods.weights import Schedule
from abflax.metrics import Metric
from abflax.models.network import Network, configure_model, digest
from abflax.models.variables import abstract_variables, init_variables
from abflax.runtime.distributed import on_process_zero
from abflax.storage.files import as_json, read_json, write_whole
from abflax.taps import Model, run_model, side_of
from abflax.taps.linen import Linen
from abflax.training.inputs import EVALUATION_BATCH
from abflax.training.step import create_train_state

FILE = "fingerprint.json"

_PROGRAM = "computation"  # the last word of an input that is a lowered program
_FLAGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)

Fingerprint = dict[str, dict[str, str]]
"""Section -> name of a thing -> its digest; see above."""


def program_digests(
    members: Sequence[tuple[RunConfig, Model | Network]],
    teachers: Sequence[Network],
    data: TrainData,
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, dict[str, str]]:
    """Digests what networks, and code from outside abflax, compute now: hash -> name -> digest.

    Args:
      members: (configuration, student) of each run.
      teachers: the anchors in their order, and the teacher.
      data: the training data.
      metrics: the user's, by name.
    """
    precision, batch_size = members[0][0].precision, members[0][0].batch_size
    shape = data.image_shape
    shared: dict[str, str] = {}
    for name, teacher in zip(_teacher_names(teachers), teachers, strict=True):
        moved = any(
            phase.trains_teacher or phase.teacher_batch_statistics
            for config, _ in members
            for phase in config.phases
        )
        shared[f"{name} {_PROGRAM}"] = _program_digest(
            teacher.model, precision, shape, batch_size, moved
        )
    models = [each.model for each in teachers]
    shared |= _function_digests(members[0][0], metrics or {}, shape, data.num_classes)
    of_students: dict[int, str] = {}  # by identity, since some modules cannot be hashed
    found = {}
    for config, student in members:
        model = student.model if isinstance(student, Network) else student
        if id(model) not in of_students:
            of_students[id(model)] = _program_digest(model, precision, shape, batch_size, True)
        own = {f"student's {_PROGRAM}": of_students[id(model)]}
        own |= _phase_digests(config, model, models, len(data), shape)
        found[config.hash] = shared | own
    return found


def _teacher_names(teachers: Sequence[Network]) -> list[str]:
    """What the teachers are called in fingerprints."""
    return [*(f"anchor {index}'s" for index in range(1, len(teachers))), "teacher's"][
        : len(teachers)
    ]


def fingerprints(
    members: Sequence[tuple[RunConfig, Model | Network]],
    teachers: Sequence[Network],
    data_sets: DataSets,
    programs: Mapping[str, Mapping[str, str]],
) -> dict[str, Fingerprint]:
    """Computes the fingerprints of the runs of a group, by their hashes.

    Args:
      members: (configuration, student) of each run.
      teachers: the anchors in their order, and the teacher.
      data_sets: the training data, of which the runs may use a share; and others.
      programs: what `program_digests` gives.
    """
    data = data_sets.train
    shared: dict[str, str] = {}
    for what, given in (("training", data), ("test", data_sets.test), ("target", data_sets.target)):
        if given is not None:
            shared |= {f"{what} {name}": value for name, value in _data_digests(given).items()}
    for name, teacher in zip(_teacher_names(teachers), teachers, strict=True):
        shared[f"{name} weights"] = digest(teacher.variables)
    flags = {name: str(getattr(jax.config, name, None)) for name in _FLAGS}
    found = {}
    for config, student in members:
        inputs = shared | dict(programs[config.hash])
        if isinstance(student, Network):
            inputs["student's first weights"] = digest(student.variables)
        found[config.hash] = {"inputs": inputs, "surroundings": flags, "versions": _versions()}
    return found


@on_process_zero
def require_same_run(directory: Path, own: Fingerprint) -> str:
    """Compares the fingerprint in a run's folder with that of the run that is asked for.

    Args:
      directory: the run's folder.
      own: the fingerprint of what is asked for.

    Returns:
      One sentence if the two cannot be compared wholly (other versions, or none was written); ""
      otherwise.

    Raises:
      ValueError: naming what differs, or if a finished run's record is not what was written.
    """
    try:
        theirs = read_json(directory / FILE)
        if theirs.pop("digest") != _digest(theirs):
            raise ValueError
        sections, record = {name: dict(theirs[name]) for name in own}, theirs["record"]
    except FileNotFoundError:
        return "it has no fingerprint, so it was found by its name alone"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory / FILE} is damaged, {_force_hint('so whose run this is cannot be known')}"
        ) from error
    same_versions = sections["versions"] == own["versions"]
    for section in ("inputs", "surroundings"):
        for name in {**own[section], **sections[section]}:
            if name.endswith(_PROGRAM) and not same_versions:
                continue
            ours, made = own[section].get(name), sections[section].get(name)
            if ours != made:
                how = "without a" if made is None else "with a" if ours is None else "with another"
                raise InputError(
                    f"the run in {directory} was made {how} {name}, "
                    f"{_force_hint('though its configuration has the same names')}"
                )
    if record not in (None, _record_digest(directory)):
        raise InputError(
            f"{directory / 'record.json'} is damaged: it is not what was written; "
            "--force (force=True) trains it anew"
        )
    return "" if same_versions else f"it was made by other versions: {_changed(own, sections)}"


def is_same_run(directory: Path, own: Fingerprint) -> bool:
    """Whether `require_same_run` would raise nothing."""
    try:
        require_same_run(directory, own)
    except InputError:
        return False
    return True


@on_process_zero
def write_fingerprint(directory: Path, own: Fingerprint) -> None:
    """Writes the fingerprint into a run's folder, with the digest of its record if it has one."""
    content: dict[str, Any] = own | {"record": _record_digest(directory)}
    content["digest"] = _digest(content)
    write_whole(directory / FILE, as_json(content).encode())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _force_hint(reason: str) -> str:
    return f"{reason}; --force (force=True) trains it anew"


def _changed(own: Fingerprint, theirs: Fingerprint) -> str:
    versions, before = own["versions"], theirs["versions"]
    names = [name for name in {**versions, **before} if versions.get(name) != before.get(name)]
    return ", ".join(f"{name} {before.get(name)}, not {versions.get(name)}" for name in names)


def _data_digests(data: TrainData) -> dict[str, str]:
    """The digests of a data set; image files are named by their contents already.

    A loader is named by its first batch where it is checkpointed, else nothing is known of it.
    """
    images = _array_digest(data.images) if isinstance(data, Dataset) else data.name
    preprocessing = dataclasses.replace(data.preprocessing, views=None)
    return {
        "images": images,
        "labels": data.name if isinstance(data, Batches) else _array_digest(data.labels),
        "classes": str(data.num_classes),
        "preprocessing": repr(preprocessing),
    }


def _array_digest(array: np.ndarray) -> str:
    sha = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    sha.update(np.ascontiguousarray(array).view(np.uint8).data)  # bfloat16 has none
    return sha.hexdigest()[:16]


def _record_digest(directory: Path) -> str | None:
    try:
        return hashlib.sha256((directory / "record.json").read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def code_digest(model: Model, image_shape: tuple[int, ...]) -> str:
    """Digests what a network computes now of an evaluation's batch."""
    return _program_digest(model, "float32", image_shape, EVALUATION_BATCH, trains=False)


def _program_digest(
    model: Model, precision: str, shape: tuple[int, ...], batch_size: int, trains: bool
) -> str:
    """Digests what a network computes, lowered for CPUs whatever runs it.

    These are its passes forward and backward, in evaluation mode, and where it `trains` in training
    mode and its initialization. What abflax's own networks compute follows from their fields and
    abflax's source.
    """
    model = configure_model(model, precision, None)
    side = side_of(model)
    if isinstance(side, Linen) and type(side.module).__module__.startswith("abflax."):
        return hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.result_type(float))
    modes = (False, True) if trains else (False,)

    def compute(variables: Any, images: jax.Array, key: jax.Array) -> Any:
        passes = []
        for train in modes:
            forward = functools.partial(_forward, model, key, train)
            passes += [forward(variables, images), _gradients(forward, variables, images)]
        return passes, init_variables(model, key, shape) if trains else None

    return _digest_of(compute, abstract_variables(model, shape), images, jax.random.key(0))


def _forward(model: Model, key: jax.Array, train: bool, variables: Any, images: jax.Array) -> Any:
    run = run_model(model, variables, images, train=train, dropout_key=key)
    return run.logits, run.taps, run.features, run.losses, run.state


def _gradients(forward: Callable[..., Any], variables: Any, images: jax.Array) -> Any:
    """What a forward pass does not tell: `stop_gradient`, a custom backward rule."""

    def total(params: Any, images: jax.Array) -> jax.Array:
        *outputs, _ = forward({**variables, "params": params}, images)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, outputs))

    return jax.grad(total, argnums=(0, 1), allow_int=True)(variables["params"], images)


def _is_own(given: Any) -> bool:
    """Whether a term or its weight is of a class that was made outside abflax."""
    return isinstance(given, Term | Schedule) and not type(given).__module__.startswith("abflax.")


def _is_own_view(name: str) -> bool:
    return name in VIEWS and not VIEWS[name].__module__.startswith("abflax.")


def _phase_digests(
    config: RunConfig,
    student: Model,
    teachers: Sequence[Model],
    examples: int,
    shape: tuple[int, ...],
) -> dict[str, str]:
    """Digests what the user's optimizers, terms and weights compute, phase by phase."""
    student, *models = (configure_model(each, config.precision, None)
                        for each in (student, *teachers))  # fmt: skip
    per_epoch = Fraction(examples, config.batch_size)

    def bound(phase: Phase) -> Objective:
        teacher, epochs = models[phase.teacher] if models else None, config.phase_epochs[phase.name]
        return bind(student, teacher, phase, shape, steps_per_epoch=per_epoch, epochs=epochs)

    found: dict[str, str] = {}
    before = None
    for phase in config.phases:
        if isinstance(phase.optimizer, OwnOptimizer):
            found[f"{phase.name} optimizer's {_PROGRAM}"] = _optimizer_digest(
                phase.optimizer, bound(phase)
            )
        if any(map(_is_own, itertools.chain(*phase.terms))) or any(map(_is_own_view, phase.views)):
            earlier = None if before is None else bound(before)
            found[f"phase {phase.name}'s {_PROGRAM}"] = _objective_digest(
                bound(phase), earlier, config.batch_size
            )
        before = phase
    return found


def _optimizer_digest(optimizer: OwnOptimizer, objective: Objective) -> str:
    """Digests what a transformation does to the parameters of a phase."""
    made = optimizer.transformation(PhaseSchedule.single_step())
    params, _ = objective.abstract_start()
    try:
        state = jax.eval_shape(made.init, params)
        texts = _lowered(made.init, params), _lowered(made.update, params, state, params)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            "the optimizer that was given does not fit the parameters {'student': …, "
            f"'connectors': …}}: {str(error).splitlines()[0][:200]}"
        ) from error
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def _objective_digest(objective: Objective, before: Objective | None, batch_size: int) -> str:
    """Digests what a phase computes: its modules' first weights, targets, loss and gradients.

    The first weights may be taken from the modules of the phase before.
    """
    student, teacher, shape = objective.student, objective.teacher, objective.image_shape
    images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.result_type(float))
    labels, key = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.random.key(0)
    theirs = {} if teacher is None else dict(abstract_variables(teacher, shape))
    params = theirs.pop("params", {})

    def begin(student: Any, stats: Any, key: jax.Array, teacher: Any, modules: Any) -> Any:
        return create_train_state(
            objective, optax.identity(), student, stats, key, teacher, modules
        )

    def compute(state: Any, teacher_params: Any, images: Any, labels: Any, key: Any) -> Any:
        stats = state.batch_stats
        keys = jax.random.split(key, len(images))
        targets, _ = make_targets(
            objective, teacher_params, stats["teacher"], images, labels, keys, images
        )

        def loss(params: Any) -> Any:
            return objective.loss(params, stats, targets, images, labels, key=key, step=state.step)

        return jax.value_and_grad(loss, has_aux=True)(state.params), targets

    modules = {} if before is None else before.abstract_start()[0]["connectors"]
    first = (abstract_variables(student, shape), theirs, key, params, modules)
    state = jax.eval_shape(begin, *first)
    texts = _lowered(begin, *first), _lowered(compute, state, params, images, labels, key)
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def as_it_is_now(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns a new object for the function whenever what it computes has changed.

    Compiled programs are kept by the functions in them, and a function may read a global.
    """
    return _as_computed(function, _digest_of(function, *arguments))


@functools.lru_cache(maxsize=64)
def _as_computed(function: Callable[..., Any], computed: str) -> Callable[..., Any]:
    del computed
    return functools.partial(function)


def _digest_of(function: Callable[..., Any], *arguments: Any) -> str:
    return hashlib.sha256(_lowered(function, *arguments).encode()).hexdigest()[:16]


def _function_digests(
    config: RunConfig, metrics: Mapping[str, Metric], shape: tuple[int, ...], classes: int
) -> dict[str, str]:
    """Digests what the user's augmentation and metrics compute."""
    dtype, found = jnp.result_type(float), {}
    if config.augment is not None and config.augment.made is not None:
        images = jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
        key = jax.random.key(0)
        found[f"augmentation's {_PROGRAM}"] = _digest_of(config.augment.made, key, images)
    logits, labels = (
        jax.ShapeDtypeStruct((2, classes), dtype), jax.ShapeDtypeStruct((2,), jnp.int32)
    )  # fmt: skip
    for name, metric in metrics.items():
        found[f"metric {name}'s {_PROGRAM}"] = _digest_of(metric, logits, labels)
    return found


def _lowered(function: Callable[..., Any], *arguments: Any) -> str:
    function = functools.partial(function)  # JAX remembers what it has traced
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("abflax", "jax", "jaxlib", "flax", "optax")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    sha, root = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        sha.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return versions | {"abflax's source": sha.hexdigest()[:16]}
