"""Compiles the headline run's programs for machines that are not here, each in a child process.

XLA ends the process when one of its checks fails, so each program has a process of its own:
`python -m experiments.benchmark.compile_ahead TARGET PRECISION PROGRAM` prints one line of JSON.
It takes the wheels of the extras `aot-cuda` or `aot-tpu`, and no accelerator.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from abflax.errors import BusyError
from abflax.models.variables import init_variables
from abflax.training import parallel
from abflax.training.devices import local_devices
from abflax.training.inputs import EVALUATION_BATCH
from experiments.benchmark.jax_work import PREPROCESSING, SHAPE, SPAN, Bench
from experiments.common.flops import count_flops

PRECISIONS = ("float32", "bfloat16")
PROGRAMS = ("initialise", "initialise, cached", "classify", "evaluate", "targets")
_STEPS, _TRAIN, _TEST, _VIEWS = 100, 50_000, 10_000, 4
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_PARAMETER = re.compile(r"%(\S+) = (\w+\[[\d,]*\])\S* parameter\(")
_GATHER = re.compile(r"%\S+ = (\w+\[[\d,]*\])\S* gather\(%([\w.-]+),")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = .*?[\])}] ([a-z][a-z0-9-]*)\(", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
      platform, topology: its names in JAX.
      module: a module that only the wheels for it have.
      extra: the extra of abflax that installs them.
      flops: precision -> the peak of one device, FLOP/s, by its data sheet, at the precision in
        which JAX multiplies there if it is not told otherwise (`jax.lax.Precision.DEFAULT`).
      bandwidth: of one device's memory, bytes/s.
      environment: variables that the compiler needs.
    """

    platform: str
    topology: str
    module: str
    extra: str
    flops: Mapping[str, float]
    bandwidth: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def roofline(self, precision: str, flops: float, moved_bytes: float) -> float:
        """The fewest seconds in which one device does so many FLOP and moves so many bytes."""
        return max(flops / self.flops[precision], moved_bytes / self.bandwidth)


def _tpu_v5e(chips: int, topology: str) -> Target:
    """Cloud TPU v5e, which multiplies float32 in one pass of bfloat16."""
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"v5litepod-{chips}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    peak = dict.fromkeys(PRECISIONS, 197e12)
    return Target("tpu", topology, "libtpu", "aot-tpu", peak, 819e9, environment)


TARGETS: Mapping[str, Target] = {
    "h100": Target(  # multiplies float32 as TF32
        "cuda", "1x1x1", "jax_cuda12_plugin", "aot-cuda",
        {"float32": 494.7e12, "bfloat16": 989.4e12}, 3.35e12,
    ),
    "tpu-v5e-4": _tpu_v5e(4, "v5e:2x2"),
    "tpu-v5e-16": _tpu_v5e(16, "v5e:4x4"),
}  # fmt: skip


def is_installed(target: str) -> bool:
    """Tells whether the wheels for a target are there."""
    return importlib.util.find_spec(TARGETS[target].module) is not None


def in_child(
    target: str, precision: str, program: str, teacher: str = "wrn22-4", student: str = "wrn16-2"
) -> dict[str, Any]:
    """Compiles a program in a child process; returns its row, with "failure" if it could not.

    Raises `BusyError` while another process has libtpu's lock.
    """
    arguments = (target, precision, program, teacher, student)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile times are measured
        **TARGETS[target].environment,
    }
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark.compile_ahead", *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    row = {"target": target, "precision": precision, "name": program}
    if done.returncode:
        if "libtpu_lockfile" in done.stderr:
            raise BusyError(
                "another process compiles for a TPU, and libtpu lets only one at a time; if there "
                "is none, remove /tmp/libtpu_lockfile"
            )
        lines = done.stderr.strip().splitlines() or [""]
        reason = next((line for line in lines if "Check failed" in line), lines[-1])
        return row | {"failure": f"exit code {done.returncode}: {reason[:300]}"}
    return row | json.loads(done.stdout.splitlines()[-1])


def compile_program(
    target: str, precision: str, program: str, teacher: str, student: str
) -> dict[str, Any]:
    """Compiles a program in this process and measures it."""
    devices = _devices(TARGETS[target])
    bench = Bench(teacher, student, 128, precision=precision)
    function, arguments = _lowerable(bench, tuple(devices), program, _STEPS)
    flops = _flops(bench, program) / _shares(devices, program)
    lowered = function.lower(*arguments)
    start = _processor_seconds()
    compiled = lowered.compile()
    seconds = _processor_seconds() - start
    memory = compiled.memory_analysis()
    step = _step_of(compiled.as_text())
    return {
        "devices": len(devices),
        "compile_seconds": seconds,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "flops": flops,
        "moved_bytes": _moved_bytes(compiled),
        "kernels": len(step),
        "collectives": sum(opcode.startswith("all-") for opcode in step),
    }


def _processor_seconds() -> float:
    """What this process has taken so far, on all threads, with the compilers that it called.

    Other work on the machine does not change it much.
    """
    return sum(os.times()[:4])


def _devices(target: Target) -> list[jax.Device]:
    options = {}
    if target.platform == "cuda":
        options["target_config"] = Path(__file__).with_name("h100.txtpb").read_text("utf-8")
    return topologies.get_topology_desc(
        platform=target.platform,
        **({"topology": target.topology} if options else {"topology_name": target.topology}),
        **options,
    ).devices


