"""How long things take: alternating, medians, and what a device can do at most."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of work, compiled.

    Attributes:
      run: does it once, and returns when it is done.
      images, steps: how many that is.
      devices: how many share it.
      flops: floating-point operations of one step, as XLA counts them before it optimises; a
        multiply-add is two.
      bytes: arguments, results and temporaries of the compiled program, which is the most it
        holds at a time.
      compile_seconds: to trace, lower and compile it.
    """

    run: Callable[[], None]
    images: int
    steps: int = 1
    flops: float | None = None
    bytes: int | None = None
    compile_seconds: float | None = None
    devices: int = 1


def alternate(works: Mapping[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Name -> seconds of each repetition; all run once in turn, again and again.

    A first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions + 1):
        for name, run in works.items():
            began = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over pairs of theirs / ours: above 1, we are faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def compiled(function: Any, *arguments: Any) -> tuple[Any, float, int]:
    """A jitted or pmapped function compiled for its arguments, in how many seconds, its bytes."""
    jax.clear_caches()  # what was compiled before would be found there, in no time
    began = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    held = sum(getattr(memory, part) for part in parts) - memory.alias_size_in_bytes
    return program, seconds, held


def compiled_work(
    function: Any, *arguments: Any, images: int, flops: float | None = None, devices: int = 1
) -> Work:
    """Compiles a jitted or pmapped function into work of one step on its arguments."""
    run, seconds, held = compiled(function, *arguments)
    once = lambda: jax.block_until_ready(run(*arguments))  # noqa: E731
    return Work(once, images, 1, flops, held, seconds, devices)


def peak_flops(dtype: Any, repetitions: int = 5) -> float:
    """FLOP/s of a large matrix product: the most this device does in this precision."""
    size = 4096 if jax.devices()[0].platform == "cpu" else 16384
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    seconds = alternate({"": lambda: product(matrix).block_until_ready()}, repetitions)[""]
    return 2 * size**3 / min(seconds)
