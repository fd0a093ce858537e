"""How fast photographs are decoded, where, and how that compares with a student's step.

Decodes batches of random crops as training would, then, given a student, trains it by
cross-entropy on batches that lie there, and on batches as they come. CPU time and images are
counted in the decoding processes and in this one.

examples:
  python -m experiments.pipeline --images photos
  python -m experiments.pipeline --images photos --student mobilenet-v1 --workers 8
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from PIL import Image
from rich.console import Console

from abflax import parallel
from abflax.data import Photographs, Stream, read_folder
from abflax.data.decoders import Decoders
from abflax.feed import Feed
from abflax.methods import METHODS
from abflax.models import MODELS
from abflax.optim import Span
from experiments import cli


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser("experiments.pipeline", __doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="FOLDER", help="as experiments.transfer's")
    add("--holdout", type=float, metavar="SHARE", help="where FOLDER has no test folder")
    add("--student", help="architecture (default none: only decoding)")
    add("--size", type=int, default=224, metavar="PIXELS")
    add("--batch-size", type=int, default=32)
    add("--batches", type=int, default=20, help="how many are timed (default 20)")
    add("--workers", type=int, help="processes that decode (default: one a core, 16 at most)")
    return parser.parse_args(arguments)


@dataclasses.dataclass(frozen=True)
class Spent:
    """What some batches took.

    Attributes:
      seconds: from beginning to end.
      here, there: CPU seconds of this process, and of those that decode.
      opened: images that this process has opened.
      decoded: images that each of the others has decoded.
    """

    seconds: float
    here: float
    there: float
    opened: int
    decoded: tuple[int, ...]


def spent(work: Callable[[], None], decoders: Decoders) -> Spent:
    """Does some work, and measures."""
    before = list(decoders.decoded)
    wall, here, there = time.perf_counter(), time.process_time(), decoders.seconds()
    with mock.patch.object(Image, "open", wraps=Image.open) as opened:
        work()
    return Spent(
        time.perf_counter() - wall,
        time.process_time() - here,
        decoders.seconds() - there,
        opened.call_count,
        tuple(now - then for now, then in zip(decoders.decoded, before, strict=True)),
    )


def main(console: Console) -> None:
    arguments = parse()
    folder = read_folder(
        arguments.images,
        side=arguments.size,
        held_out=arguments.holdout,
        workers=arguments.workers,
    )
    devices = parallel.usable_devices()
    stream = Stream(len(folder.train), arguments.batch_size, seed=0)
    feed = Feed(folder.train, stream, 1, devices, 0, arguments.workers)
    try:
        feed(0, 1)  # the processes start
        assert feed.decoders is not None
        _report(console, arguments, folder.train, feed, feed.decoders, devices)
    finally:
        feed.close()


def _report(
    console: Console,
    arguments: argparse.Namespace,
    data: Photographs,
    feed: Feed,
    decoders: Decoders,
    devices: tuple[jax.Device, ...],
) -> None:
    count = arguments.batches
    images = count * arguments.batch_size

    def decode() -> None:
        for step in range(1, count + 1):
            feed(step, 1)

    found = spent(decode, decoders)
    console.print(
        f"decoding: {images / found.seconds:.0f} images/s by {len(found.decoded)} processes; "
        f"{1e3 * found.there / sum(found.decoded):.1f} ms of CPU an image there, "
        f"{1e3 * found.here / images:.2f} ms here",
        soft_wrap=True,
    )
    console.print(
        f"images decoded: {' + '.join(map(str, found.decoded))} there, {found.opened} here",
        soft_wrap=True,
    )
    if arguments.student is None:
        return
    step = _step(arguments.student, data, devices)
    lying = feed(count + 1, 1)
    step(lying)  # compiles

    def alone() -> None:
        for _ in range(count):
            step(lying)

    def together() -> None:
        for number in range(count):
            step(feed(count + 2 + number, 1))

    for words, work in (("that lie there", alone), ("as they come", together)):
        found = spent(work, decoders)
        console.print(
            f"{arguments.student} on batches {words}: {1e3 * found.seconds / count:.1f} ms a step, "
            f"{images / found.seconds:.0f} images/s; CPU {found.here:.1f} s here, "
            f"{found.there:.1f} s there; decoded {sum(found.decoded)} there, {found.opened} here",
            soft_wrap=True,
        )


def _step(name: str, data: Photographs, devices: tuple[jax.Device, ...]) -> Callable[[Any], None]:
    """One training step by cross-entropy on what a `Feed` gives, to its end."""
    model = MODELS[name](num_classes=data.num_classes, axis_name=parallel.AXIS)
    (phase,) = METHODS["cross-entropy"](setting="transfer")
    program = parallel.compile_phase(
        model, None, phase, Span(0, 10**6, 0, 100, 100, Fraction(10**4)), data.preprocessing,
        data.image_shape, devices, jnp.result_type(float), True,
    )  # fmt: skip
    state = program.begin(program.init(jax.random.key(0)), {}, jax.random.key(1))
    state = parallel.replicate(state, devices)
    train = parallel.compile_steps((program,), data.preprocessing, devices, 1, True)

    def step(given: Any) -> None:
        nonlocal state
        (state,), metrics = train((state,), {}, given[0], jax.random.key(2), *given[1:], 1, None)
        jax.block_until_ready(metrics)

    return step


if __name__ == "__main__":
    cli.main(main)
