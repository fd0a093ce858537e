"""Dreams: labelled images that a network's own gradients make (DeepInversion, Yin et al. 2020)."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abflax.config import Resources
from abflax.data import Dataset
from abflax.data.augmentation import Preprocessing
from abflax.data.dreamed import IMAGES, STORY, load_dreamed
from abflax.errors import InputError, NonFiniteError, local_path, require_field_types
from abflax.losses import (
    agreement_of_logits,
    batch_norm_statistics_loss,
    cross_entropy,
    total_variation,
)
from abflax.models.checks import require_usable
from abflax.models.network import Network, configure_model, digest, require_network
from abflax.models.variables import floats_in
from abflax.runtime.jax_checks import jax_defaults, require_devices
from abflax.runtime.preemption import Interrupted, Preemption
from abflax.runtime.reporter import NullReporter, Reporter
from abflax.storage.checkpoint import Checkpoints
from abflax.storage.files import as_json, read_json, write_whole
from abflax.storage.lock import Lock
from abflax.taps import Model, run_with_norms
from abflax.training.devices import AXIS, default_steps_per_dispatch, usable_devices
from abflax.training.record import require_writable


@dataclasses.dataclass(frozen=True)
class Dreaming:
    """How images are made: the weights of the objective, and the optimizer (Adam, β 0.9 and 0.999).

    The defaults are the published ones for CIFAR-10, but for the learning rate's cosine, which is
    that for ImageNet.

    Attributes:
      steps: optimization steps for each batch.
      batch_size: images that are optimized together; the statistics are of a batch.
      learning_rate: its maximum; it falls to 0 along a cosine.
      warmup: steps in which it rises to that.
      statistics: the weight of `batch_norm_statistics_loss`, summed over the batch norms.
      first_statistics: a factor on that of the first batch norm (10 in later published code).
      tv_l1: the weight of `total_variation` of order 1.
      tv_l2: the weight of `total_variation` of order 2.
      l2: the weight of the images' mean norm.
      competition: the weight of `agreement_of_logits` with a student, at τ = 3.
      jitter: images are rolled by up to that many pixels at each step, along both sides.
      flip: whether they are mirrored half of the time.
      each: whether each image is rolled and mirrored on its own, so that the batch has the
        statistics of augmented data; else the whole batch alike, as published.

    Raises:
      ValueError: for a value that cannot be right.
    """

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 0.05
    warmup: int = 0
    statistics: float = 10.0
    first_statistics: float = 1.0
    tv_l1: float = 0.0
    tv_l2: float = 2.5e-5
    l2: float = 1e-5
    competition: float = 0.0
    jitter: int = 2
    flip: bool = True
    each: bool = False

    def __post_init__(self) -> None:
        require_field_types(self)
        if min(self.steps, self.batch_size) < 1:
            raise InputError(f"steps and batch_size must be at least 1: {self}")
        if min(dataclasses.astuple(self)) < 0 or not self.learning_rate > 0:
            raise InputError(f"weights cannot be below 0, nor a learning rate 0: {self}")

    def rate(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Computes the learning rate of a step, from 0."""
        now = jnp.asarray(step, jnp.result_type(float))
        rise = (now + 1) / max(self.warmup, 1)
        part = (now - self.warmup) / max(self.steps - self.warmup, 1)
        fall = (1 + jnp.cos(jnp.pi * jnp.clip(part, 0, 1))) / 2
        return self.learning_rate * jnp.where(now < self.warmup, rise, fall)


@struct.dataclass
class _State:
    """A batch of images in the making, and those that are finished."""

    images: Any
    opt_state: Any


