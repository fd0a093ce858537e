"""Follows arrays through a traced computation: what an activation reads, what is never negative."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat", "remat2", "checkpoint",
          "closed_call", "core_call")  # fmt: skip
_BOUNDED = ("tanh", "logistic", "erf", "erfc", "max", "min", "exp")  # what a gate is made of
_NEVER_NEGATIVE = ("exp", "exp2", "logistic", "abs", "sqrt", "rsqrt", "square", "erfc")
_KEEP_SIGN = ("add", "add_any", "mul", "div", "min", "reduce_sum", "reduce_max", "reduce_min",
              "reduce_window_sum", "reduce_window_max", "reshape", "transpose", "squeeze",
              "broadcast_in_dim", "concatenate", "slice", "rev", "convert_element_type", "copy",
              "copy_p", "stop_gradient", "cumsum", "optimization_barrier", "pad", "integer_pow",
              "expand_dims", "dynamic_slice", "gather", "pmean", "psum", "name")  # fmt: skip
_SMALL = 12  # steps from a gate back to its input


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive; the arrays are numbered, and a number as a constant stands for itself."""

    primitive: str
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Activation:
    """A place where a non-linearity is applied: the arrays before and after it."""

    before: int
    after: int


class Dataflow:
    """A traced function without nested calls. The iterations of a scan are traced once.

    Args:
      function: of arrays, whose results are `outputs`.
      arguments: arrays or shapes.

    Attributes:
      steps: the primitives in order.
      inputs: the numbers of the arrays that go in.
      outputs: the numbers of the arrays that come out.
      shapes: of each array, inside the scans.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        closed = jax.make_jaxpr(function)(*arguments)
        self.steps: list[Step] = []
        self.shapes: list[tuple[int, ...]] = []
        self._aliases: dict[int, int] = {}  # what a scan stacks -> the array in its body
        self.inputs = [self._new(getattr(var.aval, "shape", ())) for var in closed.jaxpr.invars]
        self.outputs = self._add(closed, self.inputs)
        self._producers = {out: step for step in self.steps for out in step.outputs}

    def inner(self, array: int) -> int:
        """Returns the array in the body of the scan that stacks it, or else the array."""
        while array in self._aliases:
            array = self._aliases[array]
        return array

    def activations(self) -> list[Activation]:
        """Finds where non-linearities are applied, in order."""
        return [found for step in self.steps if (found := self._activation(step))]

    def never_negative(self) -> set[int]:
        """Finds the arrays that cannot have a negative entry, whatever goes in."""
        found: set[int] = set()

        def holds(value: Any) -> bool:
            return value >= 0 if isinstance(value, float) else value in found

        for step in self.steps:
            numbers = [each for each in step.inputs if each is not None]
            every = bool(numbers) and all(map(holds, numbers))
            if step.primitive == "select_n":
                every = all(map(holds, step.inputs[1:]))
            if (
                step.primitive in _NEVER_NEGATIVE
                or (step.primitive == "max" and any(map(holds, numbers)))
                or (step.primitive == "integer_pow" and step.params["y"] % 2 == 0)
                or (step.primitive in (*_KEEP_SIGN, "select_n") and every)
                or (step.primitive == "mul" and len(set(step.inputs)) == 1)
            ):
                found.update(step.outputs)
        return found | {each for each in self._aliases if self.inner(each) in found}

    def derives(self, array: int, source: int) -> bool:
        """Whether an array is made from another elementwise, in a few steps."""
        return source in self._elementwise(array)[0]

    def _new(self, shape: Any) -> int:
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _add(self, closed: ClosedJaxpr | Jaxpr, inputs: Sequence[Any]) -> list[Any]:
        """Adds the primitives of a function of these arrays; returns its results."""
        jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        known: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            known[var] = self._new(getattr(var.aval, "shape", ()))

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return float(atom.val) if jax.numpy.ndim(atom.val) == 0 else None
            return known[atom]

        for eqn in jaxpr.eqns:
            ins, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
            inner = next(
                (eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None
            )
            if name in _CALLS and inner is not None:
                outs = self._add(inner, ins)
            elif name == "scan":
                outs = self._scan(eqn, inner, ins)
            elif name in ("convert_element_type", "broadcast_in_dim") and isinstance(ins[0], float):
                outs = [ins[0]]
            else:
                outs = [self._new(getattr(var.aval, "shape", ())) for var in eqn.outvars]
                self.steps.append(Step(name, tuple(ins), tuple(outs), eqn.params))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _scan(self, eqn: Any, body: Any, ins: list[Any]) -> list[Any]:
        # What is scanned over, or stacked, has an axis more outside than inside. The parameters of
        # the primitive say it too, but JAX 0.12 has others than 0.10.
        carried = _same_rank(eqn.outvars, body.jaxpr.outvars)
        constants = _same_rank(eqn.invars, body.jaxpr.invars) - carried
        inside = ins[:constants] + [
            self._new(getattr(var.aval, "shape", ())) for var in body.jaxpr.invars[constants:]
        ]
        results = self._add(body, inside)
        outs = []
        for index, var in enumerate(eqn.outvars):
            if results[index] in inside:  # nothing has changed it
                outs.append(ins[inside.index(results[index])])
                continue
            outs.append(self._new(getattr(var.aval, "shape", ())))
            if index >= carried and isinstance(results[index], int):
                self._aliases[outs[-1]] = results[index]
        return outs

    def _elementwise(self, array: Any) -> tuple[set[int], bool]:
        """Finds what an array is made from elementwise, and whether a bounded function is in it."""
        found, bounded, edge = {array}, False, [array]
        for _ in range(_SMALL):
            steps = [self._producers[each] for each in edge if each in self._producers]
            steps = [s for s in steps if all(
                self.shapes[i] in ((), self.shapes[s.outputs[0]]) for i in s.inputs
                if isinstance(i, int)
            )]  # fmt: skip
            bounded |= any(step.primitive in _BOUNDED for step in steps)
            edge = [i for s in steps for i in s.inputs if isinstance(i, int) and i not in found]
            found.update(edge)
        return found, bounded

    def _activation(self, step: Step) -> Activation | None:
        name, arrays = step.primitive, [each for each in step.inputs if isinstance(each, int)]
        scalars = [a for a in step.inputs if isinstance(a, float) or self._is_scalar(a)]
        arrays = [each for each in arrays if each not in scalars]
        if (name in ("tanh", "logistic") or (name == "max" and scalars)) and len(arrays) == 1:
            return Activation(arrays[0], step.outputs[0])
        if name == "select_n":  # leaky ReLU, ELU: where(x > 0, x, …)
            test = self._producers.get(step.inputs[0])
            if test is not None and test.primitive in ("gt", "ge"):
                source = test.inputs[0]
                if any(source in self._elementwise(case)[0] for case in arrays[1:]):
                    return Activation(source, step.outputs[0])
        if name == "mul" and len(arrays) == 2:  # SiLU, GELU: x · g(x)
            for x, gate in (arrays, arrays[::-1]):
                sources, bounded = self._elementwise(gate)
                while x not in sources and (scaled := self._scaled(x)) is not None:
                    x = scaled
                if bounded and x != gate and x in sources:
                    return Activation(x, step.outputs[0])
        return None

    def _is_scalar(self, array: Any) -> bool:
        return isinstance(array, int) and self.shapes[array] == ()

    def _scaled(self, array: int) -> int | None:
        """Returns what an array is a constant multiple of."""
        step = self._producers.get(array)
        if step is None or step.primitive != "mul":
            return None
        arrays = [i for i in step.inputs if isinstance(i, int) and not self._is_scalar(i)]
        return arrays[0] if len(arrays) == 1 else None


def _same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Counts the arrays of a loop that have as many axes outside its body as inside."""
    rank = lambda var: len(getattr(var.aval, "shape", ()))  # noqa: E731
    return sum(rank(one) == rank(other) for one, other in zip(outside, inside, strict=True))
