"""How fast photographs are decoded, where, and how that compares with a student's step.

Decodes batches of random crops as training would, then, given a student, trains it by
cross-entropy on batches that lie there, and on batches as they come. CPU time and images are
counted in the decoding processes and in this one.

Examples:
  python -m experiments.benchmark.input_pipeline --images photos
  python -m experiments.benchmark.input_pipeline --images photos --student mobilenet-v1 --workers 8
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from PIL import Image
from rich.console import Console

from abflax.data import Stream, read_folder
from abflax.data.decoders import Decoders
from abflax.methods import METHODS
from abflax.methods.optimizer import PhaseSchedule
from abflax.models import MODELS
from abflax.training import parallel
from abflax.training.devices import AXIS, replicate, usable_devices
from abflax.training.inputs import OrderedInputs
from experiments.common import cli


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      images: folder of images, as experiments.transfer takes it.
      holdout: share held out for testing, where the folder has no test folder.
      student: architecture; left out: only decoding is timed.
      size: height and width that the networks see, in pixels.
      batch_size: images a step.
      batches: how many are timed.
      workers: processes that decode; left out: one a core, 16 at most.
    """

    images: Path
    holdout: float | None = None
    student: str | None = None
    size: int = 224
    batch_size: int = 32
    batches: int = 20
    workers: int | None = None


@dataclasses.dataclass(frozen=True)
class Spent:
    """What some batches took.

    Attributes:
      here, there: CPU seconds of this process, and of those that decode.
      opened: images that this process has opened.
      decoded: images that each of the others has decoded.
    """

    seconds: float
    here: float
    there: float
    opened: int
    decoded: tuple[int, ...]


def spent(work: Callable[[int], Any], steps: Iterable[int], decoders: Decoders) -> Spent:
    """Does some work for each step, and measures."""
    before = list(decoders.decoded)
    wall, here, there = time.perf_counter(), time.process_time(), decoders.seconds()
    with mock.patch.object(Image, "open", wraps=Image.open) as opened:
        for step in steps:
            work(step)
    return Spent(
        time.perf_counter() - wall,
        time.process_time() - here,
        decoders.seconds() - there,
        opened.call_count,
        tuple(now - then for now, then in zip(decoders.decoded, before, strict=True)),
    )


def main(console: Console) -> None:
    """Runs the command."""
    arguments = cli.parse(Arguments, "experiments.benchmark.input_pipeline", __doc__)
    folder = read_folder(
        arguments.images, side=arguments.size, held_out=arguments.holdout, workers=arguments.workers
    )
    data = folder.train
    stream = Stream(len(data), arguments.batch_size, seed=0)
    spec = parallel.InputSpec(data.preprocessing, data.image_shape, usable_devices(), True, 1)
    with contextlib.closing(OrderedInputs(data, stream, spec, 0, arguments.workers)) as inputs:
        _report(console, arguments, inputs, data.num_classes, spec)


def _report(
    console: Console,
    arguments: Arguments,
    inputs: OrderedInputs,
    num_classes: int,
    spec: parallel.InputSpec,
) -> None:
    count = arguments.batches
    images = count * arguments.batch_size
    inputs(0, 1)  # the processes start
    decoders = inputs.decoders
    assert decoders is not None

    cost = spent(lambda number: inputs(number, 1), range(1, count + 1), decoders)
    console.print(
        f"decoding: {images / cost.seconds:.0f} images/s by {len(cost.decoded)} processes; "
        f"{1e3 * cost.there / sum(cost.decoded):.1f} ms of CPU an image there, "
        f"{1e3 * cost.here / images:.2f} ms here\n"
        f"images decoded: {' + '.join(map(str, cost.decoded))} there, {cost.opened} here",
        soft_wrap=True,
    )
    if arguments.student is None:
        return
    step = _step(arguments.student, num_classes, spec)
    batch = inputs(count + 1, 1)
    step(batch)  # compiles
    works: dict[str, Callable[[int], Any]] = {
        "that lie there": lambda number: step(batch),
        "as they come": lambda number: step(inputs(number, 1)),
    }
    for words, work in works.items():
        cost = spent(work, range(count + 2, 2 * count + 2), decoders)
        console.print(
            f"{arguments.student} on batches {words}: {1e3 * cost.seconds / count:.1f} ms a step, "
            f"{images / cost.seconds:.0f} images/s; CPU {cost.here:.1f} s here, "
            f"{cost.there:.1f} s there; decoded {sum(cost.decoded)} there, {cost.opened} here",
            soft_wrap=True,
        )


def _step(
    name: str, num_classes: int, spec: parallel.InputSpec
) -> Callable[[parallel.StepInputs], None]:
    """One training step by cross-entropy, to its end."""
    model = MODELS[name](num_classes=num_classes, axis_name=AXIS)
    (phase,) = METHODS["cross-entropy"](setting="transfer")
    schedule = PhaseSchedule(0, 10**6, 0, 100, 100, Fraction(10**4))
    program = parallel.compile_phase(model, None, phase, schedule, spec)
    state = program.begin(program.init(jax.random.key(0)), {}, jax.random.key(1))
    state = replicate(state, spec.devices)
    train = parallel.compile_steps((program,), spec)

    def step(inputs: parallel.StepInputs) -> None:
        nonlocal state
        (state,), metrics = train((state,), {}, inputs, jax.random.key(2), 1, None)
        jax.block_until_ready(metrics)

    return step


if __name__ == "__main__":
    cli.main(main)
