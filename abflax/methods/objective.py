"""A phase bound to two networks: targets of the teacher, loss of the student.

Targets depend only on the teacher and can be cached; the loss depends only on targets.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Var
from jax.interpreters.partial_eval import dce_jaxpr

from abflax.errors import InputError, require_instances
from abflax.methods.connectors import (
    Connectors,
    Pair,
    Positions,
    common_positions,
    pool_positions,
    require_same_positions,
    require_same_taps,
)
from abflax.methods.phase import Phase
from abflax.methods.terms import LayerTerm, Term
from abflax.methods.views import TARGET_DOMAIN, VIEWS
from abflax.methods.weights import Schedule
from abflax.models.network import Network, as_network
from abflax.models.variables import abstract_variables, floats_in, init_variables
from abflax.taps import Forward, Model, abstract_forward, run_model, side_of, with_side


@dataclasses.dataclass(frozen=True)
class Objective:
    """A phase bound to two networks; `init`, `targets` and `loss` are what a training loop needs.

    All are pure and work under `jit`, `grad`, `pmap` and `shard_map`.

    Attributes:
      student: a model, with its tap paths where it does not sow its taps.
      teacher: likewise; None where no term needs one.
      phase: the weighted terms and their optimizer.
      connectors: each term's module; None for a term without.
      pooled: for each term, the layers whose larger map is pooled, and the sides it is pooled to.
      measured: the layers whose agreement can be measured: both networks have the same neurons
        there (after the connectors, if there are any).
      axis_name: the mapped axis over which gradients and metrics are averaged.
      steps_per_epoch: by which weights that are schedules count epochs.
      epochs: of the phase, for these weights.
      image_shape: (height, width, channels).
    """

    student: Model
    teacher: Model | None
    phase: Phase
    connectors: tuple[nn.Module | None, ...]
    pooled: tuple[Positions, ...]
    measured: tuple[str, ...]
    axis_name: str | None = None
    steps_per_epoch: Fraction = Fraction(1)
    image_shape: tuple[int, ...] = ()
    epochs: int = 1

    def init(
        self, key: jax.Array, student: Any = None, teacher: Any = None, before: Any = None
    ) -> tuple[Any, Any]:
        """Makes the parameters and the running statistics at the start of the phase.

        Args:
          key: of the student's and the connectors' first weights; `jax.random.key(seed)` gives
            those that `abflax.distill` starts with for the seed `weights`.
          student: variables to start with, `params` and other collections; None: new ones.
          teacher: its variables; only a phase that trains it, and terms that start with some of its
            weights, need them.
          before: the parameters at the end of the phase before; None: there is none.

        Returns:
          Parameters {"student": …, "connectors": …}, to be trained, with "teacher" where that is
          trained along; and what else a step changes, likewise.
        """
        if student is None:
            student = init_variables(self.student, jax.random.fold_in(key, 0), self.image_shape)
        modules = {} if before is None else before["connectors"]
        key = jax.random.fold_in(key, 1)
        return self.start(student, key, teacher or {"params": {}}, modules)

    def start(
        self,
        student: Any,
        key: jax.Array,
        teacher: Any | None = None,
        before: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Makes the parameters and the running statistics that `init` makes, of a given student.

        Args:
          student: variables by collection.
          key: of the connectors' initial weights.
          teacher: its variables; None: modules start as they are drawn, for a caller whom only
            their shapes concern.
          before: the parameters of the modules of the phase before.
        """
        dtype = jnp.result_type(float)
        earlier = {name: own for module in (before or {}).values() for name, own in module.items()}
        images = jnp.zeros((1, *self.image_shape), dtype)
        forward = run_model(self.student, student, images, train=False)
        params: dict[str, Any] = {"student": student["params"], "connectors": {}}
        own = {name: tree for name, tree in student.items() if name != "params"}
        stats: dict[str, Any] = {"student": own, "connectors": {}}
        for index, (module, (_, term)) in enumerate(
            zip(self.connectors, self.phase.terms, strict=True)
        ):
            if module is None:
                continue
            variables = module.init(jax.random.fold_in(key, index), forward, None, train=False)
            weights = variables.get("params", {})
            if teacher is not None:
                weights = term.first_weights(weights, teacher["params"], earlier)
            params["connectors"][f"term{index}"] = weights
            running = floats_in(dtype, variables.get("batch_stats", {}))
            stats["connectors"][f"term{index}"] = running
        if self.phase.trains_teacher:
            if teacher is None:
                raise InputError(f"phase {self.phase.name} trains its teacher: give its variables")
            params["teacher"] = teacher["params"]
            stats["teacher"] = {name: tree for name, tree in teacher.items() if name != "params"}
        return params, stats

    def targets(
        self,
        teacher: Any,
        images: jax.Array,
        labels: jax.Array | None = None,
        keys: jax.Array | None = None,
        target_images: jax.Array | None = None,
    ) -> tuple[Any, ...]:
        """Computes what a batch needs of the teacher. No gradient flows into it.

        Of a teacher that is trained along it is nothing but the views: `loss` computes the rest.

        Args:
          teacher: its variables, `params` and other collections, which stay as they are.
          images: normalized, `[batch, height, width, channels]`.
          labels: integers `[batch]`; only terms that read a view need them.
          keys: one for each example, likewise.
          target_images: unlabelled images of another domain, likewise.

        Returns:
          A pytree of arrays with a leading batch dimension.
        """
        stats = {name: tree for name, tree in teacher.items() if name != "params"}
        return make_targets(self, teacher["params"], stats, images, labels, keys, target_images)[0]

    def loss(
        self,
        params: Any,
        state: Any,
        targets: tuple[Any, ...],
        images: jax.Array,
        labels: jax.Array,
        *,
        key: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        """Computes the phase's objective on a batch, or on one device's share of it.

        Losses that the student's modules sow into the collection `losses` are added.

        Args:
          params: as `init` gives them.
          state: likewise.
          targets: as `targets` gives them for these images.
          images: normalized, `[batch, height, width, channels]`.
          labels: integers `[batch]`.
          key: for a student with dropout.
          step: of the phase, from 0, for weights that are schedules.

        Returns:
          Σ weight · mean over the batch of each term's loss; and (the state after the pass, what
          the terms measure).
        """
        views = targets[-2]
        student = _run_on_views(
            self.student,
            {"params": params["student"], **state["student"]},
            images,
            views,
            train=self.phase.needs_student,  # else nothing of it changes
            pullback=self.needs_pullback,
            dropout_key=key,
        )
        stats = {"student": student.state, "connectors": {}}
        if self.phase.trains_teacher:
            assert self.teacher is not None
            variables = {"params": params["teacher"], **state["teacher"]}
            teacher = _run_on_views(self.teacher, variables, images, views)
            targets, stats["teacher"] = _targets_of(self, teacher), teacher.state
        total = jnp.zeros((), jnp.result_type(float))
        measures: dict[str, Any] = {}
        for index, (weight, term) in enumerate(self.phase.terms):
            pooled = pool_positions(student, self.pooled[index])
            forward, target, running = apply_connectors(
                self.connectors[index], index, pooled, targets[index], params, state, True
            )
            stats["connectors"] |= running
            measures |= term.measures(forward, target)
            compared = forward, target, labels
            if term.relates == "batch" and self.axis_name is not None:
                compared = _of_whole_batch(term, *compared, self.axis_name)
            scale: Any = weight
            if isinstance(weight, Schedule):
                scale = weight(step, self.steps_per_epoch, self.epochs)
            losses = term.loss(*compared)
            if jnp.shape(losses) != compared[-1].shape:
                raise InputError(
                    f"the loss of {type(term).__name__} must be one number for each example, "
                    f"[batch], not of shape {jnp.shape(losses)}"
                )
            total += scale * jnp.mean(losses)
        if student.losses is not None:
            total += student.losses
            measures["sown_losses"] = student.losses
        return total, (stats, measures)

    def abstract_start(self) -> Any:
        """Computes the shapes of what `start` makes: parameters and running statistics."""
        teacher = None
        if self.teacher is not None and self.phase.trains_teacher:
            teacher = abstract_variables(self.teacher, self.image_shape)
        return jax.eval_shape(
            self.start,
            abstract_variables(self.student, self.image_shape),
            jax.random.key(0),
            teacher,
        )

    def trainable(self) -> Any:
        """Finds the parameters that get a gradient.

        The others get no weight decay either (the classifier in the initialise phase, everything
        behind the one layer that a term compares, or behind a `stop_gradient`).

        Returns:
          A tree of booleans, shaped as the parameters {"student": …, "connectors": …}.
        """
        teacher: Any = {"params": {}, "batch_stats": {}}
        if self.teacher is not None:
            teacher = abstract_variables(self.teacher, self.image_shape)
        params, stats = self.abstract_start()
        stats["teacher"] = {name: tree for name, tree in teacher.items() if name != "params"}
        images = jax.ShapeDtypeStruct((2, *self.image_shape), jnp.result_type(float))
        labels = jax.ShapeDtypeStruct((2,), jnp.int32)

        def loss(
            params: Any, teacher_params: Any, images: jax.Array, labels: jax.Array
        ) -> jax.Array:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)
            key = jax.random.key(0)
            keys = jax.random.split(key, len(images))
            targets, _ = make_targets(
                self, teacher_params, zeros["teacher"], images, labels, keys, images
            )
            return self.loss(params, zeros, targets, images, labels, key=key)[0]

        axes = [(self.axis_name, 1)] if self.axis_name else None
        arguments = (params, teacher["params"], images, labels)
        jaxpr = jax.make_jaxpr(loss, axis_env=axes)(*arguments).jaxpr
        _, used = dce_jaxpr(jaxpr, [True])
        # Not the jaxpr is differentiated: a custom rule may run only where the model calls it.
        gradients = jax.make_jaxpr(jax.grad(loss, allow_int=True), axis_env=axes)(*arguments).jaxpr
        computed = set(gradients.invars)  # else an output is a constant: the zero of no gradient
        for equation in gradients.eqns:
            if any(isinstance(each, Var) and each in computed for each in equation.invars):
                computed.update(equation.outvars)
        reached = [isinstance(each, Var) and each in computed for each in gradients.outvars]
        tree = jax.tree.structure(params)
        return jax.tree.unflatten(tree, map(operator.and_, used, reached))

    @property
    def runs_teacher(self) -> bool:
        """Whether a training step needs the pass of a teacher that stays as it is."""
        phase = self.phase
        return self.teacher is not None and phase.needs_teacher and not phase.trains_teacher

    @property
    def needs_pullback(self) -> bool:
        """Whether a term needs gradients with respect to the images."""
        return any(term.needs_pullback for _, term in self.phase.terms)


