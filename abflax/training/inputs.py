"""The input pipeline: what each dispatch is given, from memory, image files or a loader.

A data set in memory is copied to the devices once, and a dispatch gets the indices of its
examples. Image files are decoded ahead of time by processes of their own
(`abflax.data.DecodedBatches`) while the devices work, and each dispatch brings its batches, uint8.
Either way an image is a function of (seed, epoch, example) and the order one of (seed, epoch), so a
run can resume at any step. A loader of the user's is read batch by batch, and where it can be
checkpointed its position is in a run's checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from abflax.data import Batches, BatchReader, Dataset, DecodedBatches, ImageFiles, Stream
from abflax.data.decoders import Decoders
from abflax.training.devices import replicate, shard_batch
from abflax.training.parallel import InputSpec, StepInputs

EVALUATION_BATCH = 250
"""Images that a device evaluates at once."""

_FILES_EVALUATION_BATCH = 50  # likewise for image files, which have some fifty times as many pixels
_BATCHES_AHEAD = 4  # batches that are decoded ahead, at least

Crops = tuple[str, list[int], list[tuple[int, ...]]]
"""Kind of crop, examples, and a key for each: what `abflax.data.decoding` needs for a batch."""


def padded_batches(examples: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every example's index once, `[batches, size]`, and a mask that is False for padding."""
    index = np.arange(-(-examples // size) * size, dtype=np.int32).reshape(-1, size)
    return np.where(index < examples, index, 0), index < examples


class TrainInputs(Protocol):
    """The training data, dispatch by dispatch.

    Attributes:
      resident: what of them is on the devices: images and labels, or nothing where they are
        streamed.
      position: where the next batch is, as text; None where its step alone says so, or nothing
        does.
    """

    @property
    def resident(self) -> dict[str, jax.Array]: ...  # noqa: D102
    @property
    def position(self) -> str | None: ...  # noqa: D102

    def __call__(self, step: int, count: int, position: str | None = None) -> StepInputs:
        """The inputs of a dispatch that makes `count` steps, the first of them `step`.

        Args:
          step: of the run.
          count: how many steps, at most as many as a dispatch makes.
          position: that of the step, where the last dispatch did not end there.
        """

    def close(self) -> None:
        """Ends what runs in the background."""


class OrderedInputs:
    """Training data whose order is a function of the step: in memory, or image files.

    Args:
      data: the training data.
      stream: their order.
      spec: how they reach the devices.
      seed: of the random crops.
      workers: processes that decode image files; None: one a core, 16 at most.
      target: unlabelled data of another domain, of which each step gets as many images; None: there
        are none.
    """

    def __init__(
        self,
        data: Dataset | ImageFiles,
        stream: Stream,
        spec: InputSpec,
        seed: int,
        workers: int | None,
        target: Dataset | None = None,
    ) -> None:
        def crops(step: int) -> Crops:
            (examples,), (epochs,) = (each.tolist() for each in stream.batches(step, 1))
            return "random crop", examples, [(seed, *k) for k in zip(epochs, examples, strict=True)]

        self._stream, self._spec = stream, spec
        ahead = max(_BATCHES_AHEAD, 2 * spec.steps_per_dispatch)
        self._images = _Images(data, spec.devices, crops, stream.batch_size, ahead, workers)
        self.close = self._images.close
        self.position = None
        self._target: tuple[Stream, dict[str, jax.Array]] | None = None
        if target is not None:
            # A seed that no run has: in the order of the source, data in pairs would stay in pairs.
            own = Stream(len(target), stream.batch_size, stream.seed + 2**32)
            self._target = own, replicate(target.arrays(), spec.devices)

    @property
    def resident(self) -> dict[str, jax.Array]:
        """The images and labels that are on the devices; empty where they are streamed."""
        return self._images.resident

    @property
    def decoders(self) -> Decoders | None:
        """The processes that decode; None: there are none, or they have not started."""
        return self._images.batches.decoders if self._images.batches is not None else None

    def __call__(self, step: int, count: int, position: str | None = None) -> StepInputs:
        """The inputs of a dispatch; see `TrainInputs`."""
        target, size = None, self._spec.steps_per_dispatch
        if self._target is not None:
            stream, resident = self._target
            target = StepInputs(**resident, **self._shared(stream.batches(step, size)))
        order = self._stream.batches(step, size)
        images = self._images(step, count, order[0])
        return StepInputs(**images, **self._shared(order), target=target)

    def _shared(self, order: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        """Examples and epochs of the steps, each device's share."""
        examples, epochs = (shard_batch(each, self._spec.devices) for each in order)
        return {"examples": examples, "epochs": epochs}


class LoaderInputs:
    """Training data from a loader. An example is known by its place in its epoch.

    Args:
      data: the loader.
      spec: how batches reach the devices.
    """

    def __init__(self, data: Batches, spec: InputSpec) -> None:
        self._data, self._spec, self._reader = data, spec, BatchReader(data)
        self.resident: dict[str, jax.Array] = {}

    @property
    def position(self) -> str | None:
        """Where the loader's next batch is; None where it cannot say."""
        return self._reader.position

    def __call__(self, step: int, count: int, position: str | None = None) -> StepInputs:
        """The inputs of a dispatch; see `TrainInputs`."""
        if step != self._reader.step:
            self._reader.seek(step, position)
        data, size = self._data, self._spec.steps_per_dispatch
        images = np.zeros((size, data.batch_size, *data.image_shape), data.dtype)
        labels = np.zeros((size, data.batch_size), np.int32)
        for index in range(count):
            images[index], labels[index] = self._reader.next()
        places = np.arange(step * data.batch_size, (step + size) * data.batch_size)
        order = np.divmod(places.reshape(size, data.batch_size), len(data))
        epochs, examples = (each.astype(np.int32) for each in order)
        return StepInputs(
            *(shard_batch(each, self._spec.devices) for each in (images, labels, examples, epochs))
        )

    def close(self) -> None:
        """Does nothing: the loader is the caller's."""


class EvaluationInputs:
    """Held-out data, dispatch by dispatch; a data set in memory takes a single dispatch.

    Args:
      data: the held-out data.
      devices: those that evaluate.
      workers: processes that decode image files; None: one a core, 16 at most.
    """

    def __init__(
        self,
        data: Dataset | ImageFiles,
        devices: Sequence[jax.Device],
        workers: int | None = None,
    ) -> None:
        in_memory = isinstance(data, Dataset)
        size = (EVALUATION_BATCH if in_memory else _FILES_EVALUATION_BATCH) * len(devices)
        self._examples, self._mask = padded_batches(len(data), size)
        self._batches = len(self._examples)

        def crops(number: int) -> Crops:
            batch = number % self._batches
            examples = self._examples[batch][self._mask[batch]].tolist()
            return "centre crop", examples, [()] * len(examples)

        self._per_dispatch = self._batches if in_memory else 1
        self._devices, self._passes = devices, 0
        self._images = _Images(data, devices, crops, size, _BATCHES_AHEAD, workers)
        self.close = self._images.close

    def __iter__(self) -> Iterator[StepInputs]:
        """The inputs of each dispatch of one pass over the data."""
        first, self._passes = self._passes * self._batches, self._passes + 1
        for start in range(0, self._batches, self._per_dispatch):
            part = slice(start, start + self._per_dispatch)
            order = (self._examples[part], self._mask[part])
            examples, mask = (shard_batch(each, self._devices) for each in order)
            images = self._images(first + start, self._per_dispatch, order[0])
            yield StepInputs(**images, examples=examples, mask=mask)


@dataclasses.dataclass
class _Images:
    """The images and labels of a data set, on the devices or decoded for each dispatch.

    Attributes:
      data: the data set.
      devices: those that need the images.
      crops: number of a batch -> its crops; a process decodes what its own devices need.
      size: examples in a batch.
      ahead: batches that are decoded ahead.
      workers: processes that decode.
    """

    data: Dataset | ImageFiles
    devices: Sequence[jax.Device]
    crops: Callable[[int], Crops]
    size: int
    ahead: int
    workers: int | None

    def __post_init__(self) -> None:
        # Places in a batch, by device of this process.
        places = shard_batch(np.arange(self.size)[None], self.devices)[:, 0]
        self._shares = places.shape
        self.batches: DecodedBatches | None = None

        def local_crops(number: int) -> Crops:
            kind, examples, keys = self.crops(number)
            here = [place for place in places.ravel() if place < len(examples)]
            return kind, [examples[place] for place in here], [keys[place] for place in here]

        if isinstance(self.data, Dataset):
            self.resident = replicate(self.data.arrays(), self.devices)
        else:
            self.resident = {}
            self.batches = DecodedBatches(
                self.data, local_crops, places.size, self.ahead, self.workers
            )

    def __call__(self, first: int, count: int, examples: np.ndarray) -> dict[str, Any]:
        """Images and labels for `count` batches, the first of them `first`.

        They are padded to as many as `examples` has rows, which are those of the batches.
        """
        if self.batches is None:
            return self.resident
        (devices, share), size = self._shares, len(examples)
        images = np.zeros((size, devices * share, *self.data.image_shape), np.uint8)
        for index in range(count):
            self.batches.into(first + index, images[index])
        shares = images.reshape(size, devices, share, *self.data.image_shape).swapaxes(0, 1)
        return {"images": shares, "labels": shard_batch(self.data.labels[examples], self.devices)}

    def close(self) -> None:
        """Ends the processes that decode."""
        if self.batches is not None:
            self.batches.close()
