"""Measure speed, memory and compile time on the device at hand, beside PyTorch where it is there.

Work is the engine's own compiled programs on made-up images (`precision`: on digits). Where
PyTorch is installed the same work (`steps`, on CPUs in float32), written as its users write it,
runs in turn with ours; a ratio is the median over pairs. `epochs`, `cache`, `precision` and
`startup` are measured once. Use an idle machine.

Examples:
  python -m experiments.bench
  python -m experiments.bench --sections steps --batch 128 --repetitions 20
  python -m experiments.bench --sections depthwise --repetitions 3
  python -m experiments.bench --record workdir/runs/HASH/record.json
  python -m experiments.bench --compile-for h100,tpu-v5e-4,tpu-v5e-16
      compile the headline run for machines that are not here: pip install -e '.[aot-cuda,aot-tpu]'
      (killed, the same command compiles only what is missing)
  python -m experiments.bench --publish
      keep the measurements in experiments/records/bench and rebuild experiments/BENCH.md
"""

import dataclasses
import importlib.util
import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from abflax.errors import InputError, unknown
from abflax.losses import neuron_selectivity
from abflax.losses.nst import channel_patterns
from abflax.methods import METHODS
from abflax.models import MODELS
from abflax.training.devices import usable_devices
from abflax.training.record import environment, write_record
from experiments.benchmark import (
    compile_ahead,
    convolution_work,
    depthwise_work,
    scaling,
    startup,
    whole,
)
from experiments.benchmark.jax_work import Bench
from experiments.benchmark.report import COMPILED, PUBLISHED, compiled_section, page, section
from experiments.benchmark.timing import Work, alternate, compiled_work, median_ratio, peak_flops
from experiments.common import cli

Rows = list[dict[str, Any]]
Section = Callable[[Bench, int], Rows]