def bind(
    student: Model | Network,
    teacher: Model | Network | None,
    phase: Phase,
    image_shape: tuple[int, ...],
    *,
    axis_name: str | None = None,
    steps_per_epoch: Fraction = Fraction(1),
    epochs: int = 1,
) -> Objective:
    """Binds a phase to two networks, and checks that its terms can compare them.

    The terms' modules compute in the student's dtypes.

    Args:
      student: the model, in the precision that it trains in; of a `Network` its model counts.
      teacher: likewise; None if no term needs one. A term may check the weights of a `Network`.
      phase: its terms with their weights.
      image_shape: (height, width, channels).
      axis_name: the mapped axis over which gradients and metrics are averaged, by the loop, and the
        statistics of batch norms, here; None: there is none.
      steps_per_epoch: examples / batch size; only weights that are schedules need it.
      epochs: of the phase, likewise.

    Raises:
      ValueError: if a layer is missing in one of them, their positions differ, or a term cannot
        learn from that teacher.
    """
    require_instances({"phase": (phase, Phase)})
    if len(image_shape) != 3:
        raise InputError(f"image_shape is (height, width, channels), not {tuple(image_shape)}")
    if isinstance(network := as_network(teacher), Network):
        for _, term in phase.terms:
            term.require_teacher(network, tuple(image_shape))
    own, its = (_model_of(each, axis_name) for each in (student, teacher))
    ours, theirs = (
        abstract_forward(model, abstract_variables(model, image_shape), (1, *image_shape))
        if model is not None
        else None
        for model in (own, its)
    )
    assert ours is not None
    student_taps = {name: tap.shape for name, tap in ours.taps.items()}
    teacher_taps = {} if theirs is None else {name: tap.shape for name, tap in theirs.taps.items()}
    fields = side_of(own).dtypes
    connectors: list[nn.Module | None] = []
    pooled: list[Positions] = []
    for _, term in phase.terms:
        layers = term.chosen(student_taps)
        _require_comparable(term, layers, student_taps, teacher_taps)
        pools = term.positions == "pooled"
        pooled.append(common_positions(student_taps, teacher_taps, layers) if pools else ())
        pair = Pair(layers, ours, theirs, fields | {"axis_name": axis_name})
        connectors.append(term.module(pair))
    connected = {name for each in connectors for name in connected_taps(each)}
    measured = tuple(
        name
        for name, shape in student_taps.items()
        if shape == teacher_taps.get(name)
        or (name in connected and shape[:-1] == teacher_taps[name][:-1])
    )
    return Objective(
        own, its, phase, tuple(connectors), tuple(pooled), measured, axis_name,
        steps_per_epoch, tuple(image_shape), epochs,
    )  # fmt: skip


