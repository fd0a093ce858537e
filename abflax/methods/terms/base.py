"""The base classes of all terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.errors import InputError, unknown
from abflax.methods.connectors import Pair
from abflax.models.network import Network
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of an objective.

    Subclasses are frozen dataclasses of their options. The targets hold only what one batch needs
    of the teacher. No gradient flows into them, so they can be computed once and cached.

    Attributes:
      transfers: True for a method's transfer loss, whose weight has to be searched; False for
        supervision by labels or logits.
      needs_teacher: False for a term that does not use the teacher.
      needs_student: False for a term that trains its module alone. A phase of such terms leaves the
        student as it is, and lies outside its learning-rate schedule.
      needs_pullback: True for a term that uses `abflax.taps.Forward.pullback`.
      positions: how to treat layers whose height and width differ between the networks. "same"
        raises an error, "pooled" average-pools the larger map to the smaller before the term gets
        it, "free" changes neither.
      relates: "batch" for a term that compares examples with each other: `loss` gets the student's
        values, targets and labels of the whole batch, gathered over the devices; None: those of a
        device's share.
      view: the view that the term reads besides the images, a name in `abflax.methods.VIEWS` or
        `TARGET_DOMAIN`; its passes are in `Forward.views`.
      trains_teacher: True for a term whose gradient flows into its targets: the teacher is trained
        along with the student, in training mode.
      same_classes: True for a term that compares logits over classes that both networks tell apart.
    """

    transfers: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    needs_student: ClassVar[bool] = True
    needs_pullback: ClassVar[bool] = False
    positions: ClassVar[Literal["same", "pooled", "free"]] = "same"
    relates: ClassVar[Literal["batch"] | None] = None
    view: ClassVar[str | None] = None
    trains_teacher: ClassVar[bool] = False
    same_classes: ClassVar[bool] = False

    def chosen(self, taps: Iterable[str]) -> tuple[str, ...]:
        """Returns the names of the taps that the term compares."""
        del taps
        return ()

    def module(self, pair: Pair) -> nn.Module | None:
        """Makes what maps student and targets before `loss`, and is trained with the student.

        It is a Linen module, called with (student, targets, train=…), which returns student and
        targets, and is thrown away after the phase. Its weights are drawn with targets None.

        Args:
          pair: the two networks.

        Returns:
          None: nothing is mapped.
        """
        del pair
        return None

    def require_teacher(self, teacher: Network, image_shape: tuple[int, ...]) -> None:
        """Raises `InputError` where the term cannot learn from that teacher.

        It is called once, before training; networks whose taps do not match are refused elsewhere.

        Args:
          teacher: the model and its weights.
          image_shape: (height, width, channels).
        """
        del teacher, image_shape

    def first_weights(
        self, drawn: dict[str, Any], teacher: Any, before: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Chooses what the module's weights are at the start of the phase.

        Args:
          drawn: the random ones.
          teacher: the teacher's parameters.
          before: the parameters of all modules of the phase before, by their names in these; empty
            in the first phase.

        Returns:
          A tree of the same shapes.
        """
        del teacher, before
        return drawn

    def targets(self, teacher: Forward) -> Any:
        """Returns a pytree of arrays with a leading batch dimension."""
        raise NotImplementedError(f"{type(self).__name__} defines no targets")

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """Computes one number per example, `[batch]`; the step takes the mean over the batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def measures(self, student: Forward, targets: Any) -> dict[str, Any]:
        """Computes what training reports besides the loss: a (nested) dict of scalars."""
        del student, targets
        return {}


@dataclasses.dataclass(frozen=True)
class LayerTerm(Term):
    """A term that compares taps layer by layer: Σ_l w_l · layer_loss(S_l, layer_targets(T_l)).

    Subclasses define `layer_targets` and `layer_loss`, or override `targets` and `loss`.

    Attributes:
      layers: the taps to compare; "last" is the deepest; None: all.
      layer_ratio: the weight of a layer relative to the next deeper one. With L taps, the l-th has
        the weight ratio^(L − l): a ratio of ½ gives ¼, ½, 1. A layer's weight does not depend on
        which other layers are compared.
    """

    transfers: ClassVar[bool] = True
    layers: tuple[str, ...] | None = None
    layer_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise InputError("layers must name at least one tap; leave it out for all")
        if not self.layer_ratio > 0:
            raise InputError(f"layer_ratio must be above 0, not {self.layer_ratio}")

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Computes the targets of one layer from the teacher's tap."""
        raise NotImplementedError(f"{type(self).__name__} defines no layer_targets")

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Computes the loss of one layer, `[batch]`, from the student's tap after its connector."""
        raise NotImplementedError(f"{type(self).__name__} defines no layer_loss")

    def targets(self, teacher: Forward) -> Any:
        """Computes the targets of each chosen layer."""
        return {name: self.layer_targets(teacher.taps[name]) for name in self.chosen(teacher.taps)}

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """Sums the layers' weighted losses."""
        del labels
        return summed(
            weight * self.layer_loss(student.taps[name], targets[name])
            for name, weight in self.layer_weights(student.taps).items()
        )

    def chosen(self, taps: Iterable[str]) -> tuple[str, ...]:
        """Returns the chosen layers, the shallowest first.

        Raises:
          ValueError: if one of them is not among the taps.
        """
        names = list(taps)
        if self.layers is None:
            return tuple(names)
        layers = {names[-1] if layer == "last" and names else layer for layer in self.layers}
        for layer in layers:
            if layer not in names:
                raise unknown("layer", layer, names)
        return tuple(name for name in names if name in layers)

    def layer_weights(self, taps: Iterable[str]) -> dict[str, float]:
        """Returns {layer: weight} of the chosen layers, given all the taps of a network."""
        depth = {name: index for index, name in enumerate(taps)}
        last = len(depth) - 1
        return {name: self.layer_ratio ** (last - depth[name]) for name in self.chosen(depth)}


def features_of(forward: Forward) -> jax.Array:
    """Returns the classifier's input. Raises `InputError` for a network that does not sow it."""
    if forward.features is None:
        raise InputError("the method compares features, which one of the networks does not sow")
    return forward.features


def summed(losses: Iterable[jax.Array]) -> jax.Array:
    """Sums over the layers, in the dtype of the losses, since the initial 0 is weakly typed."""
    return sum(losses, start=jnp.asarray(0.0))


def per_example(elementwise: jax.Array) -> jax.Array:
    """Sums over all dimensions but the batch."""
    return elementwise.sum(axis=tuple(range(1, elementwise.ndim)))