STUDENTS = (1, 2, 4, 8)
VMAPPED = 2


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      teacher: its architecture.
      student: its architecture.
      batch: images a step.
      precision: of the networks.
      sections: some of the sections, by their names; left out: all.
      record: the record of a finished run of CIFAR's images: measure what it made of its time
        instead.
      compile_for: compile teacher and student for these machines instead, in both precisions.
      repetitions: of each measurement.
      workdir: where bench.json goes.
      publish: keep the measurements in experiments/records/bench, and rebuild experiments/BENCH.md.
    """

    teacher: str = "wrn22-4"
    student: str = "wrn16-2"
    batch: int = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    sections: cli.Names | None = None
    record: Path | None = None
    compile_for: cli.Names | None = None
    repetitions: int = 10
    workdir: Path = cli.WORKDIR
    publish: bool = False


def main(console: Console) -> None:
    """Runs the command."""
    first_lines = {name: str(measure.__doc__).split("\n")[0] for name, measure in SECTIONS.items()}
    arguments = cli.parse(Arguments, "experiments.bench", __doc__, {"sections": first_lines})
    if arguments.batch < 1 or arguments.repetitions < 1:
        raise InputError("--batch and --repetitions must be at least 1")
    for name in (arguments.teacher, arguments.student):
        MODELS[name]  # an unknown name is reported first
    if arguments.compile_for is not None:
        compile_for(console, arguments, arguments.compile_for)
        return
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    bench, sections = select_work(arguments)
    dtype = jnp.bfloat16 if bench.precision == "bfloat16" else jnp.float32
    setting = {name: getattr(bench, name) for name in ("teacher", "student", "batch", "precision")}
    measurements: dict[str, Any] = {
        "environment": environment(bench.devices) | {"torch": _torch_version()},
        "setting": setting | {"repetitions": arguments.repetitions},
        "peak_flops": peak_flops(dtype),
        "sections": {},
    }
    for name, measure in sections.items():
        measurements["sections"][name] = measure(bench, arguments.repetitions)
        console.print(section(name, measurements), soft_wrap=True, markup=False)
        write_record(arguments.workdir / "bench.json", measurements)
    if arguments.publish:
        console.print(f"{publish(measurements)}", soft_wrap=True)


def compile_for(console: Console, arguments: Arguments, targets: Sequence[str]) -> None:
    """Compiles all programs for each target and shows, and publishes, what came of it."""
    _require_compilable(arguments, targets)
    for target in targets:
        found = _compile_target(console, arguments, target)
        console.print(compiled_section(found), soft_wrap=True, markup=False)
        if arguments.publish:
            COMPILED.mkdir(parents=True, exist_ok=True)
            write_record(COMPILED / f"{target}.json", found)
    if arguments.publish:
        write_page()


def _require_compilable(arguments: Arguments, targets: Sequence[str]) -> None:
    for name in ("batch", "precision", "sections", "record", "repetitions"):
        if getattr(arguments, name) != getattr(Arguments, name):
            raise InputError(
                f"--compile-for takes no --{name}: it compiles batches of 128 in both precisions"
            )
    networks = arguments.teacher, arguments.student
    if arguments.publish and networks != (Arguments.teacher, Arguments.student):
        raise InputError("--publish keeps what the headline run compiles to: name no networks")
    for target in targets:
        if target not in compile_ahead.TARGETS:
            raise unknown("target", target, compile_ahead.TARGETS)
        if not compile_ahead.is_installed(target):
            extra = compile_ahead.TARGETS[target].extra
            raise InputError(f"nothing here compiles for {target}: pip install -e '.[{extra}]'")


def _compile_target(console: Console, arguments: Arguments, target: str) -> dict[str, Any]:
    """Compiles all programs for a target, but those that an earlier call compiled.

    The workdir keeps each program's row, which holds for the same commit, versions and networks.
    """
    networks = arguments.teacher, arguments.student
    path = arguments.workdir / f"{'-'.join(('compiled', target, *networks))}.json"
    made = environment(usable_devices(1))
    versions = {name: made[name] for name in ("jax", "jaxlib", "commit")}
    before = {}
    if path.exists() and (made["commit"] or "+")[-1] != "+":  # with "+" the code may be another
        earlier = json.loads(path.read_text("utf-8"))
        if earlier["environment"] == versions:
            before = {(row["precision"], row["name"]): row for row in earlier["rows"]}
    found: dict[str, Any] = {"target": target, "environment": versions, "rows": []}
    for work in itertools.product(compile_ahead.PRECISIONS, compile_ahead.PROGRAMS):
        row = before.get(work)
        if row is None or "failure" in row:
            console.print(target, *work, sep=", ", style="dim")
            row = compile_ahead.in_child(target, *work, *networks)
        found["rows"].append(row)
        write_record(path, found)
    return found


def select_work(arguments: Arguments) -> tuple[Bench, dict[str, Section]]:
    """What is measured, on what."""
    if arguments.record is not None:
        if arguments.sections is not None:
            raise InputError("give --sections or --record, not both")
        record = whole.read(arguments.record)
        return whole.bench_of(record), {"whole": lambda bench, _: whole.whole(record, bench)}
    wanted = arguments.sections or tuple(SECTIONS)
    for name in wanted:
        if name not in SECTIONS:
            raise unknown("section", name, SECTIONS)
    bench = Bench(
        arguments.teacher, arguments.student, arguments.batch, precision=arguments.precision
    )
    return bench, {name: SECTIONS[name] for name in wanted}


def publish(measurements: dict[str, Any]) -> Path:
    """Keeps the measurements of this device and setting, and rebuilds the page.

    Sections published before of the same commit, versions and setting stay.
    """
    setting = measurements["setting"]
    device = re.sub(r"[^a-z0-9]+", "-", measurements["environment"]["device"].lower())
    name = f"{device}-{setting['teacher']}-{setting['student']}-{setting['batch']}"
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    path = PUBLISHED / f"{name}-{setting['precision']}.json"
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        if all(before[key] == measurements[key] for key in ("environment", "setting")):
            sections = before["sections"] | measurements["sections"]
            order = [name for name in (*SECTIONS, "whole") if name in sections]
            measurements = measurements | {"sections": {name: sections[name] for name in order}}
    write_record(path, measurements)
    return write_page()


def write_page() -> Path:
    """Rebuilds BENCH.md from the published records."""
    path = PUBLISHED.parent.parent / "BENCH.md"
    path.write_text(page(*(
        [json.loads(each.read_text("utf-8")) for each in sorted(folder.glob("*.json"))]
        for folder in (PUBLISHED, COMPILED)
    )), "utf-8")  # fmt: skip
    return path


def steps(bench: Bench, repetitions: int) -> Rows:
    """Teacher, initialise (with the teacher, and on cached bits), classify, evaluation.

    Cached bits once more beside a PyTorch that runs its teacher, as its users do.
    """
    initialise, classify = bench.phases
    works = {
        "teacher": bench.teacher_forward(),
        "initialise": bench.train(initialise),
        "initialise, cached targets": bench.train(initialise, cached=True),
        "classify": bench.train(classify),
        "evaluate": bench.evaluate(),
    }
    theirs: dict[str, Mapping[str, Callable[[], None]]] = {}
    if _beside_torch(bench):
        from experiments.benchmark import torch_work

        made = (bench.teacher, bench.student, bench.batch, works["evaluate"].images)
        theirs = {
            name: torch_work.work(*made, variant) for name, variant in torch_work.variants().items()
        }
    pairs = [(name, name) for name in works]
    if theirs:
        pairs.append(("initialise, cached targets", "initialise"))
    rows = []
    for name, of_torch in pairs:
        tried = {f"torch_{kind}": made[of_torch] for kind, made in theirs.items()}
        found = alternate({"own": works[name].run, **tried}, repetitions)
        seconds = found.pop("own")
        runs = "; PyTorch runs its teacher" * (name != of_torch)
        row = _described(name + runs, works[name], seconds) | found
        if found:
            ratios = {kind: median_ratio(seconds, each) for kind, each in found.items()}
            row |= {"ratio": ratios["torch_seconds"], "ratio_to_best": min(ratios.values())}
        rows.append(row)
    return rows


def parts(bench: Bench, repetitions: int) -> Rows:
    """Where an initialise step goes."""
    works = bench.parts() | {"whole step": bench.train(bench.phases[0])}
    seconds = alternate({name: work.run for name, work in works.items()}, repetitions)
    return [
        {"name": name, "seconds": [time / works[name].steps for time in seconds[name]]}
        for name in works
    ]


def convolutions(bench: Bench, repetitions: int) -> Rows:
    """Each convolution of a step: the teacher's forward; the student's with their gradients."""
    rows: Rows = []
    kinds: dict[str, bool] = {}  # of PyTorch's convolutions: whether in bfloat16
    if _beside_torch(bench):
        from experiments.benchmark import torch_work

        kinds["torch_channels_last"] = False
        if torch_work.multiplies_bfloat16():
            kinds["torch_bfloat16"] = True
    for role, network in (("teacher", bench.teacher), ("student", bench.student)):
        for convolution, count in convolution_work.convolutions(network):
            setting = bench.batch, role == "student"
            work = convolution.work(*setting)
            theirs = {name: convolution.in_torch(*setting, half) for name, half in kinds.items()}
            found = alternate({"own": work.run, **theirs}, repetitions)
            found = {name: [count * time for time in times] for name, times in found.items()}
            alike = dataclasses.replace(work, flops=count * (work.flops or 0))
            seconds = found.pop("own")
            row = _described(f"{role}: {convolution}; {count} alike", alike, seconds) | found
            row |= {"images_per_second": None, "role": role}
            if found:
                row["ratio"] = median_ratio(seconds, found["torch_channels_last"])
            rows.append(row)
    return rows


def _beside_torch(bench: Bench) -> bool:
    """Whether PyTorch is here and does the same work: on a CPU, in float32."""
    on_cpu = bench.devices[0].platform == "cpu"
    return bool(_torch_version()) and on_cpu and bench.precision == "float32"


def methods(bench: Bench, repetitions: int) -> Rows:
    """One step of each phase of each method of one data set, in turn with one of cross-entropy."""
    rows: Rows = []
    plain = dataclasses.replace(bench, method="cross-entropy")
    cheapest = plain.train(plain.phases[0]).run
    for method in METHODS:
        own = dataclasses.replace(bench, method=method)
        for phase in own.phases:
            if phase.trains_teacher:  # on two data sets
                continue
            name, work = f"{method}: {phase.name}", own.train(phase)
            row, seconds, others = _in_turn(name, work, cheapest, repetitions)
            rows.append(row | {"times_cross_entropy": median_ratio(others, seconds)})
    return rows


def seeds(bench: Bench, repetitions: int) -> Rows:
    """Initialise steps of several students in one program, in turn with that of one.

    Written out one after another, as `distill_group` does it, and batched by `jax.vmap`.
    """
    initialise = bench.phases[0]
    one = bench.train(initialise)
    rows: Rows = []
    kinds: list[tuple[str, int, Callable[..., Work]]] = [
        (f"{count} in one program", count, bench.train) for count in STUDENTS
    ]
    if len(bench.devices) == 1:
        kinds.append((f"{VMAPPED} by jax.vmap", VMAPPED, bench.vmapped))
    for name, count, make in kinds:
        work = make(initialise, students=count)
        row, seconds, others = _in_turn(name, work, one.run, repetitions)
        times = median_ratio(others, seconds) * one.steps / work.steps
        rows.append(row | {"times_one": times, "share_each": times / count})
    unrolled = [row["times_one"] for row in rows[: len(STUDENTS)]]
    slope, shared, away = scaling.line(STUDENTS, unrolled)
    rows.append({
        "name": f"a line: {shared:.2f} shared and {slope:.2f} for each student; at most {away:.0%} "
        "away from it"
    })  # fmt: skip
    return rows


def nst(bench: Bench, repetitions: int) -> Rows:
    """NST at [32, 8, 8, 256] and its gradient, and a version with the full temporary."""
    student, teacher = jax.random.normal(jax.random.key(0), (2, 32, 8, 8, 256))

    def full(student: jax.Array, teacher: jax.Array) -> jax.Array:
        f, g = channel_patterns(student), channel_patterns(teacher)
        kernel = lambda a, b: jnp.square((a[:, :, None] * b[:, None]).sum(axis=-1))  # noqa: E731
        pairs = zip((f, g, f), (f, g, g), (1, 1, -2), strict=True)
        means = (sign * kernel(a, b).mean(axis=(1, 2)) for a, b, sign in pairs)
        return sum(means, start=jnp.zeros(()))

    works = {}
    for name, loss in {"Gram matrices": neuron_selectivity, "full temporary": full}.items():
        gradient = jax.jit(jax.value_and_grad(lambda s, t, loss=loss: loss(s, t).sum()))
        works[name] = compiled_work(gradient, student, teacher, images=32)
    seconds = alternate({name: work.run for name, work in works.items()}, repetitions)
    return [_described(name, work, seconds[name]) for name, work in works.items()]


def depthwise(bench: Bench, repetitions: int) -> Rows:
    """A train step of each MobileNet, in turn with the same by XLA's own convolutions."""
    rows: Rows = []
    for name in depthwise_work.NETWORKS:
        own, theirs = (depthwise_work.train(name, by_slices) for by_slices in (True, False))
        row, seconds, others = _in_turn(name, own, theirs.run, repetitions)
        row |= {"convolved_seconds": others, "convolved_bytes": theirs.bytes}
        rows.append(row | {"times_convolved": median_ratio(seconds, others)})
    return rows


def _in_turn(
    name: str, work: Work, other: Callable[[], None] | None, repetitions: int
) -> tuple[dict[str, Any], list[float], list[float]]:
    """A row of some work in turn with the other, if there is one; the seconds of both."""
    works = {"own": work.run} | ({"other": other} if other else {})
    seconds = alternate(works, repetitions)
    return _described(name, work, seconds["own"]), seconds["own"], seconds.get("other", [])


def _described(name: str, work: Work, seconds: list[float]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {
        "name": name,
        "seconds": [time / work.steps for time in seconds],
        "images_per_second": work.images / middle,
        "flops": work.flops,
        "flops_per_second": work.flops * work.steps / middle if work.flops else None,
        "devices": work.devices,
        "bytes": work.bytes,
        "compile_seconds": work.compile_seconds,
    }


def _torch_version() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.__version__


SECTIONS: Mapping[str, Section] = {
    "steps": steps,
    "parts": parts,
    "convolutions": convolutions,
    "methods": methods,
    "seeds": seeds,
    "epochs": scaling.epochs,
    "cache": scaling.cache,
    "precision": scaling.precision,
    "nst": nst,
    "depthwise": depthwise,
    "startup": startup.startup,
}


if __name__ == "__main__":
    cli.main(main)