def _model_of(given: Any, axis_name: str | None) -> Any:
    """The model of what was given, its batch norms averaging over that axis."""
    network = as_network(given)
    model = network.model if isinstance(network, Network) else network
    if model is None or axis_name is None:
        return model
    side = side_of(model)
    return with_side(model, side.configured(side.dtypes | {"axis_name": axis_name}))


def _require_comparable(
    term: Term,
    layers: tuple[str, ...],
    student_taps: Mapping[str, tuple[int, ...]],
    teacher_taps: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises `InputError` where the networks do not have the taps that a term compares."""
    if isinstance(term, LayerTerm):
        every_layer = term.layers is None
        require_same_taps(student_taps if every_layer else layers, term.chosen(teacher_taps))
        if not layers:
            raise InputError(
                f"{type(term).__name__} compares taps, of which neither network has one: name "
                "some with abflax.Tapped (abflax.taps.suggest tells which there could be)"
            )
    if term.positions == "same":
        require_same_positions(student_taps, teacher_taps, layers)


def make_targets(
    objective: Objective,
    teacher_params: Any,
    teacher_stats: Any,
    images: jax.Array,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
    target_images: jax.Array | None = None,
) -> tuple[tuple[Any, ...], Any]:
    """Computes what a batch needs of the teacher.

    Args:
      objective: the phase, bound to student and teacher.
      teacher_params: the teacher's weights.
      teacher_stats: its other variables.
      images: normalized, `[share, height, width, channels]`.
      labels: integers `[share]`; only views need them.
      keys: one for each example, likewise.
      target_images: the images of the view `TARGET_DOMAIN`, normalized.

    Returns:
      The targets, term by term (and two last entries, see `_targets`), and the teacher's state
      after the pass.
    """
    (targets,), stats = make_all_targets(
        (objective,), teacher_params, teacher_stats, images, labels, keys, target_images
    )
    return targets, stats


def make_all_targets(
    objectives: Sequence[Objective],
    teacher_params: Any,
    teacher_stats: Any,
    images: jax.Array,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
    target_images: jax.Array | None = None,
) -> tuple[tuple[tuple[Any, ...], ...], Any]:
    """`make_targets` for several objectives with one teacher in one mode: one forward pass."""
    teacher = next((each.teacher for each in objectives if each.runs_teacher), None)
    made = {}
    names = {name for each in objectives for name in each.phase.views}
    if TARGET_DOMAIN in names:
        names.remove(TARGET_DOMAIN)
        if target_images is None:
            raise InputError("the method learns from unlabelled images too: give target_data")
        made[TARGET_DOMAIN] = target_images
    forward = None
    if teacher is not None:
        variables = {"params": teacher_params, **teacher_stats}
        forward = run_model(
            teacher,
            variables,
            images,
            train=any(each.phase.teacher_batch_statistics for each in objectives),
            pullback=any(each.needs_pullback for each in objectives),
        )
        evaluated = functools.partial(run_model, teacher, variables, train=False)
        for name in sorted(names):
            if labels is None or keys is None:
                raise InputError(f"the view {name} needs labels and keys, one for each example")
            apply = lambda images: evaluated(images).logits  # noqa: E731
            made[name] = jax.lax.stop_gradient(VIEWS[name](apply, images, labels, keys))
        read = {name for each in objectives if each.runs_teacher for name in each.phase.views}
        forward = dataclasses.replace(
            forward, views={name: evaluated(made[name]) for name in sorted(read)}
        )
        teacher_stats = forward.state
    computed = {each: _targets(each, forward, made) for each in dict.fromkeys(objectives)}
    targets = tuple(computed[each] for each in objectives)
    return jax.lax.stop_gradient((targets, teacher_stats))


def _targets(
    objective: Objective, teacher: Forward | None, views: Mapping[str, jax.Array]
) -> tuple[Any, ...]:
    """The targets of each term; the images of its views; and whether all is finite.

    Of a teacher that is trained along there are only the images. The last is of the taps behind
    booleans, `[batch]`. NaN in a float stays one in the loss, but a boolean hides it.
    """
    own = {name: views[name] for name in objective.phase.views}
    if teacher is None or objective.phase.trains_teacher:
        return (*(None for _ in objective.phase.terms), own, None)
    targets, hidden = _targets_of(objective, teacher), set()
    for (_, term), computed in zip(objective.phase.terms, targets, strict=True):
        if any(leaf.dtype == bool for leaf in jax.tree.leaves(computed)):
            hidden |= {*term.chosen(teacher.taps)}
    finite = [
        jnp.isfinite(teacher.taps[name]).reshape(len(teacher.logits), -1).all(axis=1)
        for name in sorted(hidden)
    ]
    return (*targets, own, functools.reduce(jnp.logical_and, finite) if finite else None)


def _targets_of(objective: Objective, teacher: Forward) -> tuple[Any, ...]:
    """The targets of each term."""
    return tuple(
        term.targets(pool_positions(teacher, pooled)) if term.needs_teacher else None
        for (_, term), pooled in zip(objective.phase.terms, objective.pooled, strict=True)
    )


def _run_on_views(
    model: Model,
    variables: Any,
    images: jax.Array,
    views: Mapping[str, jax.Array],
    *,
    train: bool = True,
    pullback: bool = False,
    dropout_key: jax.Array | None = None,
) -> Forward:
    """Runs a network; on each view in a pass of its own, also for batch norms."""
    forward = run_model(
        model, variables, images, train=train, pullback=pullback, dropout_key=dropout_key
    )
    state, passes = forward.state, {}
    for name, made in views.items():
        variables = {"params": variables["params"], **state}
        passes[name] = run_model(model, variables, made, train=train, dropout_key=dropout_key)
        state = passes[name].state
    return dataclasses.replace(forward, views=passes, state=state)


def _of_whole_batch(
    term: Term, student: Forward, targets: Any, labels: jax.Array, axis_name: str
) -> tuple[Forward, Any, jax.Array]:
    """Gathers what a term compares over the devices.

    Each device then has the loss of the whole batch. Its gradient in a device's own values is
    summed over the devices, as they all use them, and so the mean of the parameters' gradients is
    exactly that of the whole batch.
    """
    taps = {name: student.taps[name] for name in term.chosen(student.taps)}
    of_views = {name: forward.logits for name, forward in student.views.items()}
    share = taps, student.logits, student.features, of_views, targets, labels
    taps, logits, features, of_views, targets, labels = jax.lax.all_gather(
        share, axis_name, tiled=True
    )
    views = {
        name: dataclasses.replace(student.views[name], logits=own) for name, own in of_views.items()
    }
    forward = dataclasses.replace(
        student, taps=student.taps | taps, logits=logits, features=features, views=views
    )
    return forward, targets, labels


def apply_connectors(
    connectors: nn.Module | None,
    index: int,
    student: Forward,
    targets: Any,
    params: Any,
    batch_stats: Any,
    train: bool,
) -> tuple[Forward, Any, dict[str, Any]]:
    """Maps a student's forward pass and targets by the module of the term with that index.

    Returns:
      The pass and the targets as the term compares them, and the module's new running statistics
      by term.
    """
    if connectors is None:
        return student, targets, {}
    key = f"term{index}"
    variables = {
        "params": params["connectors"][key],
        "batch_stats": batch_stats["connectors"][key],
    }
    (student, targets), state = connectors.apply(
        variables, student, targets, train=train, mutable=["batch_stats"]
    )
    return student, targets, {key: state.get("batch_stats", batch_stats["connectors"][key])}


def connectors_in(objective: Objective, params: Any, batch_stats: Any) -> dict[str, Any]:
    """The connectors' variables in a state, by collection; {} where there are none.

    Where several terms connect a layer, the first term's connector counts.
    """
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for index, connectors in enumerate(objective.connectors):
        if isinstance(connectors, Connectors):
            for name, tree in (("params", params), ("batch_stats", batch_stats)):
                found[name] = tree["connectors"][f"term{index}"] | found[name]
    return found if found["params"] else {}


def connected_taps(connectors: nn.Module | None) -> tuple[str, ...]:
    """The taps that pass through connectors."""
    return tuple(name for name, _ in getattr(connectors, "widths", ()))
