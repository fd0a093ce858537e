"""Makes images from a trained network alone, to distil it where its data are gone."""

from abflax.synthesis.dream import Dreaming, dream, dream_loss

__all__ = ["Dreaming", "dream", "dream_loss"]