def dream_loss(
    how: Dreaming,
    teacher: tuple[Model, Any],
    student: tuple[Model, Any] | None,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the objective of images: cross-entropy, and the weighted sum that `Dreaming` says.

    Args:
      how: the weights.
      teacher: the model and its variables.
      student: likewise; None: nobody competes.
      images: normalized, `[batch, height, width, channels]`.
      labels: integers `[batch]`.

    Returns:
      The loss, and its parts by the names of the weights, and "cross_entropy" and "right", the
      share of the images whose label is the teacher's answer.
    """
    logits, norms = run_with_norms(*teacher, images)
    statistics = jnp.zeros((), images.dtype)
    for index, (inputs, mean, variance) in enumerate(norms.values()):
        loss: Callable[..., jax.Array] = batch_norm_statistics_loss
        for _ in range(mean.ndim - 1):  # norms that `nn.scan` stacks
            loss = jax.vmap(loss)
        factor = how.first_statistics if index == 0 else 1.0
        statistics += factor * loss(inputs, mean, variance).sum()
    squares = jnp.sum(jnp.square(images), axis=(1, 2, 3))
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    parts = {
        "cross_entropy": cross_entropy(logits, labels).mean(),
        "statistics": statistics,
        "tv_l1": total_variation(images, 1),
        "tv_l2": total_variation(images, 2),
        "l2": norm.mean(),
    }
    if student is not None:
        ours, _ = run_with_norms(*student, images)
        parts["competition"] = jnp.clip(agreement_of_logits(ours, logits).mean(), 0, 1)
    total = parts["cross_entropy"] + sum(
        getattr(how, name) * value for name, value in parts.items() if name != "cross_entropy"
    )
    return total, parts | {"right": (jnp.argmax(logits, axis=-1) == labels).mean()}


@jax_defaults()
def dream(  # noqa: PLR0913 - a front door
    teacher: Network | Model,
    count: int,
    *,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    preprocessing: Preprocessing | None = None,
    pixels: tuple[float, float] = (0.0, 255.0),
    student: Network | Model | None = None,
    stands_for: str | None = None,
    workdir: str | Path | None = None,
    resources: Resources | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Dataset:
    """Makes labelled images from a trained network alone, no data needed.

    They begin as normal noise, and are optimized in batches by Adam, with respect to the loss
    `dream_loss`. The networks are in evaluation mode. Labels are balanced: 0, 1, …, 0, 1, ….
    Several devices share each batch, with the numbers of one device to rounding.

    Args:
      teacher: a `Network` or an NNX module, with batch norms for anything to be recognized.
      count: images to make.
      key: of the noise, jitter and flips.
      image_shape: (height, width, channels), as the teacher was trained on.
      preprocessing: its normalization is undone in the result, which has it as its own; None: there
        is none.
      pixels: the smallest and the largest value of a stored pixel; images are clipped to them at
        each step.
      student: what competes with the teacher, where `competition` is above 0: images on which the
        two agree are avoided. Dream, train, and dream on with the student for adaptive images.
      stands_for: the data set whose test split goes with the images, for `dreamed:DIR`.
      workdir: the folder for checkpoints and the result; None: nothing is written. The same call
        again resumes with the same bits, or returns the finished images.
      resources: its `devices`, `steps_per_dispatch` and `checkpoint_seconds` are used.
      reporter: shows progress; None: none is shown.
      **settings: fields of `Dreaming`.

    Returns:
      A data set of `count` images, floating, in the units of the teacher's stored pixels.

    Raises:
      ValueError: if something that was given cannot be right.
      NonFiniteError: if the loss is NaN or infinite.
      Interrupted: after SIGINT, SIGTERM or SIGALRM, when the checkpoint is written.

    References:
      Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020.
    """
    known = {field.name for field in dataclasses.fields(Dreaming)}
    if unmet := sorted(set(settings) - known):
        raise InputError(f"dreams have no setting {unmet[0]}; known: {', '.join(sorted(known))}")
    how = Dreaming(**settings)
    preprocessing = preprocessing or Preprocessing()
    networks = [require_network("the teacher", teacher)]
    if student is not None:
        networks.append(require_network("the student", student))
    if (how.competition > 0) != (student is not None):
        raise InputError("a competition needs both, a student and its weight (competition=0.2)")
    if count < 1 or jax.process_count() > 1:
        raise InputError(f"one process makes one image at least, not {count}")
    require_devices()
    for what, network in zip(("the teacher", "the student"), networks, strict=False):
        require_usable(what, network, image_shape)
    story = {
        "networks": [f"{each.name} {digest(each.variables)}" for each in networks],
        "count": count,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "image_shape": list(image_shape),
        "preprocessing": dataclasses.asdict(preprocessing),
        "pixels": list(pixels),
        "stands_for": stands_for,
        "how": dataclasses.asdict(how),
    }
    story = json.loads(json.dumps(story))
    maker = _Maker(how, networks, count, key, preprocessing, pixels, image_shape, resources)
    if workdir is None:
        return _dataset(*maker.make(None, story, reporter or NullReporter()), maker)
    folder = local_path(workdir)
    require_writable(folder)
    with Lock(folder / "lock", f"dreaming in {folder}"):
        if (folder / STORY).exists():
            finished = read_json(folder / STORY)
            if {name: finished.get(name) for name in story} != story:
                raise InputError(f"{folder} has dreams of other networks or settings: name another")
            return load_dreamed(str(folder), "train")
        with Checkpoints(folder / "checkpoints") as checkpoints:
            images, labels, parts = maker.make(checkpoints, story, reporter or NullReporter())
            checkpoints.wait()
        buffer = io.BytesIO()
        np.savez(buffer, images=images, labels=labels)
        write_whole(folder / IMAGES, buffer.getvalue())
        own = {"num_classes": maker.num_classes, "parts": parts}
        write_whole(folder / STORY, as_json(story | own).encode())
    return load_dreamed(str(folder), "train")


def _dataset(images: np.ndarray, labels: np.ndarray, _: Any, maker: _Maker) -> Dataset:
    return Dataset(images, labels, maker.num_classes, maker.preprocessing, "dreamed")


def _rolled(images: jax.Array, shift: jax.Array, axis: int) -> jax.Array:
    """Rolls each image by its shift, `[batch]`, or all by the one of `[1]`."""
    side = images.shape[axis]
    source = (jnp.arange(side) - shift[:, None]) % side
    shape = [len(shift), 1, 1, 1]
    shape[axis] = side
    return jnp.take_along_axis(images, source.reshape(shape), axis)


def _finite(measured: dict[str, jax.Array], step: int) -> dict[str, float]:
    numbers = {name: float(value) for name, value in measured.items()}
    if not np.isfinite(numbers["loss"]):
        raise NonFiniteError(f"the loss of the dreams is not finite at step {step}")
    return numbers


def _stop(checkpoints: Checkpoints | None, where: str, signal: int) -> NoReturn:
    if checkpoints is not None:
        checkpoints.wait()
    raise Interrupted(
        f"stopped dreaming after {where}; the same call goes on where there is a workdir", signal
    )


class _Maker:
    """Makes all images, batch by batch."""

    def __init__(
        self,
        how: Dreaming,
        networks: list[Network],
        count: int,
        key: jax.Array,
        preprocessing: Preprocessing,
        pixels: tuple[float, float],
        image_shape: tuple[int, int, int],
        resources: Resources | None,
    ) -> None:
        self.how, self.key, self.count = how, key, count
        self.preprocessing, self.shape = preprocessing, image_shape
        self.resources = resources or Resources()
        devices = usable_devices(self.resources.devices)
        if how.batch_size % len(devices):
            raise InputError(
                f"a batch of {how.batch_size} does not divide among {len(devices)} devices"
            )
        mesh = Mesh(np.asarray(devices), (AXIS,))
        self.split = NamedSharding(mesh, PartitionSpec(AXIS))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.dtype = jnp.result_type(float)
        self.models = [configure_model(each.model, "float32", None) for each in networks]
        variables = [floats_in(self.dtype, dict(each.variables)) for each in networks]
        self.variables = jax.device_put(variables, self.whole)
        logits = jax.eval_shape(
            lambda own, x: run_with_norms(self.models[0], own, x)[0],
            variables[0],
            jax.ShapeDtypeStruct((1, *image_shape), self.dtype),
        )
        self.num_classes = int(logits.shape[-1])
        self.bounds = [
            (np.asarray(each) - np.asarray(preprocessing.mean)) / np.asarray(preprocessing.std)
            for each in pixels
        ]
        self.optimizer = optax.adam(how.rate)
        self.dispatch = self.resources.steps_per_dispatch or default_steps_per_dispatch(devices)
        self.run = jax.jit(self._steps, donate_argnums=1)

    def make(
        self, checkpoints: Checkpoints | None, story: Any, reporter: Reporter
    ) -> tuple[np.ndarray, np.ndarray, list[dict[str, float]]]:
        """Returns images, labels, and the parts of the loss at the end of each batch."""
        size, steps = self.how.batch_size, self.how.steps
        batches = -(-self.count // size)
        finished = np.zeros((batches * size, *self.shape), self.dtype)
        parts: list[dict[str, float]] = []
        state, done = None, 0
        if checkpoints is not None and (found := checkpoints.latest()) is not None:
            if found["story"] != story:
                raise InputError(f"the checkpoints in {checkpoints.directory} are of other dreams")
            found, (finished, state) = checkpoints.restore(
                lambda _: jax.eval_shape(lambda: (jnp.asarray(finished), self._begin(0)))
            )
            done, parts = found["done"], found["parts"]
            finished = np.array(finished)
            state = self._placed(state)
        reporter.phase(f"dreams of {self.count}", "dream", batches * steps, done, batches)
        saved = time.perf_counter()
        with Preemption() as preemption:
            while done < batches * steps:
                batch, step = divmod(done, steps)
                if step == 0 or state is None:
                    state = self._placed(self._begin(batch))
                count = min(self.dispatch, steps - step)
                labels = jax.device_put(self._labels(batch), self.split)
                state, measured = self.run(self.variables, state, labels, batch, step, count)
                done += count
                loss = None
                if step + count == steps or done % 50 < count:
                    measured = _finite(measured, done)
                    loss = measured["loss"]
                reporter.steps(count, count * size, done / steps, loss)
                if step + count == steps:
                    rows = slice(batch * size, (batch + 1) * size)
                    finished[rows] = np.asarray(state.images)
                    parts.append(measured)
                late = time.perf_counter() - saved > self.resources.checkpoint_seconds
                if checkpoints is not None and (late or preemption.signal):
                    description = {"story": story, "done": done, "parts": parts}
                    host = jax.tree.map(np.array, state)
                    checkpoints.save(done, (finished.copy(), host), description)
                    saved = time.perf_counter()
                if preemption.signal:
                    _stop(checkpoints, f"step {done} of {batches * steps}", preemption.signal)
        reporter.finished()
        mean, std = (np.asarray(each) for each in (self.preprocessing.mean, self.preprocessing.std))
        images = (finished[: self.count] * std + mean).astype(np.float32)
        labels = np.concatenate([self._labels(batch) for batch in range(batches)])
        return images, labels[: self.count], parts

    def _labels(self, batch: int) -> np.ndarray:
        size = self.how.batch_size
        return np.arange(batch * size, (batch + 1) * size, dtype=np.int32) % self.num_classes

    def _begin(self, batch: int) -> _State:
        own = jax.random.fold_in(jax.random.fold_in(self.key, 0), batch)
        images = jax.random.normal(own, (self.how.batch_size, *self.shape), self.dtype)
        return _State(images, self.optimizer.init(images))

    def _placed(self, state: _State) -> _State:
        """Splits the images, and Adam's moments, over the devices."""
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, self.split if np.ndim(leaf) == 4 else self.whole),
            state,
        )

    def _steps(
        self, variables: Any, state: _State, labels: Any, batch: Any, first: Any, count: Any
    ) -> tuple[_State, dict[str, jax.Array]]:
        """The steps of one dispatch; and the loss and its parts before the last of them."""
        teacher, *others = zip(self.models, variables, strict=True)
        student = others[0] if others else None
        own = jax.random.fold_in(jax.random.fold_in(self.key, 1), batch)

        def step(index: Any, state: _State) -> tuple[_State, dict[str, jax.Array]]:
            rows, columns, mirror = jax.random.split(jax.random.fold_in(own, first + index), 3)

            shape = (len(state.images),) if self.how.each else (1,)
            limits = -self.how.jitter, self.how.jitter + 1
            shifts = [jax.random.randint(k, shape, *limits) for k in (rows, columns)]
            mirrored = jax.random.bernoulli(mirror, shape=shape)[:, None, None, None]

            def loss(images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
                if self.how.jitter:
                    for axis, shift in zip((1, 2), shifts, strict=True):
                        images = _rolled(images, shift, axis)
                if self.how.flip:
                    images = jnp.where(mirrored, images[:, :, ::-1], images)
                return dream_loss(self.how, teacher, student, images, labels)

            value = jax.value_and_grad(loss, has_aux=True)
            (total, parts), gradient = value(state.images)
            updates, opt_state = self.optimizer.update(gradient, state.opt_state)
            images = jnp.clip(optax.apply_updates(state.images, updates), *self.bounds)
            images = images.astype(state.images.dtype)
            return _State(images, opt_state), parts | {"loss": total}

        if self.dispatch == 1:
            return step(0, state)
        shapes = jax.eval_shape(functools.partial(step, 0), state)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.fori_loop(0, count, lambda i, carry: step(i, carry[0]), (state, zeros))