def _shares(devices: Sequence[jax.Device], program: str) -> int:
    """Counts the devices that share the batch of a step.

    In evaluation each device has a batch. Each process computes all targets on its own devices.
    """
    if program == "evaluate":
        return 1
    return len(local_devices(devices) if program == "targets" else devices)


def _flops(bench: Bench, program: str) -> float:
    """FLOP of a step of the whole batch, as the program is written; of one batch in evaluation."""
    function, arguments = _lowerable(bench, tuple(jax.devices("cpu")[:1]), program, steps=1)
    return count_flops(function, *arguments)


def _lowerable(
    bench: Bench, devices: tuple[jax.Device, ...], program: str, steps: int
) -> tuple[Any, tuple[Any, ...]]:
    """A compiled function and the shapes of its arguments."""
    shape, integer = jax.ShapeDtypeStruct, jnp.int32
    views = _VIEWS if program in ("initialise, cached", "targets") else None
    preprocessing = dataclasses.replace(PREPROCESSING, views=views)
    spec = parallel.InputSpec(preprocessing, SHAPE, devices, False, steps)
    phase = bench.phases[program == "classify"]
    networks = bench.networks()
    phase_program = parallel.compile_phase(*networks, phase, SPAN, spec)
    key = jax.random.key(0)
    teacher = jax.eval_shape(lambda: init_variables(networks[1], key, SHAPE))
    params = teacher.pop("params")
    state = jax.eval_shape(
        lambda stats: phase_program.begin(phase_program.init(key), stats, key), teacher
    )
    key = jax.eval_shape(lambda: key)
    count, shares = len(devices), _shares(devices, program)
    share = bench.batch // shares
    images = shape((_TRAIN, math.prod(SHAPE)), jnp.uint8)
    if program == "targets":
        index = shape((shares, share), integer)
        return phase_program.targets, (params, teacher, images, index, index)
    if program == "evaluate":
        batches = -(-_TEST // (EVALUATION_BATCH * count))
        examples = shape((count, batches, EVALUATION_BATCH), integer)
        inputs = parallel.StepInputs(
            shape((_TEST, math.prod(SHAPE)), jnp.uint8), shape((_TEST,), integer), examples,
            mask=shape(examples.shape, bool),
        )  # fmt: skip
        students = ((state.params, state.batch_stats),)
        function = parallel.compile_evaluation((phase_program,), spec)
        return function, (students, params, inputs)
    examples = shape((count, steps, share), integer)
    inputs = parallel.StepInputs(images, shape((_TRAIN,), integer), examples, examples)
    cached = None
    if views is not None:
        targets = jax.eval_shape(
            functools.partial(parallel._targets, phase_program.objective, preprocessing),
            params, teacher, images, shape((1,), integer), shape((1,), integer),
        )  # fmt: skip
        rows = _TRAIN * views
        cached = (jax.tree.map(lambda leaf: shape((rows, *leaf.shape[1:]), leaf.dtype), targets),)
    train = parallel.compile_steps((phase_program,), spec)
    return train, ((state,), params, inputs, key, shape((), integer), cached)


def _step_of(text: str) -> list[str]:
    """The opcodes of the loop's body in a compiled program, or of the program without a loop.

    That is the computation with the most: a program without a loop over steps may have smaller
    ones. Only those that do work are given, and those with a start and an end once.
    """
    computations = _computations(text)
    names = ("ENTRY", *re.findall(r"body=%?([\w.-]+)", text))
    found = [_INSTRUCTION.findall(computations.get(name, "")) for name in names]
    worked = [
        [each for each in opcodes if each not in _NO_KERNEL and not each.endswith("-done")]
        for opcodes in found
    ]
    return max(worked, key=len)


def _computations(text: str) -> dict[str, str]:
    """The computations of a compiled program by name; the first to run is "ENTRY"."""
    computations = {}
    for block in re.split(r"\n(?=%|ENTRY)", text):
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+)", block):
            computations[match[1] if not block.startswith("ENTRY") else "ENTRY"] = block
    return computations


def _moved_bytes(compiled: Any) -> float:
    """XLA's estimate for the compiled program, corrected; a loop counts as one round.

    The estimate is the same for all platforms: of the arrays' sizes, without padding.
    """
    from jaxlib import _jax  # JAX has no public way for a program of another platform

    (module,) = compiled.runtime_executable().hlo_modules()
    cost = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    return cost["bytes accessed"] - _never_read(compiled.as_text())


def _never_read(text: str) -> int:
    """Bytes of tables that fusions gather rows of, but the rows: XLA counts the whole tables.

    Here they are the images and the cached targets of the whole data set
    (`HloCostAnalysis::FusionParameterReadBytes` knows slices, and no gathers; of custom fusions,
    which a TPU has, gathers are counted by their rows).
    """
    fusions = set(re.findall(r"kind=k(?:Loop|Input|Output), calls=%([\w.-]+)", text))
    total = 0
    for name, block in _computations(text).items():
        if name in fusions:
            whole = dict(_PARAMETER.findall(block))
            for rows, table in _GATHER.findall(block):
                total += _bytes(whole[table]) - _bytes(rows) if table in whole else 0
    return total


def _bytes(shape: str) -> int:
    """The size of an array as HLO writes its shape: `bf16[128,1,1024]`."""
    kind, sizes = shape[:-1].split("[")
    bits = int(re.sub(r"\D+", "", kind.split("e")[0]) or 8)  # `pred` takes a byte
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


if __name__ == "__main__":
    print(json.dumps(compile_program(*sys.argv[1:])))
