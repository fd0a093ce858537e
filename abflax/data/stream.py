"""Orders the examples: the epochs' permutations form one stream, cut into full batches."""

from __future__ import annotations

import functools

import numpy as np


class Stream:
    """The order of the examples in a run.

    The epochs' permutations follow one another without a gap, and are cut into batches of equal
    size. A batch may span two epochs (or more, if it is larger than the data set). Each epoch's
    permutation is a function of (seed, epoch) alone. `examples` is the size of the data set.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._permutation = functools.lru_cache(maxsize=4)(self._draw)

    def batches(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns examples and epochs of `count` steps from `start` on, int32 `[count, batch]`."""
        positions = np.arange(start * self.batch_size, (start + count) * self.batch_size)
        epochs, places = np.divmod(positions, self.examples)
        examples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            examples[in_epoch] = self._permutation(int(epoch))[places[in_epoch]]
        shape = (count, self.batch_size)
        return examples.reshape(shape).astype(np.int32), epochs.reshape(shape).astype(np.int32)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.examples)
