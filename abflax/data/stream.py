"""The order of examples: one stream of epochs' permutations, cut into full batches."""

from __future__ import annotations

import functools

import numpy as np


class Stream:
    """Which example stands where, for a whole run.

    The epochs' permutations follow one another without a gap, and batches of equal size are cut
    from that stream: a batch may span two epochs (or more, where there are fewer examples than a
    batch holds). A function of (seed, epoch) alone.

    Args:
      examples: size of the data set.
      batch_size: examples per step.
      seed: of the order.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._permutation = functools.lru_cache(maxsize=4)(self._draw)

    def batches(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples and epochs of steps start … start + count − 1, int32 `[count, batch]` each."""
        position = np.arange(start * self.batch_size, (start + count) * self.batch_size)
        epochs, place = np.divmod(position, self.examples)
        examples = np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            examples[here] = self._permutation(int(epoch))[place[here]]
        shape = (count, self.batch_size)
        return examples.reshape(shape).astype(np.int32), epochs.reshape(shape).astype(np.int32)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.examples)
