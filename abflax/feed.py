"""What a dispatch is given: a data set that lies on the devices, or the batches that it needs.

A data set in memory is sent once, and a dispatch tells which examples it wants. Photographs are
decoded ahead by processes of their own (`abflax.data.Batches`) while the devices work, and the
batches of a dispatch, uint8, are sent along with it. Either way an image is a function of (seed,
epoch, example), and the order one of (seed, epoch), so that a run goes on from any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from abflax import parallel
from abflax.data import Batches, Dataset, Photographs, Stream
from abflax.data.decoders import Decoders

BATCH = 250
"""Images that a device looks at at once in evaluation."""

_PHOTOGRAPHS = 50  # the same of photographs, which have some fifty times as many pixels
_AHEAD = 4  # batches that are decoded ahead, at least

Given = tuple[dict[str, Any], np.ndarray, np.ndarray]
"""The images and labels; and two arrays `[devices, batches, share]`: the examples, and beside them
epochs or a mask."""


class Feed:
    """The training data, dispatch by dispatch.

    Args:
      data: the training data.
      stream: their order.
      per_dispatch: steps that a dispatch has room for.
      devices: where they are trained on.
      seed: of the random crops.
      workers: processes that decode photographs; None: one a core, 16 at most.
    """

    def __init__(
        self,
        data: Dataset | Photographs,
        stream: Stream,
        per_dispatch: int,
        devices: Sequence[jax.Device],
        seed: int,
        workers: int | None,
    ) -> None:
        def crops(step: int) -> tuple[str, list[int], list[tuple[int, ...]]]:
            (examples,), (epochs,) = (each.tolist() for each in stream.batches(step, 1))
            return "random crop", examples, [(seed, *k) for k in zip(epochs, examples, strict=True)]

        self._stream, self._room, self._devices = stream, per_dispatch, devices
        ahead = max(_AHEAD, 2 * per_dispatch)
        self._images = _Images(data, devices, crops, stream.batch_size, ahead, workers)
        self.close = self._images.close

    @property
    def decoders(self) -> Decoders | None:
        """The processes that decode; None where there are none, or none yet."""
        return self._images.batches.decoders if self._images.batches is not None else None

    def __call__(self, step: int, count: int) -> Given:
        """Data, examples and epochs of a dispatch that makes `count` steps from `step` on."""
        order = self._stream.batches(step, self._room)
        examples, epochs = (parallel.split(each, self._devices) for each in order)
        return self._images(step, count, self._room), examples, epochs


class HeldOut:
    """Held-out data, dispatch by dispatch; what lies on the devices is a single one.

    Args:
      data: the held-out data.
      devices: where a network is evaluated on.
      workers: processes that decode photographs; None: one a core, 16 at most.
    """

    def __init__(
        self,
        data: Dataset | Photographs,
        devices: Sequence[jax.Device],
        workers: int | None = None,
    ) -> None:
        here = isinstance(data, Dataset)
        size = (BATCH if here else _PHOTOGRAPHS) * len(devices)
        self._batches = -(-len(data) // size)
        index = np.arange(self._batches * size, dtype=np.int32).reshape(self._batches, size)
        # The last, partial batch is padded with example 0 and masked.
        self._mask, self._examples = index < len(data), np.where(index < len(data), index, 0)

        def crops(number: int) -> tuple[str, list[int], list[tuple[int, ...]]]:
            batch = number % self._batches
            examples = self._examples[batch][self._mask[batch]].tolist()
            return "centre crop", examples, [()] * len(examples)

        self._room, self._devices, self._passes = self._batches if here else 1, devices, 0
        self._images = _Images(data, devices, crops, size, _AHEAD, workers)
        self.close = self._images.close

    def __iter__(self) -> Iterator[Given]:
        """Data, examples and mask of each dispatch."""
        first, self._passes = self._passes * self._batches, self._passes + 1
        for start in range(0, self._batches, self._room):
            part = slice(start, start + self._room)
            order = (self._examples[part], self._mask[part])
            examples, mask = (parallel.split(each, self._devices) for each in order)
            yield self._images(first + start, self._room, self._room), examples, mask


class _Images:
    """The images and labels of a data set, on the devices or on their way to them.

    Args:
      data: the data set.
      devices: where they are needed.
      crops: number of a batch -> (kind of crop, examples, keys); see `data.decoding`. A
        process decodes what its own devices need.
      size: examples in a batch.
      ahead: batches that are decoded ahead.
      workers: processes that decode.
    """

    def __init__(
        self,
        data: Dataset | Photographs,
        devices: Sequence[jax.Device],
        crops: Callable[[int], tuple[str, list[int], list[tuple[int, ...]]]],
        size: int,
        ahead: int,
        workers: int | None,
    ) -> None:
        own = parallel.split(np.arange(size)[None], devices)[:, 0]  # places in a batch, by device
        self._places, self._shape = own.shape, data.image_shape
        self.batches: Batches | None = None

        def own_crops(number: int) -> tuple[str, list[int], list[tuple[int, ...]]]:
            kind, examples, keys = crops(number)
            here = [place for place in own.ravel() if place < len(examples)]
            return kind, [examples[place] for place in here], [keys[place] for place in here]

        if isinstance(data, Dataset):
            self._resident = parallel.replicate(data.arrays(), devices)
        else:
            self._resident = {"labels": parallel.replicate(data.labels, devices)}
            self.batches = Batches(data, own_crops, own.size, ahead, workers)

    def __call__(self, first: int, count: int, room: int) -> dict[str, Any]:
        """What a dispatch of so many batches, from the first on, is given; it has room for more."""
        if self.batches is None:
            return self._resident
        devices, share = self._places
        images = np.zeros((room, devices * share, *self._shape), np.uint8)
        for index in range(count):
            self.batches.into(first + index, images[index])
        shares = images.reshape(room, devices, share, *self._shape).swapaxes(0, 1)
        return {"images": shares, **self._resident}

    def close(self) -> None:
        """Ends the processes that decode."""
        if self.batches is not None:
            self.batches.close()
